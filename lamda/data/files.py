"""Files to lines: local or remote, plain or compressed, never shorter than they are.

`datasets` and `huggingface_hub` resolve names, revisions and globs. Bytes are read and decompressed
here and in `remote`, because a reader that retries or ends above its decompressor loses text without a word.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

import zstandard

from lamda.config.errors import UserError
from lamda.data.card import HubDataset, Source
from lamda.data.errors import DataError
from lamda.data.remote import CHUNK, RemoteFile
from lamda.data.standard_library import write_corpus

LONGEST_LINE = 1 << 26
HTTP = ("http://", "https://")
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")


@dataclass(frozen=True)
class File:
    """A resolved file and its size in bytes as stored.

    sha256: of the stored bytes, where the card states it. address: where the bytes of a file with an
    `hf://` name come from.
    """

    url: str
    size: int
    sha256: str | None = None
    address: str | None = field(default=None, compare=False)

    @property
    def is_remote(self) -> bool:
        """Whether it is opened over a network."""
        return "://" in self.url

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What the order of samples depends on: remote address or local name, size, and sha256 where known."""
        name = self.url if self.is_remote else Path(self.url).name
        return (name, self.size) if self.sha256 is None else (name, self.size, self.sha256)


class Line(NamedTuple):
    """A line without its newline, its number from 0 and the offset of its first decompressed byte."""

    number: int
    byte: int
    data: bytes


def resolve(source: Source) -> list[File]:
    """All files of a source, sorted by address.

    Raises UserError where a pattern names none, and DataError where a size is not the card's.
    """
    if source.dataset is not None:
        return _checked(_with_sizes(_hub_files(source.dataset)), source)
    if source.standard_library is not None:
        write_corpus(Path(source.standard_library))
    from datasets.data_files import resolve_pattern

    found: set[str] = set()
    for pattern in source.files:
        if pattern.startswith(HTTP):
            found.add(pattern)
            continue
        try:
            urls = resolve_pattern(pattern, base_path=str(Path.cwd()))
        except FileNotFoundError as error:
            raise UserError(f"source {source.name!r}: no file matches {pattern!r} (from {Path.cwd()})") from error
        found.update(urls)
    unknown = sorted(url for url in found if not url.endswith(SUFFIXES))
    if unknown:
        raise UserError(f"source {source.name!r}: cannot read {unknown[0]}; files end in {', '.join(SUFFIXES)}")
    return _checked(_with_sizes(sorted(found)), source)


def _hub_files(dataset: HubDataset) -> list[str]:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(dataset.path, name=dataset.name, revision=dataset.revision)
    return sorted(builder.config.data_files[dataset.split])


def _with_sizes(urls: list[str]) -> list[File]:
    import fsspec

    files = []
    for url in urls:
        if url.startswith(HTTP):
            size = RemoteFile(url, url).size()
        else:
            size = fsspec.core.url_to_fs(url)[0].size(url) if "://" in url else Path(url).stat().st_size
        if size is None:
            raise DataError(f"{url}: the server does not say how long the file is")
        files.append(File(url, size, address=_address(url)))
    return files


def _address(url: str) -> str | None:
    """Where an http server gives the file; None for a local file or another kind of store."""
    if url.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().url(url)
    return url if url.startswith(HTTP) else None


def _checked(files: list[File], source: Source) -> list[File]:
    """The files with the card's hashes, their sizes compared with the card's."""
    known = dict.fromkeys(files)
    for name, stated in source.checksums.items():
        named = [file for file in known if f"/{file.url}".endswith(f"/{name}")]
        if len(named) != 1:
            raise UserError(f"source {source.name!r}: its checksums name {name!r}, which is {len(named)} of its files")
        (file,) = named
        if file.size != stated.size:
            raise DataError(f"{file.url}: has {file.size} bytes, but the card says {stated.size}")
        known[file] = replace(file, sha256=stated.sha256)
    return [checked or file for file, checked in known.items()]


def read_lines(file: File, *, number: int = 0, byte: int = 0) -> Iterator[Line]:
    """The lines of a file from line `number`, which begins at decompressed offset `byte`.

    A line longer than LONGEST_LINE comes as its first LONGEST_LINE + 1 bytes. Raises DataError where
    the file is shorter than its size or ends inside a compressed frame.
    """
    begun, length = bytearray(), 0  # of a line that goes on in the next chunk
    for chunk in _decompressed(file, skip=byte):
        *complete, rest = chunk.split(b"\n")
        for data in complete:
            end = byte + length + len(data) + 1
            if length:
                begun += data[: LONGEST_LINE + 1 - len(begun)]
                data, begun, length = bytes(begun), bytearray(), 0
            yield Line(number, byte, data[: LONGEST_LINE + 1])
            number, byte = number + 1, end
        begun += rest[: LONGEST_LINE + 1 - len(begun)]
        length += len(rest)
    if length:
        yield Line(number, byte, bytes(begun))


def read_all(file: File) -> bytes:
    """The whole decompressed file; raises as `read_lines`."""
    return b"".join(_decompressed(file, skip=0))


def _decompressed(file: File, *, skip: int) -> Iterator[bytes]:
    if file.url.endswith(".zst"):
        chunks = _inflate(_raw(file), lambda: zstandard.ZstdDecompressor().decompressobj(), file)
    elif file.url.endswith(".gz"):
        chunks = _inflate(_raw(file), lambda: zlib.decompressobj(wbits=31), file)
    else:
        yield from _raw(file, start=skip)
        return
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:] if skip else chunk
        skip = max(0, skip - len(chunk))


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _inflate(raw: Iterable[bytes], new: Callable[[], _Decompressor], file: File) -> Iterator[bytes]:
    frame: _Decompressor | None = None
    try:
        for compressed in raw:
            while compressed:
                frame = frame or new()
                yield frame.decompress(compressed)
                compressed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except (zstandard.ZstdError, zlib.error) as error:
        raise DataError(f"{file.url}: damaged compressed data ({error})") from error
    if frame is not None:
        raise DataError(f"{file.url}: ends inside a compressed frame; the file is truncated")


def _raw(file: File, *, start: int = 0) -> Iterator[bytes]:
    read, digest = start, sha256()
    hashed = file.sha256 is not None and start == 0
    for chunk in _stored(file, start):
        read += len(chunk)
        if hashed:
            digest.update(chunk)
        yield chunk
    if read != file.size:
        raise DataError(f"{file.url}: {read} bytes could be read, but the file has {file.size}")
    if hashed and digest.hexdigest() != file.sha256:
        raise DataError(f"{file.url}: its sha256 is {digest.hexdigest()}, but the card says {file.sha256}")


def _stored(file: File, start: int) -> Iterator[bytes]:
    address = file.address or _address(file.url)
    if address is not None:
        yield from RemoteFile(file.url, address, _headers(file)).read(size=file.size, start=start)
        return
    import fsspec

    with fsspec.open(file.url, "rb") as stream:
        stream.seek(start)
        while chunk := stream.read(CHUNK):
            yield chunk


def _headers(file: File) -> dict[str, str]:
    """The user's token, for the hub alone."""
    if not file.url.startswith("hf://"):
        return {}
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return build_hf_headers()
