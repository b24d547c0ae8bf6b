"""Files to lines: local or remote, plain or compressed, never shorter than they are.

`datasets` and `huggingface_hub` resolve names, revisions and globs. Bytes are read and decompressed
here, because a reader that retries or ends above its decompressor loses text without a word.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import zstandard

from lamda.config.errors import UserError
from lamda.data.card import HubDataset, Source
from lamda.data.standard_library import write_corpus

CHUNK = 1 << 18
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")


class DataError(UserError):
    """Text that cannot be read as it should; names the file and the line."""


@dataclass(frozen=True)
class File:
    """A resolved file: its address and its size in bytes as stored."""

    url: str
    size: int

    @property
    def is_remote(self) -> bool:
        """Whether it is opened over a network."""
        return "://" in self.url

    @property
    def identity(self) -> tuple[str, int]:
        """What the order of samples depends on: a remote address, or a local name wherever it lies."""
        return (self.url if self.is_remote else Path(self.url).name, self.size)


class Line(NamedTuple):
    """A line without its newline, its number from 0 and the offset of its first decompressed byte."""

    number: int
    byte: int
    data: bytes


def resolve(source: Source) -> list[File]:
    """All files of a source, sorted by address. Raises UserError where a pattern names none."""
    if source.dataset is not None:
        return _with_sizes(_hub_files(source.dataset))
    if source.standard_library is not None:
        write_corpus(Path(source.standard_library))
    from datasets.data_files import resolve_pattern

    found: set[str] = set()
    for pattern in source.files:
        try:
            urls = resolve_pattern(pattern, base_path=str(Path.cwd()))
        except FileNotFoundError as error:
            raise UserError(f"source {source.name!r}: no file matches {pattern!r} (from {Path.cwd()})") from error
        found.update(urls)
    unknown = sorted(url for url in found if not url.endswith(SUFFIXES))
    if unknown:
        raise UserError(f"source {source.name!r}: cannot read {unknown[0]}; files end in {', '.join(SUFFIXES)}")
    return _with_sizes(sorted(found))


def _hub_files(dataset: HubDataset) -> list[str]:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(dataset.path, name=dataset.name, revision=dataset.revision)
    return sorted(builder.config.data_files[dataset.split])


def _with_sizes(urls: list[str]) -> list[File]:
    import fsspec

    files = []
    for url in urls:
        size = fsspec.core.url_to_fs(url)[0].size(url) if "://" in url else Path(url).stat().st_size
        if size is None:
            raise DataError(f"{url}: the server does not say how long the file is")
        files.append(File(url, size))
    return files


def read_lines(file: File, *, number: int = 0, byte: int = 0) -> Iterator[Line]:
    """The lines of a file from line `number`, which begins at decompressed offset `byte`.

    Raises DataError where the file is shorter than its size or ends inside a compressed frame.
    """
    rest = b""
    for chunk in _decompressed(file, skip=byte):
        *complete, rest = (rest + chunk).split(b"\n")
        for data in complete:
            yield Line(number, byte, data)
            number, byte = number + 1, byte + len(data) + 1
    if rest:
        yield Line(number, byte, rest)


def read_all(file: File) -> bytes:
    """The whole decompressed file; raises as `read_lines`."""
    return b"".join(_decompressed(file, skip=0))


def _decompressed(file: File, *, skip: int) -> Iterator[bytes]:
    if file.url.endswith(".zst"):
        chunks = _inflate(_raw(file), lambda: zstandard.ZstdDecompressor().decompressobj(), file)
    elif file.url.endswith(".gz"):
        chunks = _inflate(_raw(file), partial(zlib.decompressobj, wbits=31), file)
    else:
        yield from _raw(file, start=skip)
        return
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:] if skip else chunk
        skip = max(0, skip - len(chunk))


class _Decompressor(Protocol):
    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes) -> bytes: ...


def _inflate(raw: Iterable[bytes], new: partial[_Decompressor], file: File) -> Iterator[bytes]:
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
    import fsspec

    read = start
    with fsspec.open(file.url, "rb") as stream:
        stream.seek(start)
        while chunk := stream.read(CHUNK):
            read += len(chunk)
            yield chunk
    if read != file.size:
        raise DataError(f"{file.url}: {read} bytes could be read, but the file has {file.size}")
