"""A checkpoint is complete or it is not there.

It is written under a temporary name; every file, in subfolders too, is synced and hashed into manifest.json, which ends
with its own hash; the folder is renamed, and LATEST is replaced. Loading verifies; a damaged
checkpoint is set aside.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lamda.best_effort import BestEffort
from lamda.config.errors import UserError
from lamda.distributed import World, agree, gather, on_main
from lamda.durable import Progress, hash_file, replace_file, sync_file, sync_folder, write_file
from lamda.storage.manifest import (
    DAMAGED,
    MANIFEST,
    STATE,
    complete,
    framework_of,
    is_checkpoint_name,
    name_of,
    named,
    problem_of,
    read,
    sealed,
    set_aside,
    step_in,
    step_of,
)
from lamda.storage.reading import UnreadableError
from lamda.storage.state import RunState

__all__ = [
    "MANIFEST", "STATE", "UnreadableError", "commit", "complete", "find_valid", "framework_of", "free_name",
    "make_fresh", "name_of", "named", "problem_of", "read", "read_state", "require_none", "seal", "sealed",
    "set_aside", "step_in", "step_of", "sweep", "sync_and_describe", "verify",
]  # fmt: skip

log = logging.getLogger(__name__)


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
    write_file(folder / MANIFEST, sealed(content))
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
        if is_checkpoint_name(re.sub(r"^\.|\.tmp$", "", leftover.name)):
            shutil.rmtree(leftover, ignore_errors=True)


def sync_and_describe(file: Path, *, progress: Progress = lambda: None) -> dict[str, str | int]:
    """Bring a file to the disk; its entry in the manifest: size and sha256. progress: called as it goes on."""
    sync_file(file, progress=progress)
    return {"size": file.stat().st_size, "sha256": hash_file(file, progress=progress)}


def find_valid(folder: Path, *, world: World, progress: Progress = lambda: None) -> Path | None:
    """The newest checkpoint that passes its manifest; LATEST then names it, and damaged ones are set aside.

    Nothing is renamed where none is valid: the next start must see the same. Raises UserError there, and
    UnreadableError where one cannot be read now: a run never silently starts over. progress: called as it goes on.
    """
    names = on_main(world, lambda: [path.name for path in complete(folder)])
    damaged: list[tuple[Path, str]] = []
    for name in reversed(names):
        path = folder / name
        problem = verify(path, world=world, progress=progress)
        if problem is None:
            if damaged:
                on_main(world, partial(_pass_over, damaged, path))
            return path
        damaged.append((path, problem))
    if damaged:
        on_main(world, lambda: _refuse(folder, damaged))
    return None


def require_none(folder: Path, *, noted: int | None) -> None:
    """Raises UserError where a run's folder of checkpoints, which holds none, shows that it held some.

    noted: the step of a checkpoint that was committed here, by the run's own note.
    """
    if aside := [path for path in set_aside(folder) if path.suffix == DAMAGED]:
        _refuse(folder, [(aside[-1], "it was set aside by an earlier start")])
    where = "there is a link, and nothing where it leads" if folder.is_symlink() and not folder.exists() else None
    if (folder / "LATEST").exists():
        where = "there is a LATEST, and no checkpoint"
    elif noted is not None and where is None:
        where = f"checkpoint {name_of(noted)} was saved here, and none is there"
    if where is not None:
        raise UserError(
            f"{folder}: {where}; the run does not start over by itself. Bring the checkpoints back (a disk that is not "
            "mounted, a folder that was moved?), or choose another run.dir to start over"
        )


def verify(path: Path, *, world: World, progress: Progress = lambda: None) -> str | None:
    """What is damaged in a checkpoint, or None. The ranks share the work of hashing. Raises UserError on all ranks."""
    found = agree(world, lambda: problem_of(path, part=world.rank, parts=world.size, progress=progress))
    return next((problem for problem in gather(found) if problem is not None), None)


def read_state(path: Path) -> RunState:
    """The state in a verified checkpoint. Raises UserError where the manifest does not name it, or another step."""
    state = RunState.read(named(path, STATE))
    if state.step != (step := read(path).get("step")):
        raise UserError(f"{path / STATE}: is of step {state.step}, {MANIFEST} says {step}; take another checkpoint")
    return state


def _pass_over(damaged: Sequence[tuple[Path, str]], valid: Path) -> None:
    """Set damaged checkpoints aside, now that an older one is known to be valid."""
    try:
        for path, problem in damaged:
            target = free_name(path, suffix=DAMAGED)
            path.rename(target)
            log.warning(
                "checkpoint %s is damaged: %s; it is now %s, the one before it is taken", path, problem, target.name
            )
        replace_file(valid.parent / "LATEST", valid.name)
    except OSError as error:
        raise UserError(f"{valid.parent}: a damaged checkpoint cannot be set aside ({error.strerror})") from error


def free_name(path: Path, *, suffix: str) -> Path:
    """A checkpoint's name with a suffix that tells why it is none any more; numbered where there is one already."""
    target, count = path.with_name(path.name + suffix), 1
    while target.exists():
        target, count = path.with_name(f"{path.name}.{count}{suffix}"), count + 1
    return target


def _refuse(folder: Path, damaged: Sequence[tuple[Path, str]]) -> None:
    found = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
    raise UserError(
        f"{folder}: every checkpoint is damaged ({found}), and the run does not start over by itself; bring a good one "
        "back, or start again in another run.dir"
    )
