"""The mixture of sources: maps each sample of the run to a source and a row of that source.

A sample is identified by its global index g, which counts rows from the start of the run. A table of SLOTS slots,
repeated forever, assigns a source to each sample; the number of slots of a source is proportional to its weight. The
mapping is a closed form of g, so it is the same on any number of ranks and needs no state. Weights are shares of
tokens: exact over one pass through the table, and within one row of each source at every sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamda.config.errors import UserError

SLOTS = 16384


@dataclass(frozen=True)
class Table:
    """A table of slots, repeated forever: slot `g % len(slots)` is the source of sample g."""

    slots: NDArray[np.int32]
    sources: int

    @cached_property
    def count(self) -> NDArray[np.int64]:
        """Number of slots of each source."""
        return np.bincount(self.slots, minlength=self.sources)

    @cached_property
    def _rank(self) -> NDArray[np.int64]:
        """For each slot, the number of earlier slots of the same source."""
        rank = np.empty(len(self.slots), np.int64)
        rank[np.argsort(self.slots, kind="stable")] = np.concatenate([np.arange(n) for n in self.count])
        return rank

    def rows(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Source and row of each sample, counted from the start of this table."""
        turn, slot = np.divmod(samples, len(self.slots))
        source = self.slots[slot]
        return source, turn * self.count[source] + self._rank[slot]

    def rows_before(self, sample: int) -> NDArray[np.int64]:
        """For each source, the number of its rows before sample `sample`."""
        turns, slots = divmod(sample, len(self.slots))
        return turns * self.count + np.bincount(self.slots[:slots], minlength=self.sources)


@dataclass(frozen=True)
class DataStart:
    """Where a run begins to read its present text, which may be after other text.

    sample: the first one. rows: of each source, those that were used before. numbers: of each source in the hashes that
    shuffle its rows; a source keeps its number. Both are empty where the sources are new: no rows, and their index.
    """

    sample: int = 0
    rows: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()

    def number(self, source: int) -> int:
        """The number of a source."""
        return self.numbers[source] if self.numbers else source

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DataStart:
        """The inverse of `dataclasses.asdict`. Raises TypeError, ValueError or KeyError for other values."""
        return cls(int(values["sample"]), *(tuple(map(int, values[name])) for name in ("rows", "numbers")))


BEGINNING = DataStart()


@dataclass(frozen=True)
class Mixture:
    """A sequence of tables, one per stage of weights: `starts[i]` is the first sample of `tables[i]`.

    Row numbers of a source continue over changes of the table. before: rows of each source before the first sample.
    """

    tables: tuple[Table, ...]
    starts: tuple[int, ...] = (0,)
    before: tuple[int, ...] = ()

    def beginning_at(self, start: DataStart) -> Mixture:
        """The same mixture from another sample on."""
        return replace(self, starts=tuple(start.sample + each for each in self.starts), before=start.rows)

    @property
    def max_slots(self) -> NDArray[np.int64]:
        """For each source, its largest number of slots in any table."""
        return np.max([table.count for table in self.tables], axis=0)

    @cached_property
    def _rows_at_start(self) -> list[NDArray[np.int64]]:
        rows = [np.array(self.before or [0] * self.tables[0].sources, np.int64)]
        for table, start, end in zip(self.tables, self.starts, self.starts[1:], strict=False):
            rows.append(rows[-1] + table.rows_before(end - start))
        return rows

    def rows(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Source and row of each sample; the rows of a source are numbered in order, from 0."""
        stages = np.searchsorted(self.starts, samples, side="right") - 1
        sources, rows = np.empty(len(samples), np.int32), np.empty(len(samples), np.int64)
        for stage in np.unique(stages):
            is_here = stages == stage
            sources[is_here], within = self.tables[stage].rows(samples[is_here] - self.starts[stage])
            rows[is_here] = self._rows_at_start[stage][sources[is_here]] + within
        return sources, rows

    def stage(self, sample: int) -> int:
        """Index of the table of a sample."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def rows_before(self, sample: int) -> NDArray[np.int64]:
        """For each source, the number of its rows before sample `sample`."""
        stage = self.stage(sample)
        return self._rows_at_start[stage] + self.tables[stage].rows_before(sample - self.starts[stage])


def make_mixture(sources: Sequence[str], stages: Sequence[tuple[int, Mapping[str, float]]]) -> Mixture:
    """The mixture of the named sources. stages: first sample and weights of each. Raises UserError as `make_table`."""
    tables = tuple(make_table({name: weights[name] for name in sources}) for _, weights in stages)
    return Mixture(tables, tuple(start for start, _ in stages))


def make_table(weights: Mapping[str, float]) -> Table:
    """The table of weights: slot counts by largest remainder, positions by earliest deadline first.

    The k-th slot of a source is due when the source falls behind its weight, and its deadline is when the next slot
    would be due. So any interval of slots holds each source by its weight, within one slot. Ties are broken by the
    bit-reversed number of the source: a batch smaller than the number of sources then draws evenly from their whole
    range, and each rank reads its own sources. Raises UserError for a weight too small for one slot.
    """
    exact = np.array([*weights.values()], np.float64) / sum(weights.values()) * SLOTS
    count = np.floor(exact).astype(np.int64)
    count[np.argsort(count - exact, kind="stable")[: SLOTS - int(count.sum())]] += 1
    if lost := [name for name, slots in zip(weights, count, strict=True) if not slots]:
        raise UserError(
            f"the weight of source {', '.join(map(repr, lost))} is less than 1 in {SLOTS:,} rows: increase it, or "
            "remove the source"
        )
    bits = len(count).bit_length()
    turns = np.array(sorted(range(len(count)), key=lambda number: f"{number:0{bits}b}"[::-1]))
    wanted, given, slots = count[turns], np.zeros(len(count), np.int64), np.zeros(SLOTS, np.int32)
    for slot in range(SLOTS if len(count) > 1 else 0):
        is_due = given * SLOTS < wanted * (slot + 1)
        chosen = int(np.argmin(np.where(is_due, (given + 1) / wanted, np.inf)))
        slots[slot] = turns[chosen]
        given[chosen] += 1
    return Table(slots, len(count))


def next_samples(consumed: int, count: int, skipped: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], int]:
    """The next `count` samples from `consumed` on, without the skipped ranges [from, to), and the new `consumed`."""
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


def past_skipped(consumed: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The first sample from `consumed` on that is not skipped."""
    for start, stop in sorted(skipped):
        consumed = stop if start <= consumed < stop else consumed
    return consumed


def consumed_after(count: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The `consumed` of `next_samples` after the first `count` samples."""
    consumed = 0
    for start, stop in sorted(skipped):
        ahead = max(0, start - consumed)
        if count <= ahead:
            break
        count, consumed = count - ahead, max(consumed, stop)
    return consumed + count
