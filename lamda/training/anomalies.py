"""Whether the losses are still those of a healthy run.

A step whose loss or gradient is not finite has been refused on all ranks by then; too many in a row,
or a finite loss far above the ones before it, is a reason to go back to the last checkpoint.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from lamda.config.schema import FEWEST_LOSSES, TrainConfig

NORMAL = 1.4826
"""Standard deviation of a normal distribution / its median absolute deviation."""


class Trouble(NamedTuple):
    """A reason to go back; a fatal one also ends a run that cannot. steps: the bad ones in a row, up to the newest."""

    text: str
    is_fatal: bool
    steps: int


class Health:
    """Judges steps one after the other.

    history: (loss, refused steps so far) of the steps before, so that a restart judges as the unbroken run
    would have.
    """

    def __init__(self, train: TrainConfig, history: Iterable[tuple[float | None, int]] = ()) -> None:
        self._train = train
        self._losses: deque[float] = deque(maxlen=train.spike_window)
        self._bad_steps = 0
        before = 0
        for loss, refusals in history:
            self._take(loss, refused=refusals > before)
            before = refusals

    @property
    def last_was_refused(self) -> bool:
        """Whether the newest step was."""
        return self._bad_steps > 0

    def judge(self, loss: float, *, refused: bool) -> Trouble | None:
        """Take a finished step's loss; what is wrong where the run ought to go back."""
        score = self._score(loss)
        self._take(loss, refused=refused)
        if self._bad_steps >= self._train.max_skipped_steps:
            text = f"{self._bad_steps} steps in a row had a loss or gradient that is not finite"
            return Trouble(text, is_fatal=True, steps=self._bad_steps)
        threshold = self._train.spike_threshold
        if threshold is not None and score > threshold:
            text = f"the loss {loss:.4f} is a spike, {score:.1f} robust deviations above the steps before it"
            return Trouble(text, is_fatal=False, steps=1)
        return None

    def _take(self, loss: float | None, *, refused: bool) -> None:
        self._bad_steps = self._bad_steps + 1 if refused else 0
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)

    def _score(self, loss: float) -> float:
        """Distance above the window's median in robust standard deviations."""
        if len(self._losses) < FEWEST_LOSSES or not math.isfinite(loss):
            return 0.0
        middle = median(self._losses)
        spread = NORMAL * median(abs(other - middle) for other in self._losses)
        return (loss - middle) / spread if spread else math.inf if loss > middle else 0.0
