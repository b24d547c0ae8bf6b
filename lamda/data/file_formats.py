"""The file formats of text, by suffix: what a file holds, and apart from it, how it is compressed."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol

import zstandard

DECOMPRESSION_ERRORS = (zstandard.ZstdError, zlib.error, lzma.LZMAError, OSError)
"""Raised by the decompressors for damaged data; OSError by `bz2`."""

MAX_ZSTD_WINDOW = 1 << 31
"""Largest zstd window, as of `zstd --long=31`; memory is allocated for the window of the actual frame."""

MAX_OUTPUT = 1 << 26
"""Bytes that one call of a decompressor returns at most: 2 KiB of bz2 could expand to gigabytes."""


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


class _Bounded:
    """A decompressor of `bz2` or `lzma` that returns at most MAX_OUTPUT bytes; `is_full`: it has more without input."""

    def __init__(self, inner: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._inner = inner

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def is_full(self) -> bool:
        return not self._inner.needs_input and not self._inner.eof

    def decompress(self, data: bytes, /) -> bytes:
        return self._inner.decompress(data, max_length=MAX_OUTPUT)


class Compression(NamedTuple):
    """A compression. new_decompressor: for one frame. padding: bytes that may follow a frame."""

    new_decompressor: Callable[[], Decompressor]
    padding: bytes = b""


COMPRESSIONS = {
    ".gz": Compression(lambda: zlib.decompressobj(wbits=31), padding=b"\0"),
    ".zst": Compression(lambda: zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj()),
    ".xz": Compression(lambda: _Bounded(lzma.LZMADecompressor()), padding=b"\0"),
    ".bz2": Compression(lambda: _Bounded(bz2.BZ2Decompressor())),
}

Records = Literal["lines", "json", "table", "rows", "batches", "document", "page", "zip", "tar"]
"""What a file holds: a JSON record per line; such lines or one JSON array; a table of delimited values with a header;
parquet; Arrow; one document of plain text; one HTML document; an archive of documents."""

FORMATS: dict[str, Records] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "rows",
    ".arrow": "batches",
    ".html": "page",
    ".htm": "page",
    ".zip": "zip",
    ".tar": "tar",
    ".txt": "document",
    ".text": "document",
    ".md": "document",
    ".markdown": "document",
    ".rst": "document",
    ".tex": "document",
    ".org": "document",
}

SOURCE_CODE = (  # suffixes without their dot  # noqa: SIM905
    "adb ads asm awk bash bib c cc cl clj cljs cmake coffee cpp cs css cu cuh cxx d dart el elm erl ex exs f f90 f95 "
    "fish for fs fsx go gradle graphql groovy h hh hpp hrl hs hxx idl ini ipp java jl js jsx kt kts lean less lisp lua "
    "m mjs mk ml mli nim nix pas php pl pm proto ps1 py pyi pyx r rake rb rkt rs s sass scala scm scss sh sol sql "
    "swift sv tcl tf toml ts tsx v vb vhd vim vue xml yaml yml zig zsh"
).split()
FORMATS |= {f".{name}": "document" for name in SOURCE_CODE}

UNCOMPRESSED = ("rows", "batches", "zip")
"""Records that are not read as a stream, so that they are stored without compression around them."""

SHORT = {".tgz": ".tar.gz", ".txz": ".tar.xz", ".tbz2": ".tar.bz2"}


class FileFormat(NamedTuple):
    """What a file holds, its suffix without that of the compression, and its compression; None: stored plain."""

    records: Records
    suffix: str
    compression: Compression | None = None


LINES = FileFormat("lines", ".jsonl")


def format_of(name: str) -> FileFormat | None:
    """The format of a file by its name; None for an unknown suffix."""
    name = name.partition("?")[0].lower() if name.startswith("http") else name.lower()
    name = next((name.removesuffix(short) + long for short, long in SHORT.items() if name.endswith(short)), name)
    compression = next((each for suffix, each in COMPRESSIONS.items() if name.endswith(suffix)), None)
    if compression is not None:
        name = name.rpartition(".")[0]
    suffix = suffix_of(name)
    records = FORMATS.get(suffix)
    if records is None or (compression is not None and records in UNCOMPRESSED):
        return None
    return FileFormat(records, suffix, compression)


def suffix_of(name: str) -> str:
    """The last suffix of a file name, in lower case; empty if there is none."""
    _, dot, suffix = name.rpartition("/")[2].lower().lstrip(".").rpartition(".")
    return dot + suffix if _ else ""


def suffixes_of(*records: Records) -> Iterable[str]:
    """The suffixes of files that hold such records, for messages."""
    return (suffix for suffix, each in FORMATS.items() if each in records and suffix[1:] not in SOURCE_CODE)


READABLE = (
    f"text is read from {', '.join(suffixes_of('lines', 'json', 'table'))} (also .gz, .zst, .xz, .bz2), "
    f"{', '.join(suffixes_of('rows', 'batches'))}, {', '.join(suffixes_of('document', 'page'))}, source code, "
    f"{', '.join(suffixes_of('zip', 'tar'))}, .tar.gz"
)
"""For messages: what can be read."""
