"""Rows of a lane in a window of the order: a pure function of (text, tokenizer, packing, cursor, end)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamda.config.errors import DataError
from lamda.data.documents import Document
from lamda.data.lanes import Cursor, Lane
from lamda.data.packing import Method, arrange_groups, first_fit
from lamda.data.quarantine import BadLine
from lamda.data.tokenizer import Tokenizer

ENCODE_CHARACTERS = 1 << 17
"""Text that goes through the encoder at a time, or what is left of the window where that is less."""

SPAN = np.dtype([("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("document", "<i4"), ("token", "<i8")])
"""A part of a row that comes from one document, or from one example made of it: tokens `token`, `token + 1`, ...

of what the document gives. Where `document` is -1 the part is padding, or the end symbol of another document.
"""


@dataclass(frozen=True)
class Packing:
    """How a lane's tokens become rows. length: L, targets a row. method: see `lamda.data.packing`."""

    length: int
    method: Method = "concat"


@dataclass(frozen=True)
class RowBlock:
    """R rows of a lane, and where every token came from.

    ids: [R, L+1] uint32; a row's first id is only an input: the token before its first target, where that is of the
    same document, and else the end symbol. spans: [n] SPAN, by row and start; `document` indexes `documents` (a
    document is there once for each part that is encoded). loss_mask: [R, L+1], where not every token but a row's
    first counts as a target. quarantined: bad lines between these documents.
    """

    ids: NDArray[np.uint32]
    spans: NDArray[np.void]
    documents: tuple[Document, ...]
    quarantined: tuple[BadLine, ...] = ()
    loss_mask: NDArray[np.bool_] | None = None

    @cached_property
    def segment_ids(self) -> NDArray[np.int32]:
        """The span of every token, [R, L+1], as an index into `spans`: attention may stay inside it."""
        return np.repeat(np.arange(len(self.spans), dtype=np.int32), self.spans["length"]).reshape(self.ids.shape)

    def spans_of(self, row: int) -> slice:
        """Where a row's spans are among all."""
        return slice(int(self._edges[row]), int(self._edges[row + 1]))

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        return np.searchsorted(self.spans["row"], np.arange(len(self.ids) + 1))


class Part(NamedTuple):
    """A lane's part of a window: from a cursor to its end.

    The end is the place `target` on the lane's axis, or the lane's own end where it is None. stop: the cursor at that
    end, and rows: how many it gives, where these have been announced.
    """

    epoch: int
    start: Cursor
    target: int | None
    stop: Cursor | None = None
    rows: int | None = None


class PartRows(NamedTuple):
    """The rows of a part, how many of their tokens are of the text, and the cursor after these."""

    block: RowBlock
    tokens: int
    after: Cursor


class LaneReader:
    """Reads parts of a lane, fastest in their order: what it holds between two of them never changes a row."""

    def __init__(self, lane: Lane, tokenizer: Tokenizer, packing: Packing) -> None:
        self._lane, self._tokenizer, self._packing = lane, tokenizer, packing
        self._spans: _Spans | None = None
        self._at: tuple[int, int, int] | None = None

    def read(self, part: Part) -> PartRows:
        """The rows of a part. Raises DataError where its text cannot be read, or is not what it was."""
        if self._spans is None or self._at != part.start.place:
            self._spans = _Spans(self._lane, self._tokenizer, part.start, epoch=part.epoch)
        spans, self._spans = self._spans, None  # lost where reading fails
        is_last = part.target is None
        taken = _take(spans, part, is_whole=self._packing.method == "whole")
        tokens = sum(len(span.ids) for span in taken)
        if not is_last and self._packing.method != "whole":
            tokens -= tokens % self._packing.length
        used, left = _split(taken, tokens)
        spans.put_back(left)
        bad = tuple(bad for span in used for bad in span.bad) + (spans.trailing if is_last else ())
        block = self._laid_out(used, context=spans.context, bad=bad)
        after = used[-1].cursor(len(used[-1].ids)) if used else part.start
        self._require_announced(part, len(block.ids), after)
        if used:
            spans.context = int(used[-1].ids[-1])
        self._spans, self._at = spans, after.place
        return PartRows(block, tokens, after)

    def _require_announced(self, part: Part, rows: int, after: Cursor) -> None:
        """Raise DataError where a part that was announced gives other rows now."""
        is_same = part.stop is None or after.place == part.stop.place
        if part.stop is not None and None not in (part.stop.digest, after.digest):
            is_same &= part.stop.digest == after.digest
        if not is_same or part.rows not in (None, rows):
            raise _changed(self._lane, part.start, "the rows that follow are not those that the checkpoint was made of")

    def _laid_out(self, spans: Sequence[_Span], *, context: int, bad: tuple[BadLine, ...]) -> RowBlock:
        packing, tokenizer = self._packing, self._tokenizer
        if packing.method == "whole":
            return _whole_rows(spans, packing, padding=tokenizer.padding, bad=bad)
        return _full_rows(
            spans, packing, context=context, end=tokenizer.end_of_document, padding=tokenizer.padding, bad=bad
        )


class _Span(NamedTuple):
    """What is to come of a document or of an example made of it.

    document: or the piece of it that was encoded by itself. token: of the document's tokens, the one that the ids
    begin with. first, total: the piece's first one, and how many it has. lines, bad_lines: of the lane, before this
    document. bad: the bad lines just before it, where it begins here. text: the whole document's.
    """

    document: Document
    ids: NDArray[np.uint32]
    scored: NDArray[np.bool_] | None
    token: int
    first: int
    total: int
    lines: int
    bad_lines: int
    bad: tuple[BadLine, ...]
    text: str

    def cursor(self, taken: int) -> Cursor:
        """The place after the first `taken` of these ids."""
        place, digest = self.document, _digest(self.text)
        return Cursor(place.file, place.line, place.byte, self.token + taken, self.lines, self.bad_lines, digest)

    def cut(self, count: int) -> tuple[_Span, _Span]:
        """The first `count` ids, and the others."""
        scored = (None, None) if self.scored is None else (self.scored[:count], self.scored[count:])
        return (
            self._replace(ids=self.ids[:count], scored=scored[0]),
            self._replace(ids=self.ids[count:], scored=scored[1], token=self.token + count, bad=()),
        )

    def before(self, target: int) -> int:
        """How many of these ids lie before a place on the lane's axis: a piece's tokens lie evenly on its part."""
        begin, length = self.document.begin, max(1, self.document.end - self.document.begin)
        tokens = self.first - (-(target - begin) * self.total // length)
        return min(max(tokens - self.token, 0), len(self.ids))


def _take(spans: _Spans, part: Part, *, is_whole: bool) -> list[_Span]:
    """The spans of a part; of the last one, what is after the part is put back."""
    taken: list[_Span] = []
    if part.stop is not None and part.stop.place == part.start.place:
        return taken
    while (span := spans.next(part.target)) is not None:
        count, is_end = len(span.ids), False
        if part.stop is not None:
            if span.document[2:4] > part.stop.place[:2]:  # the text is another: `read` says so
                spans.put_back([span])
                break
            if span.document[2:4] == part.stop.place[:2]:
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


def _split(spans: Sequence[_Span], tokens: int) -> tuple[list[_Span], list[_Span]]:
    """Spans with the first `tokens` ids, and with the others."""
    used: list[_Span] = []
    for place, span in enumerate(spans):
        if len(span.ids) > tokens:
            if tokens == 0:
                return used, list(spans[place:])
            first, rest = span.cut(tokens)
            return [*used, first], [rest, *spans[place + 1 :]]
        used.append(span)
        tokens -= len(span.ids)
    return used, []


class _Spans:
    """A lane's spans from a cursor to the lane's end. context: the token before the next one, where of its document."""

    def __init__(self, lane: Lane, tokenizer: Tokenizer, start: Cursor, *, epoch: int) -> None:
        self._epoch = epoch
        self.context = 0
        self.trailing: tuple[BadLine, ...] = ()
        self._lane, self._tokenizer = lane, tokenizer
        self._back: deque[_Span] = deque()
        self._target: int | None = None
        self._stream = self._read(start)

    def next(self, target: int | None) -> _Span | None:
        """The next one; what is encoded for it is little more than what is before `target`."""
        self._target = target
        return self._back.popleft() if self._back else next(self._stream, None)

    def put_back(self, spans: Sequence[_Span]) -> None:
        """Give spans again, before any others."""
        self._back.extendleft(reversed(spans))

    def _read(self, start: Cursor) -> Iterator[_Span]:
        batch: list[_Piece] = []
        bad: list[BadLine] = []
        held, lines, bad_lines, self._skip, self._token = 0, start.lines, start.bad, start.token, 0
        for entry in self._lane.read(start):
            if isinstance(entry, BadLine):
                bad.append(entry)
                continue
            if self._skip and not batch:
                _require_same(self._lane, start, entry)
            lines, bad_lines = lines + len(bad), bad_lines + len(bad)
            for piece in self._lane.form.pieces(entry._replace(epoch=self._epoch), self._tokenizer):
                batch.append(_Piece(piece, tuple(bad), lines, bad_lines, entry.text))
                bad, held = [], held + 4 + len(piece.text)
                if held >= ENCODE_CHARACTERS or (self._target is not None and piece.end >= self._target):
                    yield from self._encoded(batch)
                    batch, held = [], 0
            lines += 1
        if self._skip and not batch:
            _require_same(self._lane, start, None)
        yield from self._encoded(batch)
        self.trailing = tuple(bad)

    def _encoded(self, batch: Sequence[_Piece]) -> Iterator[_Span]:
        encoded = self._lane.form.encode([piece.document for piece in batch], self._tokenizer)
        for piece, parts in zip(batch, encoded, strict=True):
            document, bad = piece.document._replace(text=""), piece.bad
            total, first = sum(len(part.ids) for part in parts), self._token
            for part in parts:
                span = _Span(
                    document if part.domain is None else document._replace(domain=part.domain),
                    part.ids,
                    part.scored,
                    self._token,
                    first,
                    total,
                    piece.lines,
                    piece.bad_lines,
                    bad,
                    piece.text,
                )
                self._token, bad = self._token + len(part.ids), ()
                if count := min(self._skip, len(part.ids)):
                    skipped, span = span.cut(count)
                    self.context, self._skip = int(skipped.ids[-1]), self._skip - count
                if len(span.ids):
                    yield span
            if document.is_end:
                self._token = 0


class _Piece(NamedTuple):
    """What is encoded by itself, the bad lines before it, and what its spans' cursors need."""

    document: Document
    bad: tuple[BadLine, ...]
    lines: int
    bad_lines: int
    text: str


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _require_same(lane: Lane, cursor: Cursor, document: Document | None) -> None:
    """Raise DataError where the document that a cursor stands in is not at its place any more."""
    is_there = document is not None and document[2:4] == cursor.place[:2]
    if document is not None and is_there and cursor.digest in (None, _digest(document.text)):
        return
    raise _changed(lane, cursor, "the document there is not the one that the checkpoint stopped in")


def _changed(lane: Lane, cursor: Cursor, what: str) -> DataError:
    return DataError(
        f"{lane.shares[cursor.file].place(cursor.line, cursor.byte)}: {what}: the file was changed. Put the former "
        "file back, or start another run.dir from the weights alone (model.weights)"
    )


def _full_rows(
    spans: Sequence[_Span], packing: Packing, *, context: int, end: int, padding: int, bad: tuple[BadLine, ...]
) -> RowBlock:
    """Rows without gaps, but for the padding after the last one where the tokens do not fill it."""
    length, spans = packing.length, _joined(spans)
    lengths = np.array([len(span.ids) for span in spans], np.int64)
    total = int(lengths.sum())
    rows = -(-total // length)
    pieces = arrange_groups(packing.method, lengths, row_length=length)
    stream = np.concatenate([np.array([context], np.uint32), *(span.ids for span in spans)])
    source = (np.cumsum(lengths) - lengths + 1)[pieces["stretch"]] + pieces["offset"]  # after the context
    targets = np.full(rows * length, padding, np.uint32)
    targets[:total] = stream[1:] if packing.method == "concat" else stream[_ranges(source, pieces["length"])]
    ids = np.empty((rows, length + 1), np.uint32)
    ids[:, 1:] = targets.reshape(rows, length)
    token = np.array([span.token for span in spans], np.int64)[pieces["stretch"]] + pieces["offset"]
    first = pieces["start"] == 0
    ids[:, 0] = np.where(token > 0, stream[source - 1], end)[first]
    loss_mask = None
    if total < rows * length:
        loss_mask = np.ones((rows, length + 1), bool)
        loss_mask[-1, total - rows * length :] = False
    table = _table(pieces, token, rows=rows, length=length)
    return RowBlock(ids, table, tuple(span.document for span in spans), bad, loss_mask)


def _table(pieces: NDArray[np.void], token: NDArray[np.int64], *, rows: int, length: int) -> NDArray[np.void]:
    """The spans of pieces. token: [pieces] of its document, that each begins with.

    A row's first id is of its first piece, where that continues its document, and else of no document, as padding.
    """
    table = np.zeros(len(pieces), SPAN)
    table["row"], table["start"], table["length"] = pieces["row"], pieces["start"] + 1, pieces["length"]
    table["document"], table["token"] = pieces["stretch"], token
    goes_on = (pieces["start"] == 0) & (token > 0)
    table["start"][goes_on] = 0
    table["length"][goes_on] += 1
    table["token"][goes_on] -= 1
    opening = pieces["row"][(pieces["start"] == 0) & (token == 0)]
    alone = np.zeros(len(opening), SPAN)
    alone["row"], alone["length"], alone["document"] = opening, 1, -1
    missing = rows * length - int(pieces["length"].sum())
    gap = np.array([(rows - 1, length + 1 - missing, missing, -1, 0)] if missing else [], SPAN)
    table = np.concatenate([table, alone, gap])
    return table[np.lexsort((table["start"], table["row"]))]


def _joined(spans: Sequence[_Span]) -> list[_Span]:
    """The spans with all that is of one document as one: a row must not show where a piece of it was encoded."""
    joined: list[list[_Span]] = []
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
    """[start, start + length) of each, one after the other."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))


def _whole_rows(spans: Sequence[_Span], packing: Packing, *, padding: int, bad: tuple[BadLine, ...]) -> RowBlock:
    """Each span in one row, with padding after the last one of a row."""
    size = packing.length + 1
    row_of = first_fit([len(span.ids) for span in spans], row_length=size)
    rows = max(row_of, default=-1) + 1
    ids, loss_mask = np.full((rows, size), padding, np.uint32), np.zeros((rows, size), bool)
    filled = np.zeros(rows, np.int64)
    table: list[tuple[int, int, int, int, int]] = []
    for index, (row, span) in enumerate(zip(row_of, spans, strict=True)):
        start, stop = int(filled[row]), int(filled[row]) + len(span.ids)
        ids[row, start:stop] = span.ids
        loss_mask[row, start:stop] = True if span.scored is None else span.scored
        table.append((row, start, len(span.ids), index, span.token))
        filled[row] = stop
    table += [(row, stop, size - stop, -1, 0) for row, stop in enumerate(filled.tolist()) if stop < size]
    sorted_table = np.sort(np.array(table, SPAN), order=("row", "start"))
    return RowBlock(ids, sorted_table, tuple(span.document for span in spans), bad, loss_mask)
