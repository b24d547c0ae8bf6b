"""The global order: which row of which lane is sample g. A closed form, the same on any number of ranks.

A mixture is nothing more than the table of slots: weights count tokens, exactly in every round of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

SLOTS = 16384


@dataclass(frozen=True)
class Table:
    """A table of slots, repeated for ever: slot `g % len(slots)` names the lane of sample g."""

    slots: NDArray[np.int32]
    lanes: int

    @cached_property
    def _count(self) -> NDArray[np.int64]:
        return np.bincount(self.slots, minlength=self.lanes)

    @cached_property
    def _rank(self) -> NDArray[np.int64]:
        """For each slot, how many slots of its lane come before it."""
        rank = np.empty(len(self.slots), np.int64)
        rank[np.argsort(self.slots, kind="stable")] = np.concatenate([np.arange(n) for n in self._count])
        return rank

    def rows(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Lane and row of each sample, both counted from this table's beginning."""
        turn, slot = np.divmod(samples, len(self.slots))
        lane = self.slots[slot]
        return lane, turn * self._count[lane] + self._rank[slot]

    def rows_before(self, sample: int) -> NDArray[np.int64]:
        """For each lane, how many of its rows come before sample `sample`."""
        turns, slots = divmod(sample, len(self.slots))
        return turns * self._count + np.bincount(self.slots[:slots], minlength=self.lanes)


@dataclass(frozen=True)
class Order:
    """Tables one after the other: `starts[i]` is the first sample of `tables[i]`; the first is 0.

    A lane goes on where the table before left it: the rows before a change are counted.
    """

    tables: tuple[Table, ...]
    starts: tuple[int, ...] = (0,)

    @cached_property
    def _rows_at_start(self) -> list[NDArray[np.int64]]:
        rows = [np.zeros(self.tables[0].lanes, np.int64)]
        for table, start, end in zip(self.tables, self.starts, self.starts[1:], strict=False):
            rows.append(rows[-1] + table.rows_before(end - start))
        return rows

    def rows(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Lane and row of each sample; a lane's rows are numbered as they come, from 0."""
        stages = np.searchsorted(self.starts, samples, side="right") - 1
        lanes, rows = np.empty(len(samples), np.int32), np.empty(len(samples), np.int64)
        for stage in np.unique(stages):
            own = stages == stage
            lanes[own], within = self.tables[stage].rows(samples[own] - self.starts[stage])
            rows[own] = self._rows_at_start[stage][lanes[own]] + within
        return lanes, rows

    def rows_before(self, sample: int) -> NDArray[np.int64]:
        """For each lane, how many of its rows come before sample `sample`."""
        stage = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self._rows_at_start[stage] + self.tables[stage].rows_before(sample - self.starts[stage])


def make_table(sources: Sequence[tuple[float, Sequence[float]]]) -> Table:
    """The table for (weight, sizes of its lanes) of each source; lanes are numbered through.

    Slots go to the sources by weight and then to each one's lanes by size (largest remainders, at least
    one a lane), and a lane's slots are spread evenly. Equal lanes of one source take plain turns.
    """
    sizes = [lanes for _, lanes in sources]
    if len(sources) == 1 and len(set(sizes[0])) == 1:
        return Table(np.arange(len(sizes[0]), dtype=np.int32), len(sizes[0]))
    of_sources = _apportion([weight for weight, _ in sources], SLOTS, at_least=[len(lanes) for lanes in sizes])
    slots = np.concatenate(
        [_apportion(lanes, total, at_least=[1] * len(lanes)) for lanes, total in zip(sizes, of_sources, strict=True)]
    )
    owner = np.repeat(np.arange(len(slots), dtype=np.int32), slots)
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in slots])
    return Table(owner[np.lexsort((owner, place))], len(slots))


def _apportion(shares: Sequence[float], total: int, *, at_least: Sequence[int]) -> NDArray[np.int64]:
    """Whole numbers in proportion to `shares` that add up to `total`."""
    exact = np.asarray(shares, np.float64) / np.sum(shares) * total
    parts = np.maximum(at_least, np.floor(exact).astype(np.int64))
    while (missing := total - int(parts.sum())) != 0:
        spare = np.where(parts > at_least, exact - parts, np.inf)
        parts[np.argmax(exact - parts) if missing > 0 else np.argmin(spare)] += np.sign(missing)
    return parts


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
