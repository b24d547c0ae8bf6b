"""Row blocks: the token rows that a lane gives to a window.

A block is a pure function of (text, tokenizer, packing, start cursor, end), so it can be cached, and is the same on
every rank that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamda.data.documents import Document
from lamda.data.lanes import Cursor, Lane
from lamda.data.packing import Method, arrange_groups, first_fit
from lamda.data.quarantine import BadLine
from lamda.data.spans import SpanReader, TokenSpan, text_changed
from lamda.data.tokenizer import Tokenizer

SPAN = np.dtype([("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("document", "<i4"), ("token", "<i8")])
"""A part of a row that comes from one document, or one example made of it: its tokens `token`, `token + 1`, ...

If `document` is -1, the part is padding or EOS of another document. A span at `start` 0 begins with a token that is
only an input. In full rows it was a target of the row before, so a document whose first token ends a row has two spans
with `token` 0.
"""


@dataclass(frozen=True)
class Packing:
    """How tokens become rows. sequence_length: L, targets per row. method: see `lamda.data.packing`."""

    sequence_length: int
    method: Method = "concat"


@dataclass(frozen=True)
class RowBlock:
    """R rows of a lane, and the origin of every token.

    ids: [R, L+1] uint32; the first id of a row is only an input: the token before its first target if both are of the
    same document, otherwise EOS. spans: [n] SPAN, sorted by row and start; `document` indexes `documents`,
    which has one entry per document with tokens here, or per example packed whole. loss_mask: [R, L+1], the targets
    that count; None if all tokens but the first of each row do. quarantined: bad lines between these documents.
    """

    ids: NDArray[np.uint32]
    spans: NDArray[np.void]
    documents: tuple[Document, ...]
    quarantined: tuple[BadLine, ...] = ()
    loss_mask: NDArray[np.bool_] | None = None

    def spans_of(self, row: int) -> slice:
        """The spans of a row, as a slice of `spans`."""
        return slice(int(self._edges[row]), int(self._edges[row + 1]))

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        return np.searchsorted(self.spans["row"], np.arange(len(self.ids) + 1))


class Part(NamedTuple):
    """The part of a lane in a window: from a cursor to an end.

    target: the end on the axis of the lane; None: the end of the lane. stop, rows: the cursor at that end and the
    number of rows, if the window is known.
    """

    epoch: int
    start: Cursor
    target: int | None
    stop: Cursor | None = None
    rows: int | None = None


class LaneProgress(NamedTuple):
    """How far a lane comes in a window: its rows, their tokens without padding, and the cursor after them."""

    rows: int
    tokens: int
    after: Cursor


class PartRows(NamedTuple):
    """The rows of a part, the number of their tokens without padding, and the cursor after them."""

    block: RowBlock
    tokens: int
    after: Cursor

    @property
    def progress(self) -> LaneProgress:
        """What the ranks exchange about them."""
        return LaneProgress(len(self.block.ids), self.tokens, self.after)


class LaneReader:
    """Reads parts of a lane. Consecutive parts reuse what was read ahead; the rows are the same in any order."""

    def __init__(self, lane: Lane, tokenizer: Tokenizer, packing: Packing) -> None:
        self._lane, self._tokenizer, self._packing = lane, tokenizer, packing
        self._spans: SpanReader | None = None
        self._at: tuple[int, int, int] | None = None

    def read(self, part: Part) -> PartRows:
        """The rows of a part. Raises DataError if its text cannot be read or was changed."""
        if self._spans is None or self._at != part.start.place:
            self._spans = SpanReader(self._lane, self._tokenizer, part.start, epoch=part.epoch)
        spans, self._spans = self._spans, None  # dropped if reading fails
        is_last = part.target is None
        taken = _take(spans, part, is_whole=self._packing.method == "whole")
        tokens = sum(len(span.ids) for span in taken)
        if not is_last and self._packing.method != "whole":
            tokens -= tokens % self._packing.sequence_length
        used, left = _split(taken, tokens)
        spans.put_back(left)
        bad = tuple(bad for span in used for bad in span.bad) + (spans.trailing if is_last else ())
        block = self._make_rows(used, context=spans.context, bad=bad)
        after = used[-1].cursor(len(used[-1].ids)) if used else part.start
        self._require_unchanged(part, len(block.ids), after)
        if used:
            spans.context = int(used[-1].ids[-1])
        self._spans, self._at = spans, after.place
        return PartRows(block, tokens, after)

    def _require_unchanged(self, part: Part, rows: int, after: Cursor) -> None:
        """Raise DataError if a part of a known window now has other rows."""
        is_same = part.stop is None or after.place == part.stop.place
        if part.stop is not None and None not in (part.stop.digest, after.digest):
            is_same &= part.stop.digest == after.digest
        if not is_same or part.rows not in (None, rows):
            raise text_changed(
                self._lane, part.start, "the rows that follow are not those that the checkpoint was made of"
            )

    def _make_rows(self, spans: Sequence[TokenSpan], *, context: int, bad: tuple[BadLine, ...]) -> RowBlock:
        packing, tokenizer = self._packing, self._tokenizer
        if packing.method == "whole":
            return _whole_rows(spans, packing, padding=tokenizer.padding, bad=bad)
        return _full_rows(
            spans, packing, context=context, end=tokenizer.end_of_document, padding=tokenizer.padding, bad=bad
        )


def _take(spans: SpanReader, part: Part, *, is_whole: bool) -> list[TokenSpan]:
    """The spans of a part; the rest of the last one is put back."""
    taken: list[TokenSpan] = []
    if part.stop is not None and part.stop.place == part.start.place:
        return taken
    while (span := spans.next(part.target)) is not None:
        count, is_end = len(span.ids), False
        if part.stop is not None:
            if span.document.place > part.stop.document_place:  # the text was changed: `read` reports it
                spans.put_back([span])
                break
            if span.document.place == part.stop.document_place:
                count = min(count, part.stop.token - span.token)
                is_end = span.token + count == part.stop.token
        elif part.target is not None:
            count = span.before(part.target)
            if is_whole:
                count = len(span.ids) if count else 0
            is_end = count < len(span.ids)
            is_end |= span.document.end >= part.target and span.token + len(span.ids) == span.first + span.total
        if count < len(span.ids):
            span, rest = span.cut(count)
            spans.put_back([rest if count else rest._replace(bad=span.bad)])
        if count:
            taken.append(span)
        if is_end:
            break
    return taken


def _split(spans: Sequence[TokenSpan], tokens: int) -> tuple[list[TokenSpan], list[TokenSpan]]:
    """Spans with the first `tokens` ids, and with the remaining ones."""
    used: list[TokenSpan] = []
    for place, span in enumerate(spans):
        if len(span.ids) > tokens:
            if tokens == 0:
                return used, list(spans[place:])
            first, rest = span.cut(tokens)
            return [*used, first], [rest, *spans[place + 1 :]]
        used.append(span)
        tokens -= len(span.ids)
    return used, []


def _full_rows(
    spans: Sequence[TokenSpan], packing: Packing, *, context: int, end: int, padding: int, bad: tuple[BadLine, ...]
) -> RowBlock:
    """Rows without gaps; only the last one may end in padding."""
    length, spans = packing.sequence_length, _joined(spans)
    lengths = np.array([len(span.ids) for span in spans], np.int64)
    total = int(lengths.sum())
    rows = -(-total // length)
    pieces = arrange_groups(packing.method, lengths, row_length=length)
    stream = np.concatenate([np.array([context], np.uint32), *(span.ids for span in spans)])
    source = (np.cumsum(lengths) - lengths + 1)[pieces["span"]] + pieces["offset"]  # after the context
    targets = np.full(rows * length, padding, np.uint32)
    targets[:total] = stream[1:] if packing.method == "concat" else stream[_ranges(source, pieces["length"])]
    ids = np.empty((rows, length + 1), np.uint32)
    ids[:, 1:] = targets.reshape(rows, length)
    token = np.array([span.token for span in spans], np.int64)[pieces["span"]] + pieces["offset"]
    first = pieces["start"] == 0
    ids[:, 0] = np.where(token > 0, stream[source - 1], end)[first]
    loss_mask = None
    if total < rows * length:
        loss_mask = np.ones((rows, length + 1), bool)
        loss_mask[-1, total - rows * length :] = False
    table = _table(pieces, token, rows=rows, length=length)
    return RowBlock(ids, table, tuple(span.document for span in spans), bad, loss_mask)


def _table(pieces: NDArray[np.void], token: NDArray[np.int64], *, rows: int, length: int) -> NDArray[np.void]:
    """The spans of pieces. token: [pieces], index in its document of the first token of each piece.

    The first id of a row belongs to its first piece if that continues a document, otherwise to no document.
    """
    table = np.zeros(len(pieces), SPAN)
    table["row"], table["start"], table["length"] = pieces["row"], pieces["start"] + 1, pieces["length"]
    table["document"], table["token"] = pieces["span"], token
    continues = (pieces["start"] == 0) & (token > 0)
    table["start"][continues] = 0
    table["length"][continues] += 1
    table["token"][continues] -= 1
    opening = pieces["row"][(pieces["start"] == 0) & (token == 0)]
    alone = np.zeros(len(opening), SPAN)
    alone["row"], alone["length"], alone["document"] = opening, 1, -1
    missing = rows * length - int(pieces["length"].sum())
    gap = np.array([(rows - 1, length + 1 - missing, missing, -1, 0)] if missing else [], SPAN)
    table = np.concatenate([table, alone, gap])
    return table[np.lexsort((table["start"], table["row"]))]


def _joined(spans: Sequence[TokenSpan]) -> list[TokenSpan]:
    """The spans with those of one document joined: rows must not depend on how a document was cut for encoding."""
    joined: list[list[TokenSpan]] = []
    for span in spans:
        if joined and span.token > 0:
            joined[-1].append(span)
        else:
            joined.append([span])
    return [
        parts[0]._replace(ids=np.concatenate([part.ids for part in parts])) if len(parts) > 1 else parts[0]
        for parts in joined
    ]


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranges [start, start + length), concatenated."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))


def _whole_rows(spans: Sequence[TokenSpan], packing: Packing, *, padding: int, bad: tuple[BadLine, ...]) -> RowBlock:
    """Rows of whole spans, padded at the end."""
    size = packing.sequence_length + 1
    row_of = first_fit([len(span.ids) for span in spans], row_length=size)
    rows = max(row_of, default=-1) + 1
    ids, loss_mask = np.full((rows, size), padding, np.uint32), np.zeros((rows, size), bool)
    filled = np.zeros(rows, np.int64)
    table: list[tuple[int, int, int, int, int]] = []
    for index, (row, span) in enumerate(zip(row_of, spans, strict=True)):
        start, stop = int(filled[row]), int(filled[row]) + len(span.ids)
        ids[row, start:stop] = span.ids
        loss_mask[row, start:stop] = True if span.loss_mask is None else span.loss_mask
        table.append((row, start, len(span.ids), index, span.token))
        filled[row] = stop
    table += [(row, stop, size - stop, -1, 0) for row, stop in enumerate(filled.tolist()) if stop < size]
    sorted_table = np.sort(np.array(table, SPAN), order=("row", "start"))
    return RowBlock(ids, sorted_table, tuple(span.document for span in spans), bad, loss_mask)
