"""Blocks: the next rows of a lane, a pure function of (card, tokenizer, packing, seed, cursor)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lamda.data.hashing import permutation
from lamda.data.lanes import Cursor, Document, Lane
from lamda.data.packing import Method, arrange
from lamda.data.quarantine import BadLine
from lamda.data.tokenizer import Tokenizer

ENCODE_CHARACTERS = 1 << 17
"""Text that goes through the encoder at a time, or about a block's worth where that is less."""

RUN = np.dtype([("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("document", "<i4"), ("token", "<i8")])
"""A stretch of a row that comes from one document: tokens `token`, `token + 1`, ... of it."""


@dataclass(frozen=True)
class Block:
    """R rows of sequence_length + 1 tokens, and where every token came from.

    ids: [R, L+1] uint32. runs: [n] RUN, by row and start; `document` indexes `documents`.
    quarantined: the bad lines just before each document that begins in this block. loss_mask: [R, L+1],
    where not every token counts as a target (fine-tuning).
    """

    number: int
    ids: NDArray[np.uint32]
    runs: NDArray[np.void]
    documents: tuple[Document, ...]
    quarantined: tuple[BadLine, ...] = ()
    loss_mask: NDArray[np.bool_] | None = None

    @cached_property
    def document_of(self) -> NDArray[np.int32]:
        """The document of every token, [R, L+1], as an index into `documents`."""
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
    number, filled = cursor.block, 0
    pieces: list[NDArray[np.uint32]] = []
    runs: list[tuple[Document, int, int]] = []
    lines, bad = cursor.lines, cursor.bad
    quarantined: list[BadLine] = []
    for document, tokens, first in _tokens(lane, cursor, tokenizer, characters=min(ENCODE_CHARACTERS, 4 * size)):
        lines, bad = lines + len(document.bad), bad + len(document.bad)
        quarantined += document.bad
        document = document._replace(bad=())
        while first < len(tokens):
            taken = min(len(tokens) - first, size - filled)
            pieces.append(tokens[first : first + taken])
            runs.append((document, first, taken))
            first, filled = first + taken, filled + taken
            if filled == size:
                number += 1
                after = Cursor(number, document.epoch, document.file, document.line, document.byte, first, lines, bad)
                block = _pack(number - 1, lane.index, np.concatenate(pieces), runs, packing)
                yield replace(block, quarantined=tuple(quarantined)), after
                pieces, runs, filled, quarantined = [], [], 0, []
        lines += 1


def _tokens(
    lane: Lane, cursor: Cursor, tokenizer: Tokenizer, *, characters: int
) -> Iterator[tuple[Document, NDArray[np.uint32], int]]:
    """Documents with all their tokens (the end symbol last) and the first one that is still to come."""
    end = np.array([tokenizer.end_of_document], np.uint32)
    first = cursor.token
    for batch in _batches(lane, cursor, characters=characters):
        encoded = tokenizer.encode_documents([document.text for document in batch], threads=1)
        for document, ids in zip(batch, encoded, strict=True):
            yield document._replace(text=""), np.concatenate([ids, end]), first
            first = 0


def _batches(lane: Lane, cursor: Cursor, *, characters: int) -> Iterator[list[Document]]:
    batch, held = [], 0
    for row in lane.documents(cursor):
        batch.append(Document(**row))
        held += 4 + len(row["text"])
        if held >= characters:
            yield batch
            batch, held = [], 0


def _pack(
    number: int, lane: int, stream: NDArray[np.uint32], runs: list[tuple[Document, int, int]], packing: Packing
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
    return Block(number, ids, np.sort(table, order=("row", "start")), documents)
