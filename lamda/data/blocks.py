"""Blocks: the next rows of a lane, a pure function of (card, tokenizer, packing, seed, cursor)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamda.data.hashing import permutation
from lamda.data.lanes import Cursor, Document, Lane
from lamda.data.tokenizer import Tokenizer

ENCODE_CHARACTERS = 1 << 17
"""Text that goes through the encoder at a time, or about a block's worth where that is less."""

RUN = np.dtype([("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("document", "<i4"), ("token", "<i8")])
"""A stretch of a row that comes from one document: tokens `token`, `token + 1`, ... of it."""


@dataclass(frozen=True)
class Block:
    """R rows of sequence_length + 1 tokens, and where every token came from.

    ids: [R, L+1] uint32. runs: [n] RUN, by row and start; `document` indexes `documents`.
    """

    number: int
    ids: NDArray[np.uint32]
    runs: NDArray[np.void]
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class Packing:
    """How a lane's tokens become rows.

    rows: R, rows a block. row_length: tokens a row (targets + 1). seed: of the permutation of rows.
    """

    rows: int
    row_length: int
    seed: int


def read_blocks(
    lane: Lane, cursor: Cursor, *, packing: Packing, tokenizer: Tokenizer
) -> Iterator[tuple[Block, Cursor]]:
    """The lane's blocks from `cursor.block` on, for ever, each with the cursor of the next."""
    size = packing.rows * packing.row_length
    number, filled = cursor.block, 0
    pieces: list[NDArray[np.uint32]] = []
    runs: list[tuple[Document, int, int]] = []
    for document, tokens, first in _tokens(lane, cursor, tokenizer, characters=min(ENCODE_CHARACTERS, 4 * size)):
        while first < len(tokens):
            taken = min(len(tokens) - first, size - filled)
            pieces.append(tokens[first : first + taken])
            runs.append((document, first, taken))
            first, filled = first + taken, filled + taken
            if filled == size:
                number += 1
                after = Cursor(number, document.epoch, document.file, document.line, document.byte, first)
                yield _pack(number - 1, lane.index, np.concatenate(pieces), runs, packing), after
                pieces, runs, filled = [], [], 0


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
    """Rows in the stream's order (`concat`), cut wherever a row ends, then permuted."""
    order = permutation(packing.rows, packing.seed, lane, number)
    place = np.argsort(order)
    documents: dict[tuple[int, int, int], int] = {}
    table: list[Document] = []
    cut: list[tuple[int, int, int, int, int]] = []
    position = 0
    for document, token, length in runs:
        index = documents.setdefault((document.epoch, document.file, document.line), len(documents))
        if index == len(table):
            table.append(document)
        while length:
            row, start = divmod(position, packing.row_length)
            taken = min(length, packing.row_length - start)
            cut.append((place[row], start, taken, index, token))
            position, token, length = position + taken, token + taken, length - taken
    ids = stream.reshape(packing.rows, packing.row_length)[order]
    return Block(number, ids, np.sort(np.array(cut, RUN), order=("row", "start")), tuple(table))
