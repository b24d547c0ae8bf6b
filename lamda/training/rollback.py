"""Going back: to which checkpoint, and what becomes of the newer ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lamda.config.errors import RunError, UserError
from lamda.distributed import World, on_main
from lamda.durable import replace_file
from lamda.storage import commit
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState

log = logging.getLogger(__name__)

Window = tuple[int, int]
"""Samples [from, to) of the order."""


class Setback(NamedTuple):
    """Why a run rolls back. step: the one whose figures say so. first: the first of the bad ones in a row."""

    reason: str
    step: int
    first: int


def find_sound(directory: RunDirectory, *, first: int, world: World) -> Path:
    """The newest valid checkpoint that nothing speaks against; where there is none, the oldest valid one.

    first: the first step whose figures were bad. Its loss is that of the weights after the step before, so a
    checkpoint of that step has them too: only an older one has had a good loss since. And a run does not roll back
    to the same checkpoint twice: other samples did not help.

    Every rank calls it. Raises RunError where no checkpoint is valid.
    """
    for name in on_main(world, lambda: _by_soundness(directory, first=first)):
        if commit.verify(directory.checkpoints / name, world=world) is None:
            return directory.checkpoints / name
    raise RunError(f"{directory.checkpoints}: the run has to roll back, and no checkpoint is valid")


def set_spoilt_aside(directory: RunDirectory) -> None:
    """Rename the checkpoints that the run rolled back from to `.spoilt`; LATEST then names the newest one left.

    They are those that have seen samples of a window that the run skips. A start calls it too, for a run that was
    killed in between.
    """
    if not (windows := directory.skipped()):
        return
    spoilt = [path for path, state in _states(directory) if _is_spoilt(state, windows)]
    for path in spoilt:
        target = commit.free_name(path, suffix=".spoilt")
        path.rename(target)
        log.warning("checkpoint %s has seen samples that the run skips; it is now %s", path, target.name)
    if spoilt and (left := commit.complete(directory.checkpoints)):
        replace_file(directory.checkpoints / "LATEST", left[-1].name)


def _is_spoilt(state: RunState, windows: Iterable[Window]) -> bool:
    return any(first < state.consumed and (first, last) not in state.skipped for first, last in windows)


def _by_soundness(directory: RunDirectory, *, first: int) -> list[str]:
    """Names of checkpoints, the best one to roll back to first."""
    tried = {start for start, _ in directory.skipped()}
    sound, others = [], []
    for path, state in _states(directory):
        is_sound = state.step <= first - 2 and state.consumed not in tried
        (sound if is_sound else others).append(path.name)
    return [*reversed(sound), *others]


def _states(directory: RunDirectory) -> list[tuple[Path, RunState]]:
    """The complete checkpoints that hold a state of this version, oldest first. Raises UnreadableError."""
    found = []
    for path in commit.complete(directory.checkpoints):
        try:
            found.append((path, commit.read_state(path)))
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            log.warning("checkpoint %s: its run_state.json cannot be read (%s)", path, error)
    return found
