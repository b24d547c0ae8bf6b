"""Windows: the rows of a source in the order in which they are trained on.

In window t every lane of a source advances by the same fraction of its own length; the rows that this gives, of all
lanes, are the window, and they come spread over all lanes. So all lanes end with the epoch's last window, whatever
their lengths and compressions. How many rows a lane gives is known when it has been read: whoever reads it announces
the number and the cursor after them. Everything else follows from these announcements, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamda.data.blocks import Part
from lamda.data.hashing import mixed, permutation, splitmix64
from lamda.data.lanes import BYTES_PER_TOKEN, Cursor
from lamda.data.order import SLOTS

ONE = 1 << 32
"""A whole epoch, in fractions of which windows are counted."""

FIRST_TOKENS = 1 << 17
"""Tokens of all sources' first windows together: they are encoded before the first step."""

GROWTH = (5, 4)
"""Of a window over the one before it. While windows grow, no step waits for one if encoding is twice as fast."""


MEASURED_TOKENS = 1 << 21
"""Of a source's last windows, from which the next one is planned. A single small window is too little: where a lane
begins there is often no line, for documents belong to the lane in which they begin."""


class Announcement(NamedTuple):
    """What one lane gave to a window: rows, the tokens of the text in them, and the cursor after these."""

    rows: int
    tokens: int
    after: Cursor


@dataclass(frozen=True)
class Window:
    """A window of a source that every lane has been announced for.

    number: over the run. base, epoch_base: rows of the source before it, and before its epoch. since, until: the part
    of the epoch, of ONE. starts, afters: cursors of each lane. counts: rows of each lane.
    """

    number: int
    epoch: int
    base: int
    epoch_base: int
    since: int
    until: int
    starts: tuple[Cursor, ...]
    counts: tuple[int, ...]
    afters: tuple[Cursor, ...]

    @property
    def rows(self) -> int:
        """Rows of all lanes."""
        return sum(self.counts)

    @property
    def is_last(self) -> bool:
        """Whether the epoch ends with it."""
        return self.until == ONE

    @property
    def ends_an_empty_epoch(self) -> bool:
        """Whether its epoch has no row."""
        return self.is_last and self.base + self.rows == self.epoch_base

    def part(self, lane: int, length: int) -> Part:
        """What a lane of this length on the axis gave to it."""
        target, stop = (None, None) if self.is_last else (self.until * length >> 32, self.afters[lane])
        return Part(self.epoch, self.starts[lane], target, stop, self.counts[lane])

    def epoch_at(self, row: int) -> float:
        """Epochs of the source that are over at its row `row`, which is in this window."""
        share = (row - self.base) / max(1, self.rows)
        return self.epoch + (self.since + share * (self.until - self.since)) / ONE

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        cursors = {name: [list(astuple(cursor)) for cursor in getattr(self, name)] for name in ("starts", "afters")}
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, **cursors}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Window:
        """What `to_json` gave. Raises TypeError, ValueError and KeyError for anything else."""
        lanes = {"counts": _count, "starts": _cursor, "afters": _cursor}
        of_lanes: dict[str, Any] = {name: tuple(map(of, values[name])) for name, of in lanes.items()}
        if len({len(each) for each in of_lanes.values()}) > 1:
            raise ValueError("a window whose counts and cursors are not of the same lanes")
        of_window = {name: _count(value) for name, value in values.items() if name not in lanes}
        return cls(**{**of_window, **of_lanes})


class Plan(NamedTuple):
    """The next window of a source, as far as it is known before its lanes are read."""

    number: int
    epoch: int
    since: int
    until: int
    starts: tuple[Cursor, ...]

    def target(self, length: int) -> int | None:
        """Where a lane of this length on the axis ends in it; None is the lane's end."""
        return None if self.until == ONE else self.until * length >> 32

    def part(self, lane: int, length: int) -> Part:
        """What a lane of this length on the axis gives to it."""
        return Part(self.epoch, self.starts[lane], self.target(length))


@dataclass(frozen=True)
class Shape:
    """How large the windows of a source are, in tokens; epoch: one window holds an epoch.

    share: the source's slots of SLOTS. lengths: of its lanes, on its axis. length: L, targets a row. full: tokens of
    the windows of all sources together, once they have grown.
    """

    share: int
    lengths: tuple[int, ...]
    length: int
    full: int
    is_epoch: bool = False

    def tokens(self, number: int) -> int:
        """Of window `number`; a row of each lane at the least."""
        tokens, full = (part * self.share // SLOTS for part in (FIRST_TOKENS, max(self.full, FIRST_TOKENS)))
        while number and tokens < full:
            tokens, number = tokens * GROWTH[0] // GROWTH[1] + 1, number - 1
        return max(min(tokens, full), self.length * len(self.lengths))


@dataclass(frozen=True)
class SourceOrder:
    """The windows of a source that are known and may still be asked for, oldest first.

    measured: bytes of the axis and tokens in the last windows, from which the next one is planned.
    """

    windows: tuple[Window, ...] = ()
    measured: tuple[int, int] = (BYTES_PER_TOKEN, 1)

    @property
    def end(self) -> int:
        """Rows of the source in all windows up to the last one that is known."""
        return self.windows[-1].base + self.windows[-1].rows if self.windows else 0

    def at(self, row: int) -> Window:
        """The window that holds a row of the source. Raises KeyError where it is not known."""
        for window in self.windows:
            if window.base <= row < window.base + window.rows:
                return window
        raise KeyError(row)

    def epochs_at(self, row: int) -> float:
        """Epochs of the source that are over at its row `row`, as far as its windows are known there."""
        for window in self.windows:
            if row <= window.base + window.rows:
                return window.epoch_at(max(row, window.base))
        return self.windows[-1].epoch_at(self.end) if self.windows else 0.0

    def plan(self, shape: Shape) -> Plan:
        """The window after the last one that is known."""
        last = self.windows[-1] if self.windows else None
        number = last.number + 1 if last else 0
        if last is None or last.is_last:
            epoch, since, starts = (last.epoch + 1 if last else 0), 0, (Cursor(),) * len(shape.lengths)
        else:
            epoch, since, starts = last.epoch, last.until, last.afters
        return Plan(number, epoch, since, self._until(number, since, shape), starts)

    def _until(self, number: int, since: int, shape: Shape) -> int:
        """Where a window ends: the last one of an epoch is up to half as long again as planned."""
        total, (bytes_, tokens) = max(1, sum(shape.lengths)), self.measured
        step = ONE if shape.is_epoch else max(1, shape.tokens(number) * bytes_ * ONE // (tokens * total))
        return ONE if since + step + step // 2 >= ONE else since + step

    def add(self, plan: Plan, said: Sequence[Announcement], shape: Shape) -> SourceOrder:
        """The next window, from what was announced of each lane."""
        window = Window(
            number=plan.number,
            epoch=plan.epoch,
            base=self.end,
            epoch_base=self.end if plan.since == 0 else self.windows[-1].epoch_base,
            since=plan.since,
            until=plan.until,
            starts=plan.starts,
            counts=tuple(each.rows for each in said),
            afters=tuple(each.after for each in said),
        )
        bytes_ = self.measured[0] + ((plan.until - plan.since) * sum(shape.lengths) >> 32)
        tokens = self.measured[1] + sum(each.tokens for each in said)
        if tokens > MEASURED_TOKENS:
            bytes_, tokens = max(1, bytes_ * MEASURED_TOKENS // tokens), MEASURED_TOKENS
        return SourceOrder((*self.windows, window), (bytes_, tokens))

    def without(self, row: int) -> SourceOrder:
        """Only the windows that hold row `row` or a later one, and the last one that is known."""
        kept = [window for window in self.windows[:-1] if window.base + window.rows > row]
        return replace(self, windows=(*kept, *self.windows[-1:]))

    def without_digests(self) -> SourceOrder:
        """The same, taking whatever document stands at a cursor for the one that stood there."""
        windows = (
            replace(
                window,
                starts=tuple(replace(cursor, digest=None) for cursor in window.starts),
                afters=tuple(replace(cursor, digest=None) for cursor in window.afters),
            )
            for window in self.windows
        )
        return replace(self, windows=tuple(windows))

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {"windows": [window.to_json() for window in self.windows], "measured": list(self.measured)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SourceOrder:
        """What `to_json` gave. Raises TypeError, ValueError and KeyError for anything else."""
        bytes_, tokens = values["measured"]
        if not _count(tokens):
            raise ValueError("an order for which no token was measured")
        return cls(tuple(map(Window.from_json, values["windows"])), (_count(bytes_), tokens))


def _cursor(values: Any) -> Cursor:
    """A cursor from its fields in a file. Raises TypeError and ValueError."""
    *numbers, digest = values
    if not isinstance(digest, str | None):
        raise ValueError(f"{values!r} is no cursor")
    content: list[Any] = [*map(_count, numbers), digest]
    return Cursor(**dict(zip(Cursor.__dataclass_fields__, content, strict=True)))


def _count(value: Any) -> int:
    """A number from a file, which an array can hold. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no count")
    return value


def places(window: Window, *, seed: int, source: int, in_order: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lane and row of each place of a window, [rows] each.

    A lane's rows come in an order of their own, and places are spread over the lanes by a bit reversal, scrambled as
    by Owen (1995): any m places that follow each other lie in each m-th of the lanes, nearly. So batches of every size
    are close to the corpus, and a step's rows, sorted by lane, fall on nearly the same lanes in every step.
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
    """A permutation of range(length), a function of `key`, of which every stretch is spread over the whole range."""
    bits = max(1, (length - 1).bit_length())
    index = np.arange(1 << bits, dtype=np.uint64)
    reversed_, found = np.zeros_like(index), np.zeros_like(index)
    one = np.uint64(1)
    for bit in range(bits):
        reversed_ |= (index >> np.uint64(bit) & one) << np.uint64(bits - 1 - bit)
    for bit in range(bits):  # each bit is flipped by a hash of the bits above it
        above = reversed_ >> np.uint64(bits - bit)
        flip = splitmix64(mixed(*key, bit) ^ above) & one
        found |= (reversed_ >> np.uint64(bits - 1 - bit) & one ^ flip) << np.uint64(bits - 1 - bit)
    return found[found < length].astype(np.int64)
