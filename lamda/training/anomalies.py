"""Loss anomalies, and the checkpoint that a run rolls back to after one.

All ranks skip a step whose loss or gradient is not finite. Too many of them in a row, or a finite loss far above the
previous ones, is a reason to roll back.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from lamda.config.errors import RunError, UserError
from lamda.config.schema import FEWEST_LOSSES, TrainConfig
from lamda.distributed import World, on_main
from lamda.durable import replace_file
from lamda.storage import commit, manifest
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState

log = logging.getLogger(__name__)

NORMAL = 1.4826  # standard deviation of a normal distribution / its median absolute deviation


class Anomaly(NamedTuple):
    """A reason to roll back. must_roll_back: a run that cannot roll back fails. steps: number of bad ones in a row."""

    text: str
    must_roll_back: bool
    steps: int


class AnomalyDetector:
    """Checks the losses of consecutive steps. history: (loss, number of skipped steps so far) of the previous steps."""

    def __init__(self, train: TrainConfig, history: Iterable[tuple[float | None, int]] = ()) -> None:
        self._train = train
        self._losses: deque[float] = deque(maxlen=train.spike_window)
        self._bad_steps = 0
        before = 0
        for loss, skips in history:
            self._add(loss, skipped=skips > before)
            before = skips

    @property
    def last_was_skipped(self) -> bool:
        """Whether the newest step was skipped."""
        return self._bad_steps > 0

    def check(self, loss: float, *, skipped: bool) -> Anomaly | None:
        """Add a finished step; returns the anomaly if the run should roll back."""
        score = self._score(loss)
        self._add(loss, skipped=skipped)
        if self._bad_steps >= self._train.max_skipped_steps:
            text = f"{self._bad_steps} steps in a row had a loss or gradient that is not finite"
            return Anomaly(text, must_roll_back=True, steps=self._bad_steps)
        threshold = self._train.spike_threshold
        if threshold is not None and score > threshold:
            text = f"the loss {loss:.4f} is a spike, {score:.1f} robust deviations above the steps before it"
            return Anomaly(text, must_roll_back=False, steps=1)
        return None

    def _add(self, loss: float | None, *, skipped: bool) -> None:
        self._bad_steps = self._bad_steps + 1 if skipped else 0
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)

    def _score(self, loss: float) -> float:
        """Distance above the window's median in robust standard deviations."""
        if len(self._losses) < FEWEST_LOSSES or not math.isfinite(loss):
            return 0.0
        middle = median(self._losses)
        spread = NORMAL * median(abs(other - middle) for other in self._losses)
        return (loss - middle) / spread if spread else math.inf if loss > middle else 0.0


class RollbackError(Exception):
    """The run has to roll back. step: the one with the anomaly. first: the first bad step in a row."""

    def __init__(self, reason: str, *, step: int, first: int) -> None:
        super().__init__(reason)
        self.reason, self.step, self.first = reason, step, first


def find_sound(directory: RunDirectory, *, first: int, world: World) -> Path:
    """The newest valid checkpoint that may be sound; where there is none, the oldest valid one.

    first: the first bad step. Its loss is that of the weights after the previous step, so a checkpoint of the previous
    step holds the bad weights too; an older one was followed by a good loss. A run does not roll back to the same
    checkpoint twice, because skipping samples after it did not help.

    Every rank calls it. Raises RunError where no checkpoint is valid.
    """
    for name in on_main(world, lambda: _by_soundness(directory, first=first)):
        if commit.verify(directory.checkpoints / name, world=world) is None:
            return directory.checkpoints / name
    raise RunError(f"{directory.checkpoints}: the run has to roll back, and no checkpoint is valid")


def set_aside_rolled_back(directory: RunDirectory) -> None:
    """Rename the checkpoints that the run rolled back from to `.spoilt`; LATEST then names the newest remaining one.

    These have trained on samples of a range that the run now skips. A start calls it too, in case the run was killed
    during a rollback.
    """
    if not (windows := directory.skipped()):
        return
    rolled_back = [
        path
        for path, state in _states(directory)
        if any(first < state.consumed and (first, last) not in state.skipped for first, last in windows)
    ]
    for path in rolled_back:
        target = commit.free_name(path, suffix=manifest.ROLLED_BACK)
        path.rename(target)
        log.warning("checkpoint %s was trained on samples that the run skips; renamed to %s", path, target.name)
    if rolled_back and (remaining := manifest.complete(directory.checkpoints)):
        replace_file(directory.checkpoints / "LATEST", remaining[-1].name)


def _by_soundness(directory: RunDirectory, *, first: int) -> list[str]:
    """Names of checkpoints, the best one to roll back to first."""
    tried = {start for start, _ in directory.skipped()}
    sound: list[str] = []
    others: list[str] = []
    for path, state in _states(directory):
        is_sound = state.step <= first - 2 and state.consumed not in tried
        (sound if is_sound else others).append(path.name)
    return [*reversed(sound), *others]


def _states(directory: RunDirectory) -> list[tuple[Path, RunState]]:
    """The complete checkpoints that hold a state of this version, oldest first. Raises UnreadableError."""
    states = []
    for path in manifest.complete(directory.checkpoints):
        try:
            states.append((path, manifest.read_state(path)))
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            log.warning("checkpoint %s: its run_state.json cannot be read (%s)", path, error)
    return states
