"""Windows: the shuffle buffer of a source. They give the order in which its rows are trained on.

An epoch of a source is divided into windows. In each window, every lane advances by the same fraction of its own
length, so all lanes finish the epoch together, whatever their sizes and compression. The rows that the lanes produce in
a window are shuffled: `places` interleaves the lanes evenly, by a scrambled bit reversal.

The number of rows of a lane is known only after reading it. The ranks exchange these numbers, and the cursor after each
lane's rows (`LaneProgress`); everything else follows from them deterministically, so all ranks know the same order. A
`SourceOrder` is saved in checkpoints, so that a resumed run continues in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamda.data.blocks import LaneProgress, Part
from lamda.data.hashing import mixed, permutation, splitmix64
from lamda.data.lanes import BYTES_PER_TOKEN, Cursor
from lamda.data.order import SLOTS

ONE = 1 << 32
"""A whole epoch: `since` and `until` of a window are fractions of it."""

FIRST_TOKENS = 1 << 17
"""Tokens of the first windows of all sources together, which are encoded before the first step."""

GROWTH = (5, 4)
"""Growth per window. No step waits for a growing window if encoding is twice as fast as training."""

MEASURED_TOKENS = 1 << 21
"""Tokens of the last windows of a source, from which the next one is planned. One small window is not enough: a lane
often begins with a gap, since documents belong to the lane in which they begin."""


@dataclass(frozen=True)
class Window:
    """A window of a source.

    number: counted over the run. base, epoch_base: rows of the source before the window and before its epoch. since,
    until: interval of the epoch, as fractions of ONE. starts, afters: cursors of each lane. counts: rows of each lane;
    without afters and counts, the window is a plan, whose lanes have not been read.
    """

    number: int
    epoch: int
    base: int
    epoch_base: int
    since: int
    until: int
    starts: tuple[Cursor, ...]
    counts: tuple[int, ...] = ()
    afters: tuple[Cursor, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all lanes."""
        return sum(self.counts)

    @property
    def is_last(self) -> bool:
        """Whether it is the last window of its epoch."""
        return self.until == ONE

    @property
    def ends_an_empty_epoch(self) -> bool:
        """Whether it ends an epoch without any row."""
        return self.is_last and self.base + self.rows == self.epoch_base

    def part(self, lane: int, *, axis_length: int) -> Part:
        """The part of a lane in this window."""
        part = Part(self.epoch, self.starts[lane], None if self.is_last else self.until * axis_length >> 32)
        if not self.counts:
            return part
        return part._replace(stop=None if self.is_last else self.afters[lane], rows=self.counts[lane])

    def epoch_at(self, row: int) -> float:
        """Epochs of the source completed at its row `row`, which is in this window, as a fraction."""
        fraction = (row - self.base) / max(1, self.rows)
        return self.epoch + (self.since + fraction * (self.until - self.since)) / ONE

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Window:
        """The inverse of `dataclasses.asdict`. Raises TypeError, ValueError or KeyError for other values."""
        lanes = {"counts": _count, "starts": _cursor, "afters": _cursor}
        of_lanes: dict[str, Any] = {name: tuple(map(of, values[name])) for name, of in lanes.items()}
        if len({len(each) for each in of_lanes.values()}) > 1:
            raise ValueError("a window with different numbers of counts and cursors")
        of_window = {name: _count(value) for name, value in values.items() if name not in lanes}
        return cls(**{**of_window, **of_lanes})


@dataclass(frozen=True)
class Shape:
    """The size of the windows of a source.

    slots: of the source, of SLOTS. axis_lengths: of its lanes. sequence_length: L, targets per row. full: tokens of the
    windows of all sources together, at full size. is_epoch: one window holds a whole epoch.
    """

    slots: int
    axis_lengths: tuple[int, ...]
    sequence_length: int
    full: int
    is_epoch: bool = False

    def tokens(self, number: int) -> int:
        """Tokens of window `number`, at least one row per lane."""
        tokens, full = (tokens * self.slots // SLOTS for tokens in (FIRST_TOKENS, max(self.full, FIRST_TOKENS)))
        while number and tokens < full:
            tokens, number = tokens * GROWTH[0] // GROWTH[1] + 1, number - 1
        return max(min(tokens, full), self.sequence_length * len(self.axis_lengths))


@dataclass(frozen=True)
class SourceOrder:
    """The known windows of a source that are still needed, oldest first.

    measured: axis bytes and tokens of the last windows, from which the next one is planned.
    """

    windows: tuple[Window, ...] = ()
    measured: tuple[int, int] = (BYTES_PER_TOKEN, 1)

    @property
    def end(self) -> int:
        """Rows of the source up to the end of the last known window."""
        return self.windows[-1].base + self.windows[-1].rows if self.windows else 0

    def at(self, row: int) -> Window:
        """The window of a row of the source. Raises KeyError if it is not known."""
        for window in self.windows:
            if window.base <= row < window.base + window.rows:
                return window
        raise KeyError(row)

    def epochs_at(self, row: int) -> float:
        """Epochs of the source completed at its row `row`, as far as its windows are known."""
        for window in self.windows:
            if row <= window.base + window.rows:
                return window.epoch_at(max(row, window.base))
        return self.windows[-1].epoch_at(self.end) if self.windows else 0.0

    def plan(self, shape: Shape) -> Window:
        """The window after the last known one, before its lanes are read."""
        last, base = self.windows[-1] if self.windows else None, self.end
        number = last.number + 1 if last else 0
        if last is None or last.is_last:
            until, starts = self._until(number, 0, shape), (Cursor(),) * len(shape.axis_lengths)
            return Window(number, last.epoch + 1 if last else 0, base, base, 0, until, starts)
        until = self._until(number, last.until, shape)
        return Window(number, last.epoch, base, last.epoch_base, last.until, until, last.afters)

    def _until(self, number: int, since: int, shape: Shape) -> int:
        """The end of a window. The last one of an epoch may be up to 1.5 times its planned size."""
        total, (bytes_, tokens) = max(1, sum(shape.axis_lengths)), self.measured
        step = ONE if shape.is_epoch else max(1, shape.tokens(number) * bytes_ * ONE // (tokens * total))
        return ONE if since + step + step // 2 >= ONE else since + step

    def add(self, plan: Window, progress: Sequence[LaneProgress], shape: Shape) -> SourceOrder:
        """This order with the planned window, from the progress of each lane."""
        counts, afters = tuple(each.rows for each in progress), tuple(each.after for each in progress)
        window = replace(plan, counts=counts, afters=afters)
        bytes_ = self.measured[0] + ((plan.until - plan.since) * sum(shape.axis_lengths) >> 32)
        tokens = self.measured[1] + sum(each.tokens for each in progress)
        if tokens > MEASURED_TOKENS:
            bytes_, tokens = max(1, bytes_ * MEASURED_TOKENS // tokens), MEASURED_TOKENS
        return SourceOrder((*self.windows, window), (bytes_, tokens))

    def without(self, row: int) -> SourceOrder:
        """Only the windows that hold row `row` or later ones, and the last known window."""
        kept = [window for window in self.windows[:-1] if window.base + window.rows > row]
        return replace(self, windows=(*kept, *self.windows[-1:]))

    def without_digests(self) -> SourceOrder:
        """The same without checks that the documents at the cursors are unchanged."""

        def plain(cursors: Sequence[Cursor]) -> tuple[Cursor, ...]:
            return tuple(cursor._replace(digest=None) for cursor in cursors)

        windows = (replace(each, starts=plain(each.starts), afters=plain(each.afters)) for each in self.windows)
        return replace(self, windows=tuple(windows))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SourceOrder:
        """The inverse of `dataclasses.asdict`. Raises TypeError, ValueError or KeyError for other values."""
        bytes_, tokens = values["measured"]
        if not _count(tokens):
            raise ValueError("an order without measured tokens")
        return cls(tuple(map(Window.from_json, values["windows"])), (_count(bytes_), tokens))


def _cursor(values: Any) -> Cursor:
    """A cursor from its stored fields. Raises TypeError or ValueError."""
    *numbers, digest = values
    if not isinstance(digest, str | None) or len(values) != len(Cursor._fields):
        raise ValueError(f"{values!r} is not a cursor")
    content: list[Any] = [*map(_count, numbers), digest]
    return Cursor(*content)


def _count(value: Any) -> int:
    """A stored count that fits into int64. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a count")
    return value


def places(window: Window, *, seed: int, source: int, in_order: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lane and row of each position in a window, [rows] each.

    The rows of each lane are shuffled, and positions are spread over the lanes by a bit reversal with Owen scrambling
    (1995): of any m consecutive positions, about one falls into each m-th of the rows. So batches of every size
    resemble the corpus, and the rows of a step, sorted by lane, come from nearly the same lanes in every step.
    """
    counts = np.array(window.counts, np.int64)
    lane = np.repeat(np.arange(len(counts)), counts)
    row = np.arange(len(lane)) - np.repeat(np.cumsum(counts) - counts, counts)
    if in_order or not len(lane):
        return lane, row
    key = (seed, source, window.number)
    row = row[np.lexsort((np.argsort(permutation(len(lane), *key)), lane))]
    place = spread(len(lane), *key)
    return lane[place], row[place]


def spread(length: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(length), a function of `key`, in which every interval is spread over the whole range."""
    bits = max(1, (length - 1).bit_length())
    index = np.arange(1 << bits, dtype=np.uint64)
    reversed_, found = np.zeros_like(index), np.zeros_like(index)
    one = np.uint64(1)
    for bit in range(bits):
        reversed_ |= (index >> np.uint64(bit) & one) << np.uint64(bits - 1 - bit)
    for bit in range(bits):  # Owen scrambling: flip each bit by a hash of the bits above it
        above = reversed_ >> np.uint64(bits - bit)
        flip = splitmix64(mixed(*key, bit) ^ above) & one
        found |= (reversed_ >> np.uint64(bits - 1 - bit) & one ^ flip) << np.uint64(bits - 1 - bit)
    return found[found < length].astype(np.int64)
