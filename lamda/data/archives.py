"""The documents in .zip and .tar archives, in the order of the archive.

A member is read by its suffix, as a file is. Members of other kinds, hidden ones, links, and archives in archives are
left out. Sizes that a header states are not trusted: a document is read up to LONGEST_LINE.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, NamedTuple

from lamda.config.errors import DataError
from lamda.data.encodings import decoded, encoding_of_lines
from lamda.data.file_formats import UNCOMPRESSED, FileFormat, format_of
from lamda.data.files import LONGEST_LINE, File, chunks_of, lines_in, open_seekable
from lamda.data.inflate import Chunk, inflate, joined, plain, sampled, transcoded
from lamda.data.pages import text_of_page
from lamda.data.records import DELIMITERS, Record, Text, is_array, read_array, read_table
from lamda.data.remote import CHUNK

MAX_RATIO = 1100
"""Deflate expands at most by this; an archive that states more has overlapping members."""

LONGEST_HEADER = 1 << 20
"""Bytes of a long name, or of other facts about a member of a tar."""

_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError, DataError,
)  # fmt: skip


class _BrokenArchiveError(DataError):
    """The archive itself cannot be read any further."""


class _Member(NamedTuple):
    """A file in an archive. stored: about its offset there. stream: its bytes; None if unreadable (`problem`)."""

    name: str
    stored: int
    stream: IO[bytes] | None = None
    problem: str = ""


def read_archive(file: File, *, first: int) -> Iterator[Record]:
    """The records of an archive's members from number `first` on.

    Raises DataError if it is no archive, truncated, or made to expand without end.
    """
    number = 0
    for member in _members(file):
        for size, value in _records_of(member) if is_read(member.name) else ():
            if number >= first:
                yield Record(number, 0, member.stored, size, value, member.name)
            number += 1


def unread_members(file: File) -> Iterator[str]:
    """The names of members that are not read for their kind; raises as `read_archive`."""
    return (member.name for member in _members(file) if not is_read(member.name) and not _is_hidden(member.name))


def is_read(name: str) -> bool:
    """Whether a member of this name is read."""
    found = format_of(name)
    return found is not None and found.records not in (*UNCOMPRESSED, "tar") and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__")) and part != ".." for part in PurePosixPath(name).parts)


def _members(file: File) -> Iterator[_Member]:
    return _in_zip(file) if file.records == "zip" else _in_tar(file)


def _records_of(member: _Member) -> Iterator[tuple[int, object]]:
    """Size, about, and value of each record of a member."""
    stream, found = member.stream, format_of(member.name)
    if stream is None or found is None:
        yield 0, ValueError(member.problem)
        return
    try:
        stored = iter(lambda: stream.read(CHUNK), b"")
        chunks = plain(stored) if found.compression is None else inflate(stored, found.compression, "its content")
        if found.records in ("document", "page"):
            data = _limited(chunks)
            if len(data) > LONGEST_LINE:
                raise ValueError(
                    f"a document of more than {LONGEST_LINE >> 20} MiB; write it as JSON lines, or unpack it"
                )
            text = decoded(data)
            yield len(data), Text(text_of_page(text) if found.records == "page" else text)
        else:
            yield from _many(found, chunks)
    except (*_DAMAGED, ValueError) as error:
        if isinstance(error, _BrokenArchiveError) or getattr(error, "errno", None) is not None:  # of the whole file
            raise
        yield 0, ValueError(f"member cannot be read ({error})")


def _many(found: FileFormat, chunks: Iterator[Chunk]) -> Iterator[tuple[int, object]]:
    """Size, about, and value of each record of a table, of JSON lines, or of an array."""
    first, chunks = sampled(chunks)
    if (encoding := encoding_of_lines(joined(first))) is not None:
        first, chunks = list(transcoded(first, encoding)), transcoded(chunks, encoding)
    if found.records == "table":
        yield from ((row.size, row.value) for row in read_table(lines_in(chunks), delimiter=DELIMITERS[found.suffix]))
    elif found.records == "json" and is_array(first):
        yield from ((item.size, item.value) for item in read_array(chunks, "its content"))
    else:
        yield from ((len(line.data), line.data) for line in lines_in(chunks) if line.data.strip())


def _limited(chunks: Iterator[Chunk]) -> bytes:
    """The text of the chunks, or a little more than LONGEST_LINE of it."""
    parts, length = [], 0
    for chunk in chunks:
        parts.append(chunk.data)
        length += len(chunk.data)
        if length > LONGEST_LINE:
            break
    return b"".join(parts)


def _in_zip(file: File) -> Iterator[_Member]:
    with open_seekable(file) as (source, require_same):
        try:
            archive = zipfile.ZipFile(source)
        except _DAMAGED as error:
            raise DataError(f"{file.url}: cannot be read as zip ({error})") from error
        if sum(info.file_size for info in archive.infolist()) > MAX_RATIO * file.size:
            raise DataError(f"{file.url}: states more text than a zip of its size can hold; it is left unread")
        for info in archive.infolist():
            require_same()
            if info.is_dir():
                continue
            try:
                stream = archive.open(info)
            except (*_DAMAGED, RuntimeError) as error:  # RuntimeError: encrypted
                yield _Member(info.filename, info.header_offset, problem=f"member cannot be read ({error})")
                continue
            with stream:
                yield _Member(info.filename, info.header_offset, stream)


class _Stream(io.RawIOBase):
    """Chunks as a stream; `stored` is about the offset of what was read last."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks, self._left, self.stored = chunks, memoryview(b""), 0

    def read(self, size: int = -1) -> bytes:
        parts, wanted = [], size
        while wanted:
            if not self._left:
                try:
                    chunk = next(self._chunks, None)
                except DataError as error:
                    raise _BrokenArchiveError(str(error)) from error
                if chunk is None:
                    break
                self._left, self.stored = memoryview(chunk.data), chunk.after
            parts.append(bytes(self._left[:wanted]))
            self._left, wanted = self._left[wanted:], wanted - len(parts[-1])
        return b"".join(parts)


class _Header(tarfile.TarInfo):
    """A header; tarfile takes a damaged or missing one inside an archive for its end, and reads long ones whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf):  # the end
                raise
            raise tarfile.ReadError(str(error)) from error
        if not header.isreg() and header.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def _in_tar(file: File) -> Iterator[_Member]:
    source = _Stream(chunks_of(file))
    try:
        with tarfile.open(fileobj=source, mode="r|", tarinfo=_Header) as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined] # it would keep all
                if info.isfile():
                    yield _Member(info.name, source.stored, archive.extractfile(info))
    except tarfile.TarError as error:
        raise DataError(f"{file.url}: cannot be read as tar ({error}); damaged or truncated") from error
