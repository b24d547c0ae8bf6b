"""Words and word n-grams of many documents together, as 64-bit hashes.

A word is a run of letters, digits and non-ASCII characters, in lower case; a Chinese character or kana is a word in
itself. Each array operation covers a megabyte of text, since documents are short and a call costs a microsecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lamda.data.hashing import splitmix64

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

PIECE = 1 << 20
"""Bytes that are cut into words at a time. A longer document is cut at a space before that, or there."""

_PLACES = splitmix64(np.arange(1 << 10, dtype=np.uint64)) | np.uint64(1)
"""Multipliers by place, of a byte in its word and of a word in its n-gram."""


def _byte_tables() -> tuple[NDArray[np.bool_], NDArray[np.bool_], Hashes]:
    """For each byte: whether it is part of a word, whether it begins a character that is a word, and its hash."""
    is_word, is_single = np.zeros(256, bool), np.zeros(256, bool)
    for low, high in (("0", "9"), ("A", "Z"), ("a", "z")):
        is_word[ord(low) : ord(high) + 1] = True
    is_word[0x80:] = True
    is_single[0xE3:0xEA] = True  # U+3000 to U+9FFF in UTF-8
    hashes = splitmix64(np.arange(256, dtype=np.uint64) + np.uint64(1 << 32))
    hashes[ord("A") : ord("Z") + 1] = hashes[ord("a") : ord("z") + 1]
    return is_word, is_single, np.where(is_word, hashes, np.uint64(0))


_IS_WORD, _IS_SINGLE, _BYTES = _byte_tables()
NOT_WORD = bytes(np.flatnonzero(~_IS_WORD).tolist())
"""The bytes between words."""


def words(documents: Sequence[bytes]) -> tuple[Hashes, Offsets]:
    """The words of documents, one after the other, and where each document begins, [n + 1]."""
    counts = np.zeros(len(documents), np.int64)
    found = []
    for owners, pieces in _joined(documents):
        starts, hashes = _words_of(b"\0".join(pieces))
        begins = np.cumsum([0, *(len(piece) + 1 for piece in pieces[:-1])])
        np.add.at(counts, owners, np.diff(np.append(np.searchsorted(starts, begins), len(starts))))
        found.append(hashes)
    return np.concatenate([np.zeros(0, np.uint64), *found]), np.concatenate([[0], np.cumsum(counts)])


def _joined(documents: Sequence[bytes]) -> Iterator[tuple[list[int], list[bytes]]]:
    """Pieces of documents, about PIECE bytes together, and the document of each."""
    owners: list[int] = []
    pieces: list[bytes] = []
    size = 0
    for owner, document in enumerate(documents):
        for piece in _pieces(document):
            owners.append(owner)
            pieces.append(piece)
            size += len(piece)
            if size >= PIECE:
                yield owners, pieces
                owners, pieces, size = [], [], 0
    if pieces:
        yield owners, pieces


def _pieces(document: bytes) -> Iterator[bytes]:
    start = 0
    while len(document) - start > PIECE:
        space = document.rfind(b" ", start + PIECE // 2, start + PIECE)
        end = space if space > 0 else start + PIECE
        yield document[start:end]
        start = end
    yield document[start:]


def _words_of(text: bytes) -> tuple[NDArray[np.int64], Hashes]:
    """Where the words of a text begin, and their hashes: a sum over bytes, each multiplied by its place."""
    data = np.frombuffer(text, np.uint8)
    is_word, is_single = _IS_WORD[data], _IS_SINGLE[data]
    begins = is_word.copy()
    begins[1:] &= ~is_word[:-1]
    if is_single.any():
        begins |= is_single
        begins[3:] |= is_single[:-3] & is_word[3:]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return starts, np.zeros(0, np.uint64)
    first = int(starts[0])
    lengths = np.diff(np.append(starts, len(data)))
    place = np.arange(first, len(data), dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
    values = _BYTES[data[first:]] * _PLACES[place & (len(_PLACES) - 1)]
    return starts, np.add.reduceat(values, starts - first)


def ngrams(hashes: Hashes, offsets: Offsets, size: int) -> tuple[Hashes, Offsets]:
    """The n-grams of `size` words inside each document, and where each document's begin, [n + 1]."""
    counts = np.maximum(np.diff(offsets) - size + 1, 0)
    begins = np.concatenate([[0], np.cumsum(counts)])
    if not begins[-1]:
        return np.zeros(0, np.uint64), begins
    total = len(hashes) - size + 1
    found = np.zeros(total, np.uint64)
    for place in range(size):
        found += hashes[place : place + total] * _PLACES[-1 - place]
    at = np.arange(begins[-1]) + np.repeat(offsets[:-1] - begins[:-1], counts)
    return splitmix64(found[at]), begins
