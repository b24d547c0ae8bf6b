"""Lanes: a source cut into at most 64 logical shards, whatever the number of ranks.

A lane is a part of the source's *axis*: its files, in order of their names, end to end. The axis counts
decompressed bytes where the size of the text is known before it is read, and an estimate of them by stored bytes
where it is not. Windows of the order (`lamda.data.windows`) take the same fraction of every lane.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from lamda.config.errors import DataError, UserError
from lamda.data.card import Source
from lamda.data.documents import Document, Form, RawText, at, first_key
from lamda.data.files import LONGEST_LINE, File, decompressed_size, read_all, read_lines
from lamda.data.open_files import allow_open_files
from lamda.data.parquet import read_rows, row_groups
from lamda.data.quarantine import BadLine, Tally, bad_line, few

if TYPE_CHECKING:
    from datasets import IterableDataset

MOST = 64
"""Lanes a source. They are what mixes a sorted file: with 8 its batches are further from the corpus than draws."""

LEAST_ROWS = 64
"""Rows that a lane has at the least, about, since its last row of an epoch is padded."""

BYTES_PER_TOKEN = 4
"""Assumed until a window has been read."""

RATIO = 3
"""Assumed bytes of text for each stored byte of a compressed file that is not read beforehand."""

CUT_COMPRESSED = (8 << 20, 64 << 20)
"""Stored bytes of a file and of a source's compressed files together, up to which these are cut: a lane that begins
inside one decompresses what is before it."""

WHOLE_FILES = 8
"""Lanes that files which cannot be cut are read in at the least, so that several ranks and threads have work."""

OPEN_FILES = 1 << 16
"""A process may have, if the system allows it: each lane keeps a file open while it is read."""

UNKNOWN_DOMAIN = "unknown"
RAW_TEXT = RawText()


@dataclass(frozen=True)
class Cursor:
    """The place of a lane's next token in an epoch.

    `token` counts tokens of the document at (`file`, `line`); `byte` is the decompressed offset of that line, so that
    a seekable file is sought. `lines` and `bad` count the lane's lines before that one, in this epoch: those that are
    not blank, and those of them that hold no document. `digest` is of the document's text, to know that the place
    still holds it; None where no document was read.
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
        """The token: file, line and number."""
        return self.file, self.line, self.token


@dataclass(frozen=True)
class Share:
    """The documents of a file that one lane reads.

    Those whose line (a row, in parquet) begins in [start, stop), which are decompressed bytes or rows; to the file's
    end where `stop` is None. Of these, those with `line % modulus == residue`. length: on the axis. is_estimated: the
    axis follows the stored bytes, since the size of the text is not known.
    """

    file: File
    length: int
    start: int = 0
    stop: int | None = None
    residue: int = 0
    modulus: int = 1
    is_estimated: bool = False

    @property
    def cut(self) -> tuple[int | None, ...]:
        """Which part of the file it is, for a fingerprint."""
        return self.start, self.stop, self.residue, self.modulus

    def place(self, line: int, byte: int) -> str:
        """Where a line is, for a person; lines are counted from 1."""
        if self.file.url.endswith(".parquet"):
            return f"{self.file.url}, line {line + 1}"
        return f"{self.file.url}, byte {byte:,}" if self.start else f"{self.file.url}, line {line + 1}"


@dataclass(frozen=True)
class Lane:
    """A deterministic stream of documents, of whose lines `max_bad_fraction` may be bad."""

    index: int
    source: Source
    shares: tuple[Share, ...]
    max_bad_fraction: float
    form: Form = RAW_TEXT

    @cached_property
    def length(self) -> int:
        """On the source's axis."""
        return sum(share.length for share in self.shares)

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The keys of a record that are read, where it has columns; None: all."""
        keys = self.form.keys_of(self.source)
        domain = () if self.source.domain is None else (first_key(self.source.domain),)
        return None if keys is None else (*keys, *domain)

    def read(self, start: Cursor) -> Iterator[Document | BadLine]:
        """An epoch's documents and bad lines from the line of the cursor on. Raises DataError: see `read_lane`."""
        return read_lane(self, start)

    def documents(self) -> IterableDataset:
        """The documents of an epoch for `datasets`; rows as `Document._asdict()`.

        Not by `from_generator`, which makes a folder in the Hugging Face cache: that may be read-only.
        """
        from datasets import IterableDataset  # slow to import
        from datasets.iterable_dataset import ExamplesIterable

        return IterableDataset(ExamplesIterable(_rows, {"lane": self}))


def whole_lane(source: Source, file: File, *, form: Form = RAW_TEXT, max_bad_fraction: float = 0.001) -> Lane:
    """A file as one lane."""
    share = Share(file, file.size * (RATIO if file.is_compressed else 1), is_estimated=file.is_compressed)
    return Lane(0, source, (share,), max_bad_fraction, form)


def cut_into_lanes(
    source: Source,
    files: list[File],
    *,
    row_length: int,
    most: int = MOST,
    first: int = 0,
    max_bad_fraction: float = 0.001,
    form: Form = RAW_TEXT,
) -> list[Lane]:
    """Lanes `first`, `first + 1`, ... of a source: its axis cut into up to `most` equal parts.

    A document belongs to the part in which its line begins. A file that cannot be cut goes as a whole to the part that
    its middle is in or, where there are fewer than WHOLE_FILES files, as residues of its lines to several. row_length:
    targets a row. Raises UserError where there is no file, or nothing in any; DataError where one is damaged.
    """
    if not files:
        raise UserError(f"source {source.name!r} has no file")
    is_small = sum(file.size for file in files if file.is_compressed) <= CUT_COMPRESSED[1]
    extents = [_Extent.of(file, cut_compressed=is_small and most > 1) for file in files]
    total = sum(extent.length for extent in extents)
    most = min(most, _most_in_row_groups(extents, total))
    count = max(1, min(most, total // (LEAST_ROWS * row_length * BYTES_PER_TOKEN)))
    parts: list[list[Share]] = [[] for _ in range(count)]
    begin = 0
    for extent in extents:
        if extent.units is None:
            ways = 1 if extent.file.url.endswith(".txt") else min(count, -(-WHOLE_FILES // len(files)))
            for way in range(ways):
                middle = begin + extent.length * (2 * way + 1) // (2 * ways)
                part = min(count - 1, middle * count // max(1, total))
                length, is_estimated = extent.length // ways, extent.file.is_compressed
                parts[part].append(Share(extent.file, length, 0, None, way, ways, is_estimated))
        else:
            for part, share in extent.cuts(begin, count=count, total=total):
                parts[part].append(share)
        begin += extent.length
    kept = [tuple(part) for part in parts if part]
    if not kept:
        where = few(file.name for file in files)
        raise UserError(f"source {source.name!r} has no document: nothing is in {where} (data.files, or the card)")
    return [Lane(first + number, source, part, max_bad_fraction, form) for number, part in enumerate(kept)]


class _Extent(NamedTuple):
    """A file on the axis.

    units: what a share's start and stop count; None where it cannot be cut. groups: rows of each row group of parquet.
    """

    file: File
    length: int
    units: int | None
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, file: File, *, cut_compressed: bool) -> _Extent:
        if file.url.endswith(".txt"):
            return cls(file, file.size, None)
        if file.url.endswith(".parquet"):
            groups = () if file.is_remote else row_groups(file)
            return cls(file, file.size, None if file.is_remote else sum(groups), groups)
        if not file.is_compressed:
            return cls(file, file.size, file.size)
        if cut_compressed and not file.is_remote and file.size <= CUT_COMPRESSED[0]:
            size = decompressed_size(file)
            return cls(file, size, size)
        return cls(file, file.size * RATIO, None)

    def cuts(self, begin: int, *, count: int, total: int) -> Iterator[tuple[int, Share]]:
        """The part of the axis (of `count`) and the share, for each part that this file is in; it begins at `begin`."""
        assert self.units is not None
        if self.length == 0:
            return
        for part in range(begin * count // total, (begin + self.length - 1) * count // total + 1):
            low, high = (max(0, -(-edge * total // count) - begin) for edge in (part, part + 1))
            low, high = min(low, self.length), min(high, self.length)
            start, stop = (place * self.units // self.length for place in (low, high))
            if start < stop:
                yield part, Share(self.file, high - low, start, None if high == self.length else stop)


def _most_in_row_groups(extents: list[_Extent], total: int) -> int:
    """Lanes up to which rows that are decoded only to reach the first one of each add up to few times the source.

    A lane that begins inside a row group decodes half of it before, on average: n lanes together
    n / total * (sum of groups squared) / 2, which is kept to WHOLE_FILES / 2 times `total`.
    """
    squares = sum((each.length * rows // each.units) ** 2 for each in extents if each.units for rows in each.groups)
    return max(1, WHOLE_FILES * total**2 // squares) if squares else MOST


def _rows(lane: Lane) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, document in enumerate(read_lane(lane, Cursor())):
        if isinstance(document, Document):
            yield number, document._asdict()


def read_lane(lane: Lane, start: Cursor) -> Generator[Document | BadLine]:
    """An epoch's documents, and the bad lines between them, from the line of the cursor on.

    Raises DataError where too many lines are bad, or a file cannot be read.
    """
    allow_open_files(OPEN_FILES)
    tally = Tally(lane.index, lane.max_bad_fraction, start.lines, start.bad)
    begin = sum(share.length for share in lane.shares[: start.file])
    for position in range(start.file, len(lane.shares)):
        share = lane.shares[position]
        line, byte = (start.line, start.byte) if position == start.file else (0, 0)
        for entry in _read_share(share, lane, line=line, byte=byte):
            if isinstance(entry.content, _Unfit):
                reason, data = entry.content
                bad = bad_line(share.place(entry.line, entry.byte), reason, data)
                tally.quarantine(bad)
                yield bad
                continue
            tally.good()
            ends = begin + min(share.length, entry.begin), begin + min(share.length, entry.end)
            yield Document(*entry.content, position, entry.line, entry.byte, *ends)
        begin += share.length


class _Fit(NamedTuple):
    text: str
    domain: str


class _Unfit(NamedTuple):
    reason: str
    data: bytes


class _Entry(NamedTuple):
    """A line's number in its share, its decompressed offset, where it lies on the share's axis, and what it holds."""

    line: int
    byte: int
    begin: int
    end: int
    content: _Fit | _Unfit


def _read_share(share: Share, lane: Lane, *, line: int, byte: int) -> Iterator[_Entry]:
    """From a line on; blank lines are nothing."""
    file = share.file
    if file.url.endswith(".txt"):
        if line == 0:
            yield _Entry(0, 0, 0, share.length, _Fit(_decoded(read_all(file), file.url), lane.source.name))
    elif file.url.endswith(".parquet"):
        yield from _read_rows(share, lane, first=line)
    else:
        yield from _read_lines(share, lane, line=line, byte=byte)


def _read_rows(share: Share, lane: Lane, *, first: int) -> Iterator[_Entry]:
    for number, rows, record in read_rows(share.file, first=max(first, share.start), columns=lane.columns):
        stop = rows if share.stop is None else share.stop
        if number >= stop:
            return
        if number % share.modulus == share.residue:
            begin, end = ((number + n - share.start) * share.length // (stop - share.start) for n in (0, 1))
            yield _Entry(number, 0, begin, end, _of_row(record, lane))


def _read_lines(share: Share, lane: Lane, *, line: int, byte: int) -> Iterator[_Entry]:
    """A share that begins inside a file begins with the first line that does; the one before may end at its start."""
    is_inside = byte == 0 and share.start > 0
    file = share.file if share.stop is None else replace(share.file, sha256=None)  # it is not read to its end
    lines = read_lines(file, number=line - is_inside, byte=share.start - 1 if is_inside else byte)
    if is_inside:
        next(lines, None)
    for number, offset, data, stored in lines:
        if share.stop is not None and offset >= share.stop:
            return
        if number % share.modulus == share.residue and data and not data.isspace():
            begin = stored * RATIO // share.modulus if share.is_estimated else offset - share.start
            yield _Entry(number, offset, begin, begin + len(data) + 1, _of_json(data, lane))


def _of_json(data: bytes, lane: Lane) -> _Fit | _Unfit:
    if len(data) > LONGEST_LINE:
        return _Unfit(f"longer than {LONGEST_LINE >> 20} MiB", data)
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        found = _of_record(_with_nan(data), lane, data)
        return found if isinstance(found, _Fit) else _Unfit(f"not JSON ({error})", data)
    return _of_record(record, lane, data)


def _with_nan(data: bytes) -> Any:
    """A record in which NaN or Infinity stands, as Python and pandas write them, read as null; or None."""
    if b"NaN" not in data and b"Infinity" not in data:
        return None
    try:
        record = json.loads(data.decode(), parse_constant=lambda _: None)
        json.dumps(record, ensure_ascii=False).encode()  # no lone surrogates
    except (ValueError, RecursionError):
        return None
    return record


def _of_row(record: Any, lane: Lane) -> _Fit | _Unfit:
    if isinstance(record, ValueError):
        return _Unfit(str(record), b"")
    return _of_record(record, lane, None)


def _of_record(record: Any, lane: Lane, data: bytes | None) -> _Fit | _Unfit:
    source = lane.source
    try:
        text = lane.form.text_of(record, source)
    except ValueError as error:
        return _Unfit(str(error), repr(record).encode() if data is None else data)
    domain = source.name if source.domain is None else at(record, source.domain)
    return _Fit(text, domain if isinstance(domain, str) else UNKNOWN_DOMAIN)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error})") from error
