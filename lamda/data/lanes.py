"""Lanes: the logical shards of a source, and reading their documents.

The files of a source, sorted by name and concatenated, form one range of bytes, its *axis*. A lane is one of at most 64
intervals of the axis (`lamda.data.partitioning`), so lanes depend on the text alone, not on the number of ranks.
Positions on the axis are decompressed bytes if the size of the text is known before reading, and otherwise an estimate
from the stored bytes. A document belongs to the lane in which its line begins. Reading starts at a `Cursor`, so it can
resume at any token.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from typing import Any, NamedTuple, TypeVar

import orjson

from lamda.data.card import Source
from lamda.data.documents import Document, Form, RawText, get_path
from lamda.data.drop_list import DropList
from lamda.data.files import LONGEST_LINE, File, chunks_of, read_lines
from lamda.data.hashing import document_hash
from lamda.data.open_files import allow_open_files
from lamda.data.parquet import read_rows
from lamda.data.quarantine import BadLine, Tally
from lamda.data.records import Text, is_array
from lamda.data.sections import SECTION
from lamda.data.streams import read_records

BYTES_PER_TOKEN = 4
"""Assumed until the first window has been read."""

OPEN_FILES = 1 << 16
"""Open files requested from the system: each lane keeps a file open while it is read."""

PROBED = 100
"""Records of a file in a folder, of which one has to hold a document; else the file is left out."""

UNKNOWN_DOMAIN = "unknown"
RAW_TEXT = RawText()
Item = TypeVar("Item")


class Cursor(NamedTuple):
    """The position of the next token of a lane in an epoch.

    token: index in the document at (`file`, `line`). byte: decompressed offset of that line, for seeking. lines, bad:
    the lines of the lane before that one in this epoch, without blank ones, and the bad lines among them. digest: hash
    of the text of the document, to detect a changed file; None if no document was read.
    """

    file: int = 0
    line: int = 0
    byte: int = 0
    token: int = 0
    lines: int = 0
    bad: int = 0
    digest: str | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """File, line and token."""
        return self.file, self.line, self.token

    @property
    def document_place(self) -> tuple[int, int]:
        """File and line, as `Document.place`."""
        return self.file, self.line


@dataclass(frozen=True)
class FileSlice:
    """The documents of one file that a lane reads.

    These are the lines (in parquet, the rows) that begin in [start, stop), in decompressed bytes or rows, with
    `line % modulus == residue`; to the end of the file if `stop` is None. axis_length: bytes of the axis that these
    cover. is_estimated: that number is estimated from stored bytes, since the size of the text is unknown.
    """

    file: File
    axis_length: int
    start: int = 0
    stop: int | None = None
    residue: int = 0
    modulus: int = 1
    is_estimated: bool = False

    @property
    def key(self) -> tuple[int | None, ...]:
        """The part of the file, for a fingerprint."""
        return self.start, self.stop, self.residue, self.modulus

    def holds(self, line: int) -> bool:
        """Whether a line in [start, stop) is one of these."""
        return line % self.modulus == self.residue

    def place(self, line: int, byte: int) -> str:
        """Where a line is, for messages; lines are counted from 1."""
        if self.file.is_indexed:
            return f"{self.file.url}, line {line + 1}"
        return f"{self.file.url}, byte {byte:,}" if self.start else f"{self.file.url}, line {line + 1}"


@dataclass(frozen=True)
class Lane:
    """A deterministic stream of documents. max_bad_line_fraction: fraction of bad lines that is accepted.

    drop: the documents to leave out. held_out: hashes of those left out for validation. Neither count as lines.
    """

    index: int
    source: Source
    slices: tuple[FileSlice, ...]
    max_bad_line_fraction: float
    form: Form = RAW_TEXT
    drop: DropList | None = None
    held_out: frozenset[str] = frozenset()

    @cached_property
    def axis_length(self) -> int:
        """Bytes of the axis that it covers."""
        return sum(file_slice.axis_length for file_slice in self.slices)

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The keys of a record that are read if the file has columns; None: all."""
        keys = self.form.keys_of(self.source)
        domain = () if self.source.domain is None else (self.source.domain.partition(".")[0],)
        return None if keys is None else (*keys, *domain)

    def read(self, start: Cursor) -> Generator[Document | BadLine]:
        """The documents of an epoch and the bad lines between them, from the line of the cursor on.

        Raises DataError if too many lines are bad or a file cannot be read.
        """
        allow_open_files(OPEN_FILES)
        tally = Tally(self.index, self.max_bad_line_fraction, start.lines, start.bad)
        dropped = None if self.drop is None else self.drop.entries()
        begin = sum(file_slice.axis_length for file_slice in self.slices[: start.file])
        for position, file_slice in enumerate(self.slices[start.file :], start=start.file):
            line, byte = (start.line, start.byte) if position == start.file else (0, 0)
            number = 0 if dropped is None else dropped.number_of(file_slice.file.url)
            for entry in _read_slice(file_slice, self, line=line, byte=byte):
                if isinstance(entry.content, _Bad):
                    place = file_slice.place(entry.line, entry.byte)
                    bad = BadLine.of(f"{place} ({entry.member})" if entry.member else place, *entry.content)
                    tally.quarantine(bad)
                    yield bad
                    continue
                if self.held_out and document_hash(entry.content.text) in self.held_out:
                    continue
                length = file_slice.axis_length
                ends = begin + min(length, entry.begin), begin + min(length, entry.end)
                document = Document(*entry.content, position, entry.line, entry.byte, *ends)
                if dropped is None or not dropped.drops(document, number):
                    tally.good()
                    yield document
            begin += file_slice.axis_length


def in_turn(streams: Sequence[Iterator[Item]]) -> Iterator[Item]:
    """One item of each stream in turn until all have ended: `roundrobin` of Python's documentation of itertools."""
    left: Iterable[Iterator[Item]] = streams
    for count in range(len(streams), 0, -1):
        left = cycle(islice(left, count))
        yield from map(next, left)


def why_unread(lane: Lane, *, is_whole: bool) -> str | None:
    """Why the first PROBED records of a lane hold no document; None if one does.

    is_whole: read it to its end. Raises DataError if it cannot be read.
    """
    file = lane.slices[0].file
    reason: str | None = "holds no text" if file.size else "is empty"
    with closing(_read_slice(lane.slices[0], lane, line=0, byte=0)) as entries:
        for count, entry in enumerate(entries, start=1):
            if isinstance(entry.content, _Good):
                reason = None if entry.content.text.strip() else reason
            elif count == 1:
                reason = entry.content.reason
            if not is_whole and (reason is None or count == PROBED):
                break
    return reason


class _Good(NamedTuple):
    text: str
    domain: str


class _Bad(NamedTuple):
    reason: str
    data: bytes


class _Entry(NamedTuple):
    """A line of a slice: its number, decompressed offset, interval on the axis of the slice, content, and member."""

    line: int
    byte: int
    begin: int
    end: int
    content: _Good | _Bad
    member: str = ""


def _read_slice(file_slice: FileSlice, lane: Lane, *, line: int, byte: int) -> Generator[_Entry]:
    """The entries of a slice from a line on, without blank lines."""
    records = file_slice.file.records
    if records == "rows":
        yield from _read_rows(file_slice, lane, first=line)
    elif records == "lines" or (records == "json" and not is_array(chunks_of(file_slice.file))):
        yield from _read_lines(file_slice, lane, line=line, byte=byte)
    else:
        yield from _read_stream(file_slice, lane, line=line, byte=byte)


def _read_rows(file_slice: FileSlice, lane: Lane, *, first: int) -> Iterator[_Entry]:
    for number, rows, record in read_rows(file_slice.file, first=max(first, file_slice.start), columns=lane.columns):
        stop = rows if file_slice.stop is None else file_slice.stop
        if number >= stop:
            return
        if file_slice.holds(number):
            done, total = number - file_slice.start, stop - file_slice.start
            begin, end = (row * file_slice.axis_length // total for row in (done, done + 1))
            yield _Entry(number, 0, begin, end, _of_value(record, lane))


def _read_stream(file_slice: FileSlice, lane: Lane, *, line: int, byte: int) -> Iterator[_Entry]:
    file, first = file_slice.file, max(line, file_slice.start)
    before = file_slice.start * SECTION  # only sections are cut
    for record in read_records(file, first=first, byte=byte, columns=lane.columns):
        if file_slice.stop is not None and record.number >= file_slice.stop:
            return
        if file_slice.holds(record.number):
            begin = max(0, record.stored - before) * file.text_size // max(1, file.size) // file_slice.modulus
            content = _of_value(record.value, lane)
            yield _Entry(record.number, record.byte, begin, begin + record.size, content, record.member)


def _of_value(value: Any, lane: Lane) -> _Good | _Bad:
    if isinstance(value, Text):
        return _Good(value.text, lane.source.name)
    if isinstance(value, bytes):
        return _of_json(value, lane)
    return _Bad(str(value), b"") if isinstance(value, ValueError) else _of_record(value, lane, None)


def _read_lines(file_slice: FileSlice, lane: Lane, *, line: int, byte: int) -> Iterator[_Entry]:
    """A slice that starts inside a file starts at the first line that begins in it, which may be at its first byte."""
    is_inside = byte == 0 and file_slice.start > 0
    file = file_slice.file if file_slice.stop is None else replace(file_slice.file, sha256=None)  # not read to its end
    lines = read_lines(file, number=line - is_inside, byte=file_slice.start - 1 if is_inside else byte)
    if is_inside:
        next(lines, None)
    for number, offset, data, stored in lines:
        if file_slice.stop is not None and offset >= file_slice.stop:
            return
        if file_slice.holds(number) and data and not data.isspace():
            begin = offset - file_slice.start
            if file_slice.is_estimated:
                begin = stored * file.text_size // max(1, file.size) // file_slice.modulus
            yield _Entry(number, offset, begin, begin + len(data) + 1, _of_json(data, lane))


def _of_json(data: bytes, lane: Lane) -> _Good | _Bad:
    if len(data) > LONGEST_LINE:
        return _Bad(f"longer than {LONGEST_LINE >> 20} MiB", data)
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        found = _of_record(_with_nan(data), lane, data)
        return found if isinstance(found, _Good) else _Bad(f"not JSON ({error})", data)
    return _of_record(record, lane, data)


def _with_nan(data: bytes) -> Any:
    """A record with NaN or Infinity, as Python and pandas write them, read as null; None for other invalid JSON."""
    if b"NaN" not in data and b"Infinity" not in data:
        return None
    try:
        record = json.loads(data.decode(), parse_constant=lambda _: None)
        json.dumps(record, ensure_ascii=False).encode()  # no lone surrogates
    except (ValueError, RecursionError):
        return None
    return record


def _of_record(record: Any, lane: Lane, data: bytes | None) -> _Good | _Bad:
    source = lane.source
    domain = source.name if source.domain is None else get_path(record, source.domain)
    domain = domain if isinstance(domain, str) else UNKNOWN_DOMAIN
    try:
        text = lane.form.text_of(record, source)
        text.encode()
        domain.encode()
    except ValueError as error:
        reason = f"a lone surrogate ({error})" if isinstance(error, UnicodeEncodeError) else str(error)
        return _Bad(reason, repr(record).encode("utf-8", "replace") if data is None else data)
    return _Good(text, domain)
