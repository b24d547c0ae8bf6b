"""Commit checkpoints atomically, and find the newest valid one.

A checkpoint is written under a temporary name; every file, also in subfolders, is synced and hashed into manifest.json,
which ends with its own hash; then the folder is renamed and LATEST is replaced. Loading verifies the hashes and sets
damaged checkpoints aside.
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
    complete,
    is_checkpoint_name,
    name_of,
    problem_of,
    read,
    sealed,
    set_aside,
    step_of,
)

log = logging.getLogger(__name__)


def make_fresh(temporary: Path) -> None:
    """Create an empty folder at `temporary`, without leftovers of a crash. Raises OSError."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def commit(
    temporary: Path,
    final: Path,
    manifest: dict[str, object],
    *,
    keep: int,
    keep_every: int | None = None,
    is_used: Callable[[Path], bool] = lambda path: False,
    on_point: Callable[[str], None] = lambda point: None,
) -> None:
    """Turn the written files into the newest checkpoint, then delete old ones.

    Keeps the `keep` newest, those at multiples of `keep_every`, and one that `is_used`. on_point: called with the name
    of each point in between (`lamda.training.fault_injection`). Raises OSError.
    """
    seal(temporary, manifest)
    on_point("commit.manifest")
    temporary.rename(final)
    sync_folder(final.parent)
    on_point("commit.renamed")
    replace_file(final.parent / "LATEST", final.name)
    on_point("commit.latest")
    with BestEffort(f"{final.parent}: an old checkpoint cannot be deleted"):
        for old in complete(final.parent)[:-keep]:
            if (keep_every is None or step_of(old) % keep_every) and not is_used(old):
                remove(old)
    on_point("commit.pruned")


def seal(folder: Path, content: dict[str, object]) -> None:
    """Write the manifest, which ends with its own hash, and sync it and the folders. Raises OSError."""
    write_file(folder / MANIFEST, sealed(content))
    for each in (*filter(Path.is_dir, folder.rglob("*")), folder):
        sync_folder(each)


def add_file(checkpoint: Path, name: str, text: str) -> None:
    """Add a small file to a complete checkpoint, or replace one that its manifest lists. Raises OSError.

    In between, the manifest does not match an older file of this name.
    """
    replace_file(checkpoint / name, text)
    if (checkpoint / MANIFEST).is_file():
        content = read(checkpoint)
        del content["sha256"]
        content["files"][name] = sync_and_describe(checkpoint / name)
        replace_file(checkpoint / MANIFEST, sealed(content))


def remove(path: Path) -> None:
    """Delete a checkpoint, after renaming it so that a partly deleted one does not count as one."""
    doomed = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete leftovers of checkpoints that were being written or deleted during a crash."""
    for leftover in folder.glob(".step-*.tmp"):
        if is_checkpoint_name(re.sub(r"^\.|\.tmp$", "", leftover.name)):
            shutil.rmtree(leftover, ignore_errors=True)


def sync_and_describe(file: Path, *, progress: Progress = lambda: None) -> dict[str, str | int]:
    """Sync a file; returns its manifest entry, size and sha256. progress: called repeatedly."""
    sync_file(file, progress=progress)
    return {"size": file.stat().st_size, "sha256": hash_file(file, progress=progress)}


def find_valid(folder: Path, *, world: World, progress: Progress = lambda: None) -> Path | None:
    """The newest valid checkpoint; sets newer damaged ones aside and updates LATEST.

    If none is valid nothing is renamed, so that the next start sees the same. A run never silently starts over: raises
    UserError if all checkpoints are damaged, and UnreadableError if one cannot be read now. progress: called
    repeatedly.
    """
    names = on_main(world, lambda: [path.name for path in complete(folder)])
    damaged: list[tuple[Path, str]] = []
    for name in reversed(names):
        path = folder / name
        problem = verify(path, world=world, progress=progress)
        if problem is None:
            if damaged:
                on_main(world, partial(_set_aside, damaged, path))
            return path
        damaged.append((path, problem))
    if damaged:
        on_main(world, lambda: _raise_all_damaged(folder, damaged))
    return None


def require_none(folder: Path, *, noted: int | None) -> None:
    """Raises UserError if an empty folder had checkpoints. noted: the step of the last one that the run recorded."""
    if aside := [path for path in set_aside(folder) if path.suffix == DAMAGED]:
        _raise_all_damaged(folder, [(aside[-1], "it was set aside by an earlier start")])
    problem = "is a link to a missing folder" if folder.is_symlink() and not folder.exists() else None
    if (folder / "LATEST").exists():
        problem = "has LATEST but no checkpoint"
    elif noted is not None and problem is None:
        problem = f"has no checkpoint, but {name_of(noted)} was saved here"
    if problem is not None:
        raise UserError(
            f"{folder}: {problem}. The run does not start over by itself: restore the checkpoints (is a disk not "
            "mounted, was a folder moved?), or choose another run.dir to start over"
        )


def verify(path: Path, *, world: World, progress: Progress = lambda: None) -> str | None:
    """The damage of a checkpoint, or None. The ranks share the hashing. Raises UserError on all ranks."""
    local = agree(world, lambda: problem_of(path, part=world.rank, parts=world.world_size, progress=progress))
    return next((problem for problem in gather(local) if problem is not None), None)


def _set_aside(damaged: Sequence[tuple[Path, str]], valid: Path) -> None:
    """Set damaged checkpoints aside and point LATEST to a valid one."""
    try:
        for path, problem in damaged:
            target = free_name(path, suffix=DAMAGED)
            path.rename(target)
            log.warning(
                "checkpoint %s is damaged: %s; renamed to %s, trying the one before it", path, problem, target.name
            )
        replace_file(valid.parent / "LATEST", valid.name)
    except OSError as error:
        raise UserError(f"{valid.parent}: a damaged checkpoint cannot be set aside ({error.strerror})") from error


def free_name(path: Path, *, suffix: str) -> Path:
    """A free name for a checkpoint set aside: with the suffix, and numbered if the name exists."""
    target, count = path.with_name(path.name + suffix), 1
    while target.exists():
        target, count = path.with_name(f"{path.name}.{count}{suffix}"), count + 1
    return target


def _raise_all_damaged(folder: Path, damaged: Sequence[tuple[Path, str]]) -> None:
    details = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
    raise UserError(
        f"{folder}: every checkpoint is damaged ({details}), and the run does not start over by itself; restore a "
        "valid one, or start over in another run.dir"
    )
