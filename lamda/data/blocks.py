"""Blocks: the next rows of a lane, a pure function of (card, tokenizer, packing, seed, cursor)."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamda.data.documents import Document
from lamda.data.errors import DataError
from lamda.data.hashing import permutation
from lamda.data.lanes import Cursor, Lane
from lamda.data.packing import Method, arrange
from lamda.data.quarantine import BadLine
from lamda.data.tokenizer import Tokenizer

ENCODE_CHARACTERS = 1 << 17
"""Text that goes through the encoder at a time, or about a block's worth where that is less."""

RUN = np.dtype([("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("document", "<i4"), ("token", "<i8")])
"""A stretch of a row that comes from one document, or from one example made of it: tokens `token`, `token + 1`, ...

of what the document gives. Where `document` is -1 the stretch is padding.
"""


@dataclass(frozen=True)
class Block:
    """R rows of sequence_length + 1 tokens, and where every token came from.

    ids: [R, L+1] uint32. runs: [n] RUN, by row and start; `document` indexes `documents` (a document is
    there once for each stretch). quarantined: the bad lines just before each document that begins in
    this block. loss_mask: [R, L+1], where not every token counts as a target.
    """

    number: int
    ids: NDArray[np.uint32]
    runs: NDArray[np.void]
    documents: tuple[Document, ...]
    quarantined: tuple[BadLine, ...] = ()
    loss_mask: NDArray[np.bool_] | None = None

    @cached_property
    def run_of(self) -> NDArray[np.int32]:
        """The run of every token, [R, L+1], as an index into `runs`: attention may stay inside it."""
        return np.repeat(np.arange(len(self.runs), dtype=np.int32), self.runs["length"]).reshape(self.ids.shape)

    @cached_property
    def document_of(self) -> NDArray[np.int32]:
        """The document of every token, [R, L+1], as an index into `documents`; -1 is padding."""
        return np.repeat(self.runs["document"], self.runs["length"]).reshape(self.ids.shape)


@dataclass(frozen=True)
class Packing:
    """How a lane's tokens become rows.

    rows: R, rows a block. row_length: tokens a row (targets + 1). seed: of the permutation of rows.
    method: the arrangement of a block's tokens in its rows (`lamda.data.packing`).
    """

    rows: int
    row_length: int
    seed: int
    method: Method = "concat"


def read_blocks(
    lane: Lane, cursor: Cursor, *, packing: Packing, tokenizer: Tokenizer
) -> Generator[tuple[Block, Cursor]]:
    """The lane's blocks from `cursor.block` on, for ever, each with the cursor of the next."""
    size = packing.rows * packing.row_length
    stretches = _stretches(lane, cursor, tokenizer, characters=min(ENCODE_CHARACTERS, 4 * size))
    if packing.method == "whole":
        return _whole_blocks(lane.index, cursor.block, stretches, packing, padding=tokenizer.padding)
    return _full_blocks(lane.index, cursor.block, stretches, packing)


class _Stretch(NamedTuple):
    """What is to come of a document or of an example made of it.

    token: of the document's tokens, the one that the ids begin with. lines, bad_lines: of the lane, before
    this document. bad: the bad lines just before it, where it begins here. digest: of its text.
    """

    document: Document
    ids: NDArray[np.uint32]
    scored: NDArray[np.bool_] | None
    token: int
    lines: int
    bad_lines: int
    bad: tuple[BadLine, ...]
    digest: str

    def cursor(self, block: int, taken: int) -> Cursor:
        """Where `block` begins if `taken` of these ids are in the blocks before it."""
        place = self.document
        return Cursor(
            block,
            place.epoch,
            place.file,
            place.line,
            place.byte,
            self.token + taken,
            self.lines,
            self.bad_lines,
            self.digest,
        )


def _full_blocks(
    lane: int, number: int, stretches: Iterator[_Stretch], packing: Packing
) -> Generator[tuple[Block, Cursor]]:
    """Blocks whose rows are all full, as the packing arranges them; stretches are cut where a block ends."""
    size, filled = packing.rows * packing.row_length, 0
    pieces: list[NDArray[np.uint32]] = []
    runs: list[tuple[Document, int, int]] = []
    quarantined: list[BadLine] = []
    for stretch in stretches:
        quarantined += stretch.bad
        first = 0
        while first < len(stretch.ids):
            taken = min(len(stretch.ids) - first, size - filled)
            pieces.append(stretch.ids[first : first + taken])
            runs.append((stretch.document, stretch.token + first, taken))
            first, filled = first + taken, filled + taken
            if filled == size:
                stream = np.concatenate(pieces)
                yield _pack(number, lane, stream, runs, packing, tuple(quarantined)), stretch.cursor(number + 1, first)
                number += 1
                pieces, runs, filled, quarantined = [], [], 0, []


def _whole_blocks(
    lane: int, number: int, stretches: Iterator[_Stretch], packing: Packing, *, padding: int
) -> Generator[tuple[Block, Cursor]]:
    """Blocks of whole stretches, each in the first row that has room; one that fits in none begins the next block."""
    placed: list[tuple[int, int, _Stretch]] = []
    quarantined: list[BadLine] = []
    filled = np.zeros(packing.rows, np.int64)
    for stretch in stretches:
        quarantined += stretch.bad
        fitting = np.flatnonzero(filled + len(stretch.ids) <= packing.row_length)
        if not len(fitting):
            block = _lay_out(number, lane, placed, packing, tuple(quarantined), padding=padding)
            number += 1
            yield block, stretch.cursor(number, 0)
            placed, quarantined, fitting = [], [], np.zeros(1, np.int64)
            filled[:] = 0
        row = int(fitting[0])
        placed.append((row, int(filled[row]), stretch))
        filled[row] += len(stretch.ids)


def _stretches(lane: Lane, cursor: Cursor, tokenizer: Tokenizer, *, characters: int) -> Iterator[_Stretch]:
    """What the lane's documents give from the cursor on."""
    first, lines, bad_lines = cursor.token, cursor.lines, cursor.bad
    is_landing = cursor.block > 0
    for batch in _batches(lane, cursor, characters=characters):
        if is_landing:
            _require_same(lane, cursor, batch[0])
            is_landing = False
        for document, encoded in zip(batch, lane.form.encode(batch, tokenizer), strict=True):
            digest = _digest(document.text)
            lines, bad_lines = lines + len(document.bad), bad_lines + len(document.bad)
            place, bad, start = document._replace(text="", bad=()), document.bad, 0
            for part in encoded:
                skipped = min(max(first - start, 0), len(part.ids))
                if skipped < len(part.ids):
                    yield _Stretch(
                        place if part.domain is None else place._replace(domain=part.domain),
                        part.ids[skipped:],
                        None if part.scored is None else part.scored[skipped:],
                        start + skipped,
                        lines,
                        bad_lines,
                        bad,
                        digest,
                    )
                    bad = ()
                start += len(part.ids)
            first = 0
            lines += 1


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _require_same(lane: Lane, cursor: Cursor, document: Document) -> None:
    """Raise DataError where the document that a cursor stands in is not at its place any more."""
    is_there = (document.epoch, document.file, document.line) == (cursor.epoch, cursor.file, cursor.line)
    if is_there and cursor.digest in (None, _digest(document.text)):
        return
    raise DataError(
        f"{lane.shares[cursor.file].file.url}, line {cursor.line + 1}: the document there is not the one that the "
        "checkpoint stopped in: the file was changed. Put the former file back, or start another run.dir from the "
        "weights alone (model.weights)"
    )


def _batches(lane: Lane, cursor: Cursor, *, characters: int) -> Iterator[list[Document]]:
    batch, held = [], 0
    for document in lane.read(cursor):
        batch.append(document)
        held += 4 + len(document.text)
        if held >= characters:
            yield batch
            batch, held = [], 0


def _pack(
    number: int,
    lane: int,
    stream: NDArray[np.uint32],
    runs: list[tuple[Document, int, int]],
    packing: Packing,
    quarantined: tuple[BadLine, ...],
) -> Block:
    """Rows as the packing arranges the runs, then permuted."""
    documents, tokens, lengths = zip(*runs, strict=True)
    begins = np.cumsum(lengths) - lengths
    pieces = arrange(packing.method, np.array(lengths), rows=packing.rows, row_length=packing.row_length)
    order = permutation(packing.rows, packing.seed, lane, number)
    # A piece's tokens lie together in the stream too: by how far each has moved.
    moved = begins[pieces["stretch"]] + pieces["offset"] - pieces["row"] * packing.row_length - pieces["start"]
    taken = np.arange(len(stream)) + np.repeat(moved, pieces["length"])
    table = np.empty(len(pieces), RUN)
    table["row"] = np.argsort(order)[pieces["row"]]
    table["start"], table["length"] = pieces["start"], pieces["length"]
    table["document"] = pieces["stretch"]
    table["token"] = np.array(tokens)[pieces["stretch"]] + pieces["offset"]
    ids = stream[taken].reshape(packing.rows, packing.row_length)[order]
    return Block(number, ids, np.sort(table, order=("row", "start")), documents, quarantined)


def _lay_out(
    number: int,
    lane: int,
    placed: Sequence[tuple[int, int, _Stretch]],
    packing: Packing,
    quarantined: tuple[BadLine, ...],
    *,
    padding: int,
) -> Block:
    """Stretches at their (row, start), padding after the last of each row; rows are then permuted."""
    shape = (packing.rows, packing.row_length)
    runs: list[tuple[Any, Any, Any, int, int]] = []
    ids, scored = np.full(shape, padding, np.uint32), np.zeros(shape, bool)
    filled = np.zeros(packing.rows, np.int64)
    place_of = np.argsort(permutation(packing.rows, packing.seed, lane, number))
    for index, (row, start, stretch) in enumerate(placed):
        row, stop = place_of[row], start + len(stretch.ids)
        ids[row, start:stop] = stretch.ids
        scored[row, start:stop] = True if stretch.scored is None else stretch.scored
        runs.append((row, start, len(stretch.ids), index, stretch.token))
        filled[row] = stop
    runs += [(row, stop, shape[1] - stop, -1, 0) for row, stop in enumerate(filled) if stop < shape[1]]
    table = np.sort(np.array(runs, RUN), order=("row", "start"))
    return Block(number, ids, table, tuple(stretch.document for *_, stretch in placed), quarantined, scored)
