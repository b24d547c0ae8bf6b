"""Packing: spans of documents arranged into rows, all of them full but the last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PIECE = np.dtype([("row", "<i8"), ("start", "<i8"), ("length", "<i8"), ("span", "<i8"), ("offset", "<i8")])
"""A part of a row, from `start` on: tokens `offset`, `offset + 1`, ... of a span."""

Method = Literal["concat", "best_fit", "whole"]
"""`whole` pads rows: see `first_fit`."""

GROUP = 256
"""Rows that are arranged together: with more, `best_fit` takes longer and hardly avoids any more cuts."""


def arrange_groups(method: Method, lengths: NDArray[np.int64], *, row_length: int) -> NDArray[np.void]:
    """As `arrange`, for any number of tokens, GROUP rows at a time; the remainder begins a last, shorter row."""
    ends = np.cumsum(lengths)
    begins, total = ends - lengths, int(lengths.sum())
    if method == "concat":
        return concat(lengths, rows=-(-total // row_length), row_length=row_length)
    found = [np.empty(0, PIECE)]
    edges = [*range(0, total // row_length, GROUP), total // row_length]
    for low, high in pairwise([row * row_length for row in edges] + [total] * (total % row_length > 0)):
        first, last = np.searchsorted(ends, low, side="right"), np.searchsorted(begins, high, side="left")
        inside = np.minimum(ends[first:last], high) - np.maximum(begins[first:last], low)
        if (high - low) % row_length:
            pieces = concat(inside, rows=1, row_length=high - low)
        else:
            pieces = arrange(method, inside, rows=(high - low) // row_length, row_length=row_length)
        pieces["row"] += low // row_length
        pieces["offset"] += np.maximum(low - begins[first:last], 0)[pieces["span"]]
        pieces["span"] += first
        found.append(pieces)
    return np.concatenate(found)


def first_fit(lengths: Sequence[int], *, row_length: int) -> list[int]:
    """The row of each span, the longest first, each in the first row with enough room; none is cut.

    Raises ValueError if one is longer than a row.
    """
    if max(lengths, default=0) > row_length:
        raise ValueError(f"a span of {max(lengths)} tokens fits in no row of {row_length}")
    rows, room, used = [0] * len(lengths), np.full(len(lengths), row_length, np.int64), 0
    for span in sorted(range(len(lengths)), key=lambda span: -lengths[span]):
        row = int(np.argmax(room[: used + 1] >= lengths[span]))
        rows[span], used = row, max(used, row + 1)
        room[row] -= lengths[span]
    return rows


def arrange(method: Method, lengths: NDArray[np.int64], *, rows: int, row_length: int) -> NDArray[np.void]:
    """The pieces of a block's spans, [pieces] PIECE by row and start; a pure function.

    A span is consecutive tokens of one document; lengths: [n] tokens of each, in the order of the stream. Every row is
    filled, every token of every span used once, and of two pieces of a span the one in the earlier row holds the
    earlier tokens. method: `concat` or `best_fit`, as the functions of these names. Raises ValueError if a span is
    empty, or the total is not that of the rows.
    """
    lengths = np.asarray(lengths, np.int64)
    if (lengths < 1).any() or lengths.sum() != rows * row_length:
        raise ValueError(f"spans of {lengths.sum()} tokens, none empty, cannot fill {rows} rows of {row_length}")
    return {"concat": concat, "best_fit": best_fit}[method](lengths, rows=rows, row_length=row_length)


def concat(lengths: NDArray[np.int64], *, rows: int, row_length: int) -> NDArray[np.void]:
    """The spans in stream order, cut wherever a row ends. As `arrange`, but the last row may be short."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    places = np.union1d(begins, np.arange(rows) * row_length)
    pieces = np.empty(len(places), PIECE)
    pieces["row"], pieces["start"] = np.divmod(places, row_length)
    pieces["length"] = np.diff(places, append=lengths.sum())
    pieces["span"] = np.searchsorted(ends, places, side="right")
    pieces["offset"] = places - begins[pieces["span"]]
    return pieces


def best_fit(lengths: NDArray[np.int64], *, rows: int, row_length: int) -> NDArray[np.void]:
    """Packing with few cuts, after "Fewer Truncations Improve Language Modeling" (Ding et al. 2024). As `arrange`.

    A span longer than a row is first cut into whole rows and a remainder, as in the paper. The paper then uses best-fit
    decreasing, which needs padding. Rows here are full, so only an exact fit avoids cuts: a row takes the longest
    remaining span, and others that fill it exactly. Spans that fit into no such row are concatenated over the remaining
    rows. If this does not cut less than `concat`, the block stays in stream order.
    """
    whole, rest = np.divmod(lengths, row_length)
    long = np.repeat(np.arange(len(lengths)), whole).tolist()
    exact, left = _exact_rows(rest.tolist(), row_length)
    full = [[span] for span in long] + exact
    row = np.repeat(np.arange(len(full)), [len(spans) for spans in full])
    span = np.array([span for spans in full for span in spans], np.int64)
    remaining = np.array(left, np.int64)
    tail = concat(rest[remaining], rows=rows - len(full), row_length=row_length)
    fitted = _pieces(
        row=np.concatenate([row, len(full) + tail["row"]]),
        span=np.concatenate([span, remaining[tail["span"]]]),
        length=np.concatenate([np.where(row < len(long), row_length, rest[span]), tail["length"]]),
        row_length=row_length,
    )
    return min(concat(lengths, rows=rows, row_length=row_length), fitted, key=len)


def _pieces(
    *, row: NDArray[np.int64], span: NDArray[np.int64], length: NDArray[np.int64], row_length: int
) -> NDArray[np.void]:
    """Pieces with given rows, in stream order within a row and within a span."""
    order = np.lexsort((span, row))
    pieces = np.empty(len(order), PIECE)
    pieces["row"], pieces["span"], pieces["length"] = row[order], span[order], length[order]
    pieces["start"] = np.cumsum(pieces["length"]) - pieces["length"] - pieces["row"] * row_length
    by_span = np.argsort(pieces["span"], kind="stable")
    before = np.cumsum(pieces["length"][by_span]) - pieces["length"][by_span]
    _, first, count = np.unique(pieces["span"][by_span], return_index=True, return_counts=True)
    pieces["offset"][by_span] = before - np.repeat(before[first], count)
    return pieces


def _exact_rows(lengths: list[int], row_length: int) -> tuple[list[list[int]], list[int]]:
    """Rows filled exactly by whole spans, and the remaining spans in stream order.

    Lengths are shorter than a row; spans of length 0 are dropped. Spans of equal length are taken by index.
    """
    stock: dict[int, list[int]] = defaultdict(list)
    for span in reversed(range(len(lengths))):
        if lengths[span]:
            stock[lengths[span]].append(span)
    rows, left = [], []
    while stock:
        longest = max(stock)
        others = _lengths_that_sum_to(row_length - longest, stock, without=longest)
        if others is None:
            # Later rows have fewer spans to choose from, so no span of this length will fit.
            left += stock.pop(longest)
            continue
        rows.append([stock[length].pop() for length in (longest, *others)])
        for length in {longest, *others}:
            if not stock[length]:
                del stock[length]
    return rows, sorted(left)


def _lengths_that_sum_to(total: int, stock: dict[int, list[int]], *, without: int) -> list[int] | None:
    """Lengths in stock with this sum, without one of length `without`; None if there are none.

    Subset sum by dynamic programming; bit s of `reached` is set if the sum s is possible. Longest first, so that short
    spans, which fit nearly anywhere, remain for later rows.
    """
    reached = 1
    steps: list[tuple[int, int]] = []
    for length in sorted((length for length in stock if length <= total), reverse=True):
        for _ in range(min(len(stock[length]) - (length == without), total // length)):
            if reached >> (total - length) & 1:
                return [length, *_trace(total - length, steps)]
            wider = reached | (reached << length) & ((2 << total) - 1)
            if wider == reached:
                break
            steps.append((length, reached))
            reached = wider
    return None


def _trace(total: int, steps: list[tuple[int, int]]) -> list[int]:
    """The lengths of a sum, from the length of each step and the sums possible before it."""
    lengths = []
    for length, before in reversed(steps):
        if not before >> total & 1:
            lengths.append(length)
            total -= length
    return lengths
