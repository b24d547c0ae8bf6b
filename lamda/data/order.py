"""The global order: which row of which lane is sample g. A closed form, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

SLOTS = 16384


@dataclass(frozen=True)
class Order:
    """A table of slots, repeated for ever: slot `g % len(table)` names the lane of sample g."""

    table: NDArray[np.int32]
    lanes: int

    @cached_property
    def _slots_of(self) -> NDArray[np.int64]:
        return np.bincount(self.table, minlength=self.lanes)

    @cached_property
    def _rank_in_table(self) -> NDArray[np.int64]:
        rank = np.empty(len(self.table), np.int64)
        rank[np.argsort(self.table, kind="stable")] = np.concatenate([np.arange(n) for n in self._slots_of])
        return rank

    def rows(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Lane and row of each sample; a lane's rows are numbered as they come, from 0."""
        turn, slot = np.divmod(samples, len(self.table))
        lane = self.table[slot]
        return lane, turn * self._slots_of[lane] + self._rank_in_table[slot]

    def rows_before(self, sample: int) -> NDArray[np.int64]:
        """For each lane, how many of its rows come before sample `sample`."""
        turns, slots = divmod(sample, len(self.table))
        return turns * self._slots_of + np.bincount(self.table[:slots], minlength=self.lanes)


def make_order(weights: Sequence[float]) -> Order:
    """Slots in proportion to the lanes' weights (largest remainders), each lane's spread evenly.

    Equal weights are a plain round robin. Every lane has at least one slot.
    """
    lanes = len(weights)
    if len(set(weights)) == 1:
        return Order(np.arange(lanes, dtype=np.int32), lanes)
    exact = np.asarray(weights, np.float64) / np.sum(weights) * SLOTS
    slots = np.maximum(1, np.floor(exact).astype(np.int64))
    while (missing := SLOTS - int(slots.sum())) != 0:
        lane = np.argmax(exact - slots) if missing > 0 else np.argmin(np.where(slots > 1, exact - slots, np.inf))
        slots[lane] += np.sign(missing)
    owner = np.repeat(np.arange(lanes, dtype=np.int32), slots)
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in slots])
    return Order(owner[np.lexsort((owner, place))], lanes)


def next_samples(consumed: int, count: int, skipped: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], int]:
    """The next `count` samples after `consumed`, jumping over the windows [from, to), and the new `consumed`."""
    taken: list[NDArray[np.int64]] = []
    windows = sorted(window for window in skipped if window[1] > consumed)
    while count:
        if windows and windows[0][0] <= consumed:
            consumed = max(consumed, windows.pop(0)[1])
            continue
        stop = min(consumed + count, windows[0][0]) if windows else consumed + count
        taken.append(np.arange(consumed, stop))
        count -= stop - consumed
        consumed = stop
    return np.concatenate(taken), consumed
