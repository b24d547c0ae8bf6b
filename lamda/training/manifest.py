"""A checkpoint is complete or it is not there.

It is written under a temporary name; every file, in subfolders too, is synced and hashed into manifest.json, which ends
with its own hash; the folder is renamed, and LATEST is replaced. Loading verifies; a damaged
checkpoint is set aside.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from lamda.best_effort import BestEffort
from lamda.config.errors import UserError
from lamda.distributed import World, gather, on_main
from lamda.durable import Progress, hash_file, replace_file, sync_file, sync_folder, write_file

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def make_fresh(temporary: Path) -> None:
    """An empty folder at `temporary`; what a crash left there goes. Raises OSError."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def commit(
    temporary: Path,
    final: Path,
    manifest: dict[str, object],
    *,
    keep: int,
    keep_every: int | None = None,
    at: Callable[[str], None] = lambda point: None,
) -> None:
    """Turn the written files into the newest checkpoint, then prune.

    The `keep` newest stay, and those of steps that `keep_every` divides. at: told of each moment in
    between. Raises OSError.
    """
    seal(temporary, manifest)
    at("commit.manifest")
    temporary.rename(final)
    sync_folder(final.parent)
    at("commit.renamed")
    replace_file(final.parent / "LATEST", final.name)
    at("commit.latest")
    with BestEffort(f"{final.parent}: an old checkpoint cannot be deleted"):
        for old in complete(final.parent)[:-keep]:
            if keep_every is None or step_of(old) % keep_every:
                remove(old)
    at("commit.pruned")


def seal(folder: Path, content: dict[str, object]) -> None:
    """Write the manifest, which ends with its own hash, and bring it and the folders to the disk. Raises OSError."""
    write_file(folder / MANIFEST, _sealed(content))
    for each in (*filter(Path.is_dir, folder.rglob("*")), folder):
        sync_folder(each)


def remove(path: Path) -> None:
    """Delete a checkpoint; one that is half deleted no longer has a checkpoint's name."""
    doomed = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete what a crash left of checkpoints that were being written or deleted."""
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def sync_and_describe(file: Path, *, progress: Progress = lambda: None) -> dict[str, str | int]:
    """Bring a file to the disk; its entry in the manifest: size and sha256. progress: called as it goes on."""
    sync_file(file, progress=progress)
    return {"size": file.stat().st_size, "sha256": hash_file(file, progress=progress)}


def find_valid(folder: Path, *, world: World, progress: Progress = lambda: None) -> Path | None:
    """The newest checkpoint that passes its manifest; damaged ones are set aside as `.damaged`.

    LATEST then names the one that was found. Raises UserError where there are checkpoints and none is
    valid: a run never silently starts anew.
    """
    names = on_main(world, lambda: [path.name for path in complete(folder)])
    for name in reversed(names):
        path = folder / name
        problem = verify(path, world=world, progress=progress)
        if problem is None:
            if name != names[-1]:
                on_main(world, lambda path=path: replace_file(folder / "LATEST", path.name))
            return path
        on_main(world, lambda path=path, problem=problem: _set_aside(path, problem))
    if names:
        raise UserError(f"{folder}: every checkpoint is damaged (see train.log); start again in another run.dir")
    return None


def complete(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.suffix)


def verify(path: Path, *, world: World, progress: Progress = lambda: None) -> str | None:
    """What is wrong with a checkpoint, or None. The ranks share the work of hashing."""
    found = problem_of(path, part=world.rank, parts=world.size, progress=progress)
    return next((problem for problem in gather(found) if problem is not None), None)


def problem_of(path: Path, *, part: int = 0, parts: int = 1, progress: Progress = lambda: None) -> str | None:
    """What is wrong with a checkpoint, or None, by the `part`-th of every `parts` of its files."""
    try:
        text = (path / MANIFEST).read_text("utf-8")
        manifest = json.loads(text)
        del manifest["sha256"]
        entries = sorted(manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if text != _sealed(manifest):
        return f"{MANIFEST} has changed since it was written"
    checked = (_check(path, name, entry, progress) for name, entry in entries[part::parts])
    return next(filter(None, checked), None)


def read(path: Path) -> dict[str, Any]:
    """The manifest of a verified checkpoint."""
    return json.loads((path / MANIFEST).read_text("utf-8"))


def framework_of(manifest: dict[str, Any]) -> str:
    """The framework whose checkpoint it is of."""
    return manifest.get("framework", "deepspeed")  # before there were others, none was named


def _sealed(manifest: dict[str, object]) -> str:
    """The manifest's text, its own hash last."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)


def _check(path: Path, name: str, entry: dict[str, str | int], progress: Progress) -> str | None:
    file = path / name
    if not _is_inside(path, name):
        return f"{MANIFEST} names {name!r}, which is no file inside the checkpoint"
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != entry["size"]:
        return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
    try:
        changed = hash_file(file, progress=progress) != entry["sha256"]
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return f"{name} has changed since it was written (sha256)" if changed else None


def _is_inside(path: Path, name: str) -> bool:
    """Whether a name is a relative path, written the one way, to somewhere below `path`, links followed."""
    parts = PurePosixPath(name)
    if str(parts) != name or not parts.name or parts.is_absolute() or ".." in parts.parts or "\\" in name:
        return False
    try:
        return (path / name).resolve().is_relative_to(path.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name that no file can have
        return False


def free_name(path: Path, *, suffix: str) -> Path:
    """A checkpoint's name with a suffix that tells why it is none any more; numbered where there is one already."""
    target, count = path.with_name(path.name + suffix), 1
    while target.exists():
        target, count = path.with_name(f"{path.name}.{count}{suffix}"), count + 1
    return target


def _set_aside(path: Path, problem: str) -> None:
    target = free_name(path, suffix=".damaged")
    path.rename(target)
    log.warning("checkpoint %s is damaged: %s; it is now %s, the one before it is taken", path, problem, target.name)
