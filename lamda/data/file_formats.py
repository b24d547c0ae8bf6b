"""The file formats of text, by suffix: what a file holds, and how it is decompressed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import zstandard

DECOMPRESSION_ERRORS = (zstandard.ZstdError, zlib.error)
"""Raised by the decompressors for damaged data."""

MAX_ZSTD_WINDOW = 1 << 31
"""Largest zstd window, as of `zstd --long=31`; memory is allocated for the window of the actual frame."""


class Decompressor(Protocol):
    """Decompresses one frame, as the objects of `bz2`, `lzma`, `zlib` and `zstandard` do."""

    @property
    def eof(self) -> bool:
        """Whether the end of the frame was reached."""

    @property
    def unused_data(self) -> bytes:
        """The bytes after the end of the frame."""

    def decompress(self, data: bytes, /) -> bytes:
        """The decompressed bytes of the next part of the frame."""


class FileFormat(NamedTuple):
    """A format of text files.

    records: a JSON record per line; the rows of a parquet file; or the whole file, one document. new_decompressor: for
    one frame; None: stored plain. padding: bytes that may follow a frame.
    """

    suffix: str
    records: Literal["lines", "rows", "document"]
    new_decompressor: Callable[[], Decompressor] | None = None
    padding: bytes = b""

    @property
    def is_indexed(self) -> bool:
        """Whether a record is found by its number in the file, as in parquet; lines are found by their byte."""
        return self.records == "rows"


def _new_zstd() -> Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj()


FORMATS = (
    FileFormat(".jsonl", "lines"),
    FileFormat(".jsonl.zst", "lines", _new_zstd),
    FileFormat(".jsonl.gz", "lines", lambda: zlib.decompressobj(wbits=31), padding=b"\0"),
    FileFormat(".parquet", "rows"),
    FileFormat(".txt", "document"),
)

SUFFIXES = tuple(each.suffix for each in FORMATS)


def format_of(name: str) -> FileFormat:
    """The format of a file by its name; plain lines for an unknown suffix."""
    return next((each for each in FORMATS if name.endswith(each.suffix)), FORMATS[0])
