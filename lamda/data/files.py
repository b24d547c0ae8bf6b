"""Reading files, local or remote, plain or compressed; truncated and changed files are errors.

Bytes are read and decompressed here and in `remote`: a reader that retries or stops above the decompressor would lose
text silently.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from lamda.config.errors import DataError, DataUnavailableError, RunError, UserError
from lamda.data.file_formats import LINES, FileFormat, Records, format_of
from lamda.data.identity import Stored, cannot_open, content_of, require_sha256, wrong_sha256
from lamda.data.inflate import Chunk, inflate, plain, transcoded
from lamda.data.remote import CHUNK, RemoteFile, Version

LONGEST_LINE = 1 << 26
HTTP = ("http://", "https://")
BOM = codecs.BOM_UTF8

ASSUMED_COMPRESSION_RATIO = 3
"""Assumed compression ratio of a file that is not decompressed beforehand."""


def no_op() -> None:
    """The default `on_wait`; a named function, so that it can be pickled."""


@dataclass(frozen=True)
class File:
    """A resolved file and its size in bytes as stored.

    sha256: of the stored bytes, if the card states it. address: download address of a file with an `hf://` name.
    content: identifies the content: a hash of pieces of a local file, or the tag of a server; None if there is none.
    version: from the server. encoding: of its text, if that is not UTF-8. is_sectioned: a plain text so long that it is
    read as several documents (`lamda.data.sections`). on_wait: called while waiting for a server.
    """

    url: str
    size: int
    sha256: str | None = None
    address: str | None = field(default=None, compare=False)
    content: str | None = field(default=None, compare=False)
    version: Version | None = field(default=None, compare=False)
    encoding: str | None = field(default=None, compare=False)
    is_sectioned: bool = field(default=False, compare=False)
    on_wait: Callable[[], object] = field(default=no_op, compare=False, repr=False)

    @property
    def is_remote(self) -> bool:
        """Whether it is read over a network."""
        return "://" in self.url

    @property
    def format(self) -> FileFormat:
        """What it holds, and how it is stored."""
        return format_of(self.url) or LINES

    @property
    def records(self) -> Records | Literal["sections"]:
        """How its documents are found."""
        return "sections" if self.is_sectioned else self.format.records

    @property
    def is_indexed(self) -> bool:
        """Whether a record is found by its number in the file, as in parquet; lines are found by their byte."""
        return self.records not in ("lines", "json")

    @property
    def text_size(self) -> int:
        """About the bytes of its text."""
        packed = self.format.compression is not None or self.records == "zip"
        return self.size * (ASSUMED_COMPRESSION_RATIO if packed else 1)

    @property
    def is_compressed(self) -> bool:
        """Whether it is stored compressed or in another encoding, so that offsets in its text are not those stored."""
        return self.format.compression is not None or self.encoding is not None

    @property
    def name(self) -> str:
        """Its remote address or local file name, which stays the same if the corpus is moved."""
        return self.url if self.is_remote else Path(self.url).name

    @property
    def identity(self) -> tuple[str | int, ...]:
        """The part of the fingerprint: name, size, and sha256 if known."""
        return (self.name, self.size) if self.sha256 is None else (self.name, self.size, self.sha256)


class Line(NamedTuple):
    """A line without its newline. byte, stored: its offset in the decompressed and, about, in the stored file."""

    number: int
    byte: int
    data: bytes
    stored: int


def read_lines(file: File, *, number: int = 0, byte: int = 0) -> Iterator[Line]:
    """The lines of a file from decompressed offset `byte` on, numbered from `number`; see `lines_in`.

    Raises DataError if the file is shorter than its size, ends inside a compressed frame, or is not the one that was
    resolved.
    """
    yield from lines_in(chunks_of(file, skip=byte), number=number, byte=byte)


def lines_in(chunks: Iterable[Chunk], *, number: int = 0, byte: int = 0) -> Iterator[Line]:
    """The lines of a text whose first chunk begins at offset `byte`, numbered from `number`.

    A line longer than LONGEST_LINE is cut to LONGEST_LINE + 1 bytes. Byte order marks are removed from every line:
    files that have one are often concatenated.
    """
    begun, length, stored = bytearray(), 0, byte  # of a line that continues in the next chunk
    for chunk in chunks:
        *complete, rest = chunk.data.split(b"\n")
        at = 0  # in the chunk
        for data in complete:
            end = byte + length + len(data) + 1
            begins = stored if length else chunk.stored(at)
            at += len(data) + 1
            if length:
                begun += data[: LONGEST_LINE + 1 - len(begun)]
                data, begun, length = bytes(begun), bytearray(), 0
            yield Line(number, byte, data[: LONGEST_LINE + 1].removeprefix(BOM), begins)
            number, byte = number + 1, end
        if rest and not length:
            stored = chunk.stored(at)
        begun += rest[: LONGEST_LINE + 1 - len(begun)]
        length += len(rest)
    if length:
        yield Line(number, byte, bytes(begun).removeprefix(BOM), stored)


def decompressed_size(file: File) -> int:
    """Size of the decompressed file in bytes, by decompressing it; raises as `read_lines`."""
    return sum(len(chunk.data) for chunk in chunks_of(file))


def read_all(file: File) -> bytes:
    """The whole decompressed file without a byte order mark; raises as `read_lines`."""
    return b"".join(chunk.data for chunk in chunks_of(file)).removeprefix(BOM)


def chunks_of(file: File, *, skip: int = 0) -> Generator[Chunk]:
    """The decompressed text of a file, as UTF-8, from offset `skip` on, in chunks of which none is empty."""
    compression = file.format.compression
    if not file.is_compressed:
        for data in stored_bytes(file, start=skip):
            yield Chunk(data, skip, skip + len(data), len(data))
            skip += len(data)
        return
    chunks = plain(stored_bytes(file)) if compression is None else inflate(stored_bytes(file), compression, file.url)
    for chunk in chunks if file.encoding is None else transcoded(chunks, file.encoding):
        if skip < chunk.size:
            yield chunk._replace(data=chunk.data[skip:], skipped=skip) if skip else chunk
        skip = max(0, skip - chunk.size)


def stored_bytes(file: File, *, start: int = 0) -> Iterator[bytes]:
    """The stored bytes from `start` on; a whole file is checked against its sha256."""
    hashed, read, digest = file.sha256 is not None and start == 0, start, sha256()
    for chunk in _read(file, start):
        if hashed:
            digest.update(chunk)
        read += len(chunk)
        yield chunk
    if read != file.size:
        raise DataUnavailableError(f"{file.url}: {read} bytes could be read, but the file has {file.size}")
    if hashed and digest.hexdigest() != file.sha256:
        raise DataError(wrong_sha256(file.url, digest.hexdigest(), str(file.sha256)))


def _read(file: File, start: int) -> Iterator[bytes]:
    if not file.is_remote:
        with opened(file) as (stream, require_same):
            stream.seek(start)
            while chunk := stream.read(CHUNK):
                require_same()
                yield chunk
        return
    if (remote := remote_file(file)) is not None:
        yield from remote.read(size=file.size, start=start)
        return
    import fsspec

    with wrap_library_errors(file.url), fsspec.open(file.url, "rb") as stream:
        stream.seek(start)
        while chunk := stream.read(CHUNK):
            yield chunk


@contextmanager
def opened(file: File) -> Iterator[tuple[BinaryIO, Callable[[], None]]]:
    """Open a local file, checked to be the resolved one; also yields a check that raises DataError if it changes."""
    try:
        with Path(file.url).open("rb") as stream:
            before = Stored.of(stream)
            if before.size != file.size:
                raise DataError(
                    f"{file.url}: {before.size} bytes could be read, but the file has {file.size}; it was changed"
                )
            if file.content is not None and content_of(stream, file.size) != file.content:
                raise DataError(f"{file.url}: was changed since this run began; restore the former file")

            def require_same() -> None:
                if Stored.of(stream) != before:
                    raise DataError(f"{file.url}: was written to while it was read; restore the former file")

            stream.seek(0)
            yield stream, require_same
    except OSError as error:
        raise cannot_open(file.url, error) from error


@contextmanager
def open_seekable(file: File) -> Iterator[tuple[BinaryIO | io.RawIOBase, Callable[[], None]]]:
    """Open a file, local or remote, for reading at any offset; the check that is also yielded is as in `opened`."""
    if not file.is_remote:
        if file.sha256 is not None:  # not read sequentially, so it cannot be hashed while reading
            require_sha256(file.url, file.sha256)
        with opened(file) as found:
            yield found
    elif (remote := remote_file(file)) is not None:
        yield _RemoteStream(remote, file.size), no_op
    else:
        import fsspec

        with wrap_library_errors(file.url), fsspec.open(file.url, "rb") as stream:
            yield stream, no_op


class _RemoteStream(io.RawIOBase):
    """A seekable remote file; each read is one request."""

    def __init__(self, file: RemoteFile, size: int) -> None:
        self._file, self._size, self._position = file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._size, self._position + size)
        found = b"".join(self._file.read(size=self._size, start=self._position, stop=stop))
        self._position += len(found)
        return found


def remote_file(file: File) -> RemoteFile | None:
    """A file on an http(s) server, including the hub; None for other stores."""
    address = file.address or address_of(file.url)
    if address is None:
        return None
    headers: dict[str, str] = {}
    if file.url.startswith("hf://"):  # the token of the user, for the hub only
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers()
    return RemoteFile(file.url, address, headers, version=file.version, on_wait=file.on_wait)


def address_of(url: str) -> str | None:
    """The http(s) address of a file; None for a local file or other stores."""
    if url.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        with wrap_library_errors(url):
            return HfFileSystem().url(url)
    return url if url.startswith(HTTP) else None


@contextmanager
def wrap_library_errors(name: str) -> Iterator[None]:
    """Convert exceptions of the libraries of the hub and other stores to DataError; they have no common base class."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: cannot be looked up ({type(error).__name__}: {cause}); look at the address, the network (behind "
            "a proxy, https_proxy) and, for what is not public, `hf auth login`"
        ) from error
