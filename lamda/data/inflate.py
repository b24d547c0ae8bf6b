"""From stored bytes to the bytes of a text: decompression and other encodings, in chunks of bounded size."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from lamda.config.errors import DataError
from lamda.data.encodings import SAMPLE
from lamda.data.file_formats import DECOMPRESSION_ERRORS, Compression, Decompressor

INPUT_CHUNK = 1 << 11
"""Compressed bytes per call of a decompressor: 4 bytes of zstd can expand to 128 KiB, so these to at most 64 MiB."""

PLAIN_CHUNK = 1 << 18


class Chunk(NamedTuple):
    """Decompressed bytes from offset `skipped` on, of `size` bytes that are stored in bytes `before` to `after`."""

    data: bytes
    before: int
    after: int
    size: int
    skipped: int = 0

    def stored(self, place: int) -> int:
        """Approximate stored offset of a position in the data, independent of where reading began."""
        return self.before + (self.after - self.before) * (self.skipped + place) // self.size


def plain(stored: Iterable[bytes]) -> Iterator[Chunk]:
    """Stored bytes as they are."""
    at = 0
    for data in _input_chunks(stored, PLAIN_CHUNK):
        yield Chunk(data, at, at + len(data), len(data))
        at += len(data)


def inflate(stored: Iterable[bytes], compression: Compression, name: str) -> Iterator[Chunk]:
    """The content of all frames, in bounded chunks. Raises DataError with `name` for damaged and truncated data."""
    frame: Decompressor | None = None
    begun, fed = False, 0
    try:
        for compressed in _input_chunks(stored, INPUT_CHUNK):
            while compressed:
                if frame is None:
                    stripped = compressed.lstrip(compression.padding) if begun else compressed
                    fed, compressed = fed + len(compressed) - len(stripped), stripped
                    if not compressed:
                        break
                    frame, begun = compression.new_decompressor(), True
                found, before = frame.decompress(compressed), fed
                rest = frame.unused_data if frame.eof else b""
                fed, compressed = fed + len(compressed) - len(rest), rest
                if found:
                    yield Chunk(found, before, fed, len(found))
                while getattr(frame, "is_full", False) and (found := frame.decompress(b"")):
                    yield Chunk(found, before, fed, len(found))
                frame = None if frame.eof else frame
    except DECOMPRESSION_ERRORS as error:
        raise DataError(f"{name}: cannot be decompressed: damaged, or another format ({error})") from error
    if frame is not None:
        raise DataError(f"{name}: ends inside a compressed frame; the file is truncated")


def _input_chunks(stored: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes, `size` at a time, whatever the sizes of the reads: chunks are a function of the file."""
    rest = b""
    for chunk in stored:
        joined = rest + chunk
        whole = len(joined) - len(joined) % size
        yield from (joined[start : start + size] for start in range(0, whole, size))
        rest = joined[whole:]
    if rest:
        yield rest


def sampled(chunks: Iterator[Chunk]) -> tuple[list[Chunk], Iterator[Chunk]]:
    """The first chunks of a text, from which its encoding follows, and all of its chunks."""
    first, size = list[Chunk](), 0
    while size < SAMPLE and (chunk := next(chunks, None)) is not None:
        first.append(chunk)
        size += len(chunk.data)
    return first, chain(first, chunks)


def joined(chunks: Iterable[Chunk]) -> bytes:
    """Their text."""
    return b"".join(chunk.data for chunk in chunks)


def transcoded(chunks: Iterable[Chunk], encoding: str) -> Iterator[Chunk]:
    """Text in another encoding as UTF-8; bytes that the encoding does not have become U+FFFD."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for chunk in chunks:
        if data := decoder.decode(chunk.data).encode("utf-8", "replace"):
            yield Chunk(data, chunk.before, chunk.after, len(data))
    if data := decoder.decode(b"", final=True).encode("utf-8", "replace"):
        yield Chunk(data, chunk.after, chunk.after, len(data))
