"""Encoding a lane: its tokens from a cursor on, as spans that each belong to one document.

Documents are encoded in batches. A reader looks ahead little more than the end of the current window, and takes back
the spans that the window did not use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamda.config.errors import DataError
from lamda.data.documents import Document
from lamda.data.hashing import document_hash
from lamda.data.lanes import Cursor, Lane
from lamda.data.quarantine import BadLine
from lamda.data.tokenizer import Tokenizer

ENCODE_CHARACTERS = 1 << 17
"""Characters encoded per batch, or fewer at the end of a window."""


class TokenSpan(NamedTuple):
    """Consecutive tokens of a document, or of an example made of it.

    document: the document, or the piece of it that was encoded separately. token: index of the first id in the
    document. first, total: index of the first token of the piece, and number of its tokens. bad: the bad lines just
    before the document, if it begins here.
    """

    document: Document
    ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_] | None
    token: int
    first: int
    total: int
    bad: tuple[BadLine, ...]
    piece: _Piece

    def cursor(self, taken: int) -> Cursor:
        """The position after the first `taken` ids."""
        document, piece = self.document, self.piece
        return Cursor(
            document.file,
            document.line,
            document.byte,
            self.token + taken,
            piece.lines,
            piece.bad_lines,
            document_hash(piece.text),
        )

    def cut(self, count: int) -> tuple[TokenSpan, TokenSpan]:
        """The first `count` ids, and the others."""
        loss_mask = (None, None) if self.loss_mask is None else (self.loss_mask[:count], self.loss_mask[count:])
        return (
            self._replace(ids=self.ids[:count], loss_mask=loss_mask[0]),
            self._replace(ids=self.ids[count:], loss_mask=loss_mask[1], token=self.token + count, bad=()),
        )

    def before(self, target: int) -> int:
        """The number of ids before a position on the axis of the lane; tokens are spread evenly over their piece."""
        begin, length = self.document.begin, max(1, self.document.end - self.document.begin)
        tokens = self.first - (-(target - begin) * self.total // length)
        return min(max(tokens - self.token, 0), len(self.ids))


class _Piece(NamedTuple):
    """Text that is encoded separately, and the bad lines before it.

    lines, bad_lines: of the lane before its document. text: of the whole document.
    """

    document: Document
    bad: tuple[BadLine, ...]
    lines: int
    bad_lines: int
    text: str


class SpanReader:
    """The spans of a lane from a cursor to its end.

    context: the token before the next one, if it is of the same document. trailing: bad lines after the last document.
    """

    def __init__(self, lane: Lane, tokenizer: Tokenizer, start: Cursor, *, epoch: int) -> None:
        self._epoch = epoch
        self.context = 0
        self.trailing: tuple[BadLine, ...] = ()
        self._lane, self._tokenizer = lane, tokenizer
        self._back: deque[TokenSpan] = deque()
        self._target: int | None = None
        self._stream = self._read(start)

    def next(self, target: int | None) -> TokenSpan | None:
        """The next span; little more than the text before `target` is encoded for it."""
        self._target = target
        return self._back.popleft() if self._back else next(self._stream, None)

    def put_back(self, spans: Sequence[TokenSpan]) -> None:
        """Return spans, to be given again first."""
        self._back.extendleft(reversed(spans))

    def _read(self, start: Cursor) -> Iterator[TokenSpan]:
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

    def _encoded(self, batch: Sequence[_Piece]) -> Iterator[TokenSpan]:
        encoded = self._lane.form.encode([piece.document for piece in batch], self._tokenizer)
        for piece, parts in zip(batch, encoded, strict=True):
            document, bad = piece.document._replace(text=""), piece.bad
            total, first = sum(len(part.ids) for part in parts), self._token
            for part in parts:
                place = document if part.domain is None else document._replace(domain=part.domain)
                span = TokenSpan(place, part.ids, part.loss_mask, self._token, first, total, bad, piece)
                self._token, bad = self._token + len(part.ids), ()
                if count := min(self._skip, len(part.ids)):
                    skipped, span = span.cut(count)
                    self.context, self._skip = int(skipped.ids[-1]), self._skip - count
                if len(span.ids):
                    yield span
            if document.is_end:
                self._token = 0


def _require_same(lane: Lane, cursor: Cursor, document: Document | None) -> None:
    """Raise DataError if the document at a cursor is no longer there."""
    is_there = document is not None and document.place == cursor.document_place
    if document is not None and is_there and cursor.digest in (None, document_hash(document.text)):
        return
    raise text_changed(lane, cursor, "the document there is not the one at which the checkpoint stopped")


def text_changed(lane: Lane, cursor: Cursor, reason: str) -> DataError:
    """The error for a lane whose text differs from what the checkpoint was made of."""
    place = lane.slices[cursor.file].place(cursor.line, cursor.byte)
    return DataError(
        f"{place}: {reason}: the file was changed. Restore the former file, or use a new run.dir from the weights "
        "alone (model.weights)"
    )
