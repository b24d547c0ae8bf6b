"""Files to lines: local or remote, plain or compressed, never shorter than they are, and the same while they are read.

Bytes are read and decompressed here and in `remote`, because a reader that retries or ends above its decompressor
loses text without a word.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import zstandard

from lamda.config.errors import DataError, DataUnavailableError, RunError, UserError
from lamda.data.identity import Stored, cannot_open, content_of, wrong_sha256
from lamda.data.remote import CHUNK, RemoteFile, Version

LONGEST_LINE = 1 << 26
HTTP = ("http://", "https://")
BOM = codecs.BOM_UTF8

MORSEL = 1 << 11
"""Compressed bytes that are inflated at a time: 4 bytes of zstd can stand for 128 KiB, so these for 64 MiB at most."""

MOST_WINDOW = 1 << 31
"""Bytes that a zstd frame may look back, `zstd --long=31`; memory is taken for what the frame itself asks."""


def nothing() -> None:
    """What is called in a wait where nobody asks; a function with a name goes into other processes with its file."""


@dataclass(frozen=True)
class File:
    """A resolved file and its size in bytes as stored.

    sha256: of the stored bytes, where the card states it. address: where the bytes of a file with an
    `hf://` name come from. content: says whether the text is still the same: a hash of pieces of a local file,
    the tag of a server; None where nothing says so. version: what the server said of it. on_wait: called while a
    server is waited for.
    """

    url: str
    size: int
    sha256: str | None = None
    address: str | None = field(default=None, compare=False)
    content: str | None = field(default=None, compare=False)
    version: Version | None = field(default=None, compare=False)
    on_wait: Callable[[], object] = field(default=nothing, compare=False, repr=False)

    @property
    def is_remote(self) -> bool:
        """Whether it is opened over a network."""
        return "://" in self.url

    @property
    def is_compressed(self) -> bool:
        """Whether its text is shorter as stored."""
        return self.url.endswith((".zst", ".gz"))

    @property
    def name(self) -> str:
        """Its remote address or local name: what a corpus that has moved keeps."""
        return self.url if self.is_remote else Path(self.url).name

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What the order of samples depends on: name, size, and sha256 where known."""
        return (self.name, self.size) if self.sha256 is None else (self.name, self.size, self.sha256)


class Line(NamedTuple):
    """A line without its newline and its number.

    byte: offset of its first byte in the decompressed file. stored: about where that lies in the stored file.
    """

    number: int
    byte: int
    data: bytes
    stored: int


def read_lines(file: File, *, number: int = 0, byte: int = 0) -> Iterator[Line]:
    """The lines of a file from decompressed offset `byte` on, numbered from `number`.

    A line longer than LONGEST_LINE comes as its first LONGEST_LINE + 1 bytes. A byte order mark is no part of a
    line: files that have one are often joined. Raises DataError where the file is shorter than its size, ends inside
    a compressed frame, or is not the one that was resolved.
    """
    begun, length, stored = bytearray(), 0, byte  # of a line that continues in the next chunk
    for chunk in _decompressed(file, skip=byte):
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
    """Bytes of the whole decompressed file, counted; raises as `read_lines`."""
    return sum(len(chunk.data) for chunk in _decompressed(file, skip=0))


def read_all(file: File) -> bytes:
    """The whole decompressed file without a byte order mark; raises as `read_lines`."""
    return b"".join(chunk.data for chunk in _decompressed(file, skip=0)).removeprefix(BOM)


class _Chunk(NamedTuple):
    """Decompressed bytes: those from `skipped` on, of `size` that come from stored bytes `before` to `after`."""

    data: bytes
    before: int
    after: int
    size: int
    skipped: int = 0

    def stored(self, place: int) -> int:
        """About where a place in the data is stored; the same wherever reading began."""
        return self.before + (self.after - self.before) * (self.skipped + place) // self.size


def _decompressed(file: File, *, skip: int) -> Iterator[_Chunk]:
    """Chunks from decompressed offset `skip` on, none empty."""
    if file.url.endswith(".zst"):
        chunks = _inflate(_raw(file), _zstd, file)
    elif file.url.endswith(".gz"):
        chunks = _inflate(_raw(file), lambda: zlib.decompressobj(wbits=31), file, padding=b"\0")
    else:
        for data in _raw(file, start=skip):
            yield _Chunk(data, skip, skip + len(data), len(data))
            skip += len(data)
        return
    for chunk in chunks:
        if skip < chunk.size:
            yield chunk._replace(data=chunk.data[skip:], skipped=skip) if skip else chunk
        skip = max(0, skip - chunk.size)


def _zstd() -> _Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).decompressobj()


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _inflate(
    raw: Iterable[bytes], new: Callable[[], _Decompressor], file: File, *, padding: bytes = b""
) -> Iterator[_Chunk]:
    """The content of all frames, in bounded chunks; `padding` may stand after a frame, as gzip's tools allow."""
    frame: _Decompressor | None = None
    begun, fed = False, 0
    try:
        for compressed in _morsels(raw):
            while compressed:
                if frame is None:
                    stripped = compressed.lstrip(padding) if begun else compressed
                    fed, compressed = fed + len(compressed) - len(stripped), stripped
                    if not compressed:
                        break
                    frame, begun = new(), True
                found, before = frame.decompress(compressed), fed
                rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                fed, compressed = fed + len(compressed) - len(rest), rest
                if found:
                    yield _Chunk(found, before, fed, len(found))
    except (zstandard.ZstdError, zlib.error) as error:
        raise DataError(f"{file.url}: cannot be decompressed, is damaged or of another kind ({error})") from error
    if frame is not None:
        raise DataError(f"{file.url}: ends inside a compressed frame; the file is truncated")


def _morsels(raw: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, MORSEL at a time, however a server hands them out: chunks are a function of the file."""
    rest = b""
    for chunk in raw:
        joined = rest + chunk
        whole = len(joined) - len(joined) % MORSEL
        yield from (joined[start : start + MORSEL] for start in range(0, whole, MORSEL))
        rest = joined[whole:]
    if rest:
        yield rest


def _raw(file: File, *, start: int = 0) -> Iterator[bytes]:
    """The stored bytes from `start` on; those of a whole file are compared with its sha256."""
    hashed, read, digest = file.sha256 is not None and start == 0, start, sha256()
    for chunk in _stored(file, start):
        if hashed:
            digest.update(chunk)
        read += len(chunk)
        yield chunk
    if read != file.size:
        raise DataUnavailableError(f"{file.url}: {read} bytes could be read, but the file has {file.size}")
    if hashed and digest.hexdigest() != file.sha256:
        raise DataError(wrong_sha256(file.url, digest.hexdigest(), str(file.sha256)))


def _stored(file: File, start: int) -> Iterator[bytes]:
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

    with foreign(file.url), fsspec.open(file.url, "rb") as stream:
        stream.seek(start)
        while chunk := stream.read(CHUNK):
            yield chunk


@contextmanager
def opened(file: File) -> Iterator[tuple[BinaryIO, Callable[[], None]]]:
    """A local file that is still the one that was resolved, and a call that raises DataError if it is no longer."""
    try:
        with Path(file.url).open("rb") as stream:
            before = Stored.of(stream)
            if before.size != file.size:
                raise DataError(
                    f"{file.url}: {before.size} bytes could be read, but the file has {file.size}; it was changed"
                )
            if file.content is not None and content_of(stream, file.size) != file.content:
                raise DataError(f"{file.url}: was changed since this run began; put the former file back")

            def require_same() -> None:
                if Stored.of(stream) != before:
                    raise DataError(f"{file.url}: was written to while it was read; put the former file back")

            stream.seek(0)
            yield stream, require_same
    except OSError as error:
        raise cannot_open(file.url, error) from error


def remote_file(file: File) -> RemoteFile | None:
    """A file on an http(s) server, the hub's among them; None for another kind of store."""
    address = file.address or address_of(file.url)
    if address is None:
        return None
    return RemoteFile(file.url, address, _headers(file), version=file.version, on_wait=file.on_wait)


def _headers(file: File) -> dict[str, str]:
    """The user's token, for the hub alone."""
    if not file.url.startswith("hf://"):
        return {}
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return build_hf_headers()


def address_of(url: str) -> str | None:
    """Where an http server gives the file; None for a local file or another kind of store."""
    if url.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        with foreign(url):
            return HfFileSystem().url(url)
    return url if url.startswith(HTTP) else None


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turns what the hub's and other stores' libraries raise into a DataError: they have no class in common."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{what}: cannot be looked up ({type(error).__name__}: {cause}); look at the address, the network (behind "
            "a proxy, https_proxy) and, for what is not public, `hf auth login`"
        ) from error
