"""Lanes: a corpus cut into endless streams of documents, whatever the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from datasets import IterableDataset
from datasets.iterable_dataset import ExamplesIterable

from lamda.config.errors import UserError
from lamda.data.card import Source
from lamda.data.documents import Document, Form, RawText, at, first_key
from lamda.data.errors import DataError
from lamda.data.files import LONGEST_LINE, File, read_all, read_lines
from lamda.data.parquet import read_rows
from lamda.data.quarantine import BadLine, Tally, bad_line

FEWEST, MOST = 8, 64
UNKNOWN_DOMAIN = "unknown"
RAW_TEXT = RawText()


@dataclass(frozen=True)
class Cursor:
    """The place of a lane's next token, and the number of the block that begins there.

    `token` counts tokens of the document at (`epoch`, `file`, `line`); `byte` is the decompressed
    offset of that line, so that a seekable file is sought. `lines` and `bad` count the lane's lines
    before that one, over all epochs: those that are not blank, and those of them that hold no document.
    `digest` is of the document's text, to know that the place still holds it; older checkpoints have none.
    """

    block: int = 0
    epoch: int = 0
    file: int = 0
    line: int = 0
    byte: int = 0
    token: int = 0
    lines: int = 0
    bad: int = 0
    digest: str | None = None


@dataclass(frozen=True)
class Share:
    """The documents of a file that one lane reads: those with `line % modulus == residue`."""

    file: File
    residue: int = 0
    modulus: int = 1

    @property
    def bytes(self) -> float:
        """Stored bytes of this share."""
        return self.file.size / self.modulus


@dataclass(frozen=True)
class Lane:
    """A deterministic, endless stream of documents, of whose lines `max_bad_fraction` may be bad."""

    index: int
    source: Source
    shares: tuple[Share, ...]
    max_bad_fraction: float
    form: Form = RAW_TEXT

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The keys of a record that are read, where it has columns; None: all."""
        keys = self.form.keys_of(self.source)
        domain = () if self.source.domain is None else (first_key(self.source.domain),)
        return None if keys is None else (*keys, *domain)

    def read(self, start: Cursor) -> Iterator[Document]:
        """Documents from the one that holds the cursor, endless. Raises DataError: see `read_lane`."""
        return read_lane(self, start)

    def documents(self, start: Cursor) -> IterableDataset:
        """The same for `datasets`: documents from the one that holds the cursor, endless; rows as `Document._asdict()`.

        Not by `from_generator`, which makes a folder in the Hugging Face cache: that may be read-only.
        """
        return IterableDataset(ExamplesIterable(_rows, {"lane": self, "start": start}))


def cut_into_lanes(
    source: Source,
    files: list[File],
    *,
    lanes: int | None,
    first: int = 0,
    max_bad_fraction: float = 0.001,
    form: Form = RAW_TEXT,
) -> list[Lane]:
    """Lanes `first`, `first + 1`, ... of a source: every n-th file, or residues of the lines of one.

    By default as many as files, at least 8 and at most 64; a `.txt` file is one document and cannot
    be shared, so that such files bound the number. Raises UserError where `lanes` cannot be had.
    """
    if not files:
        raise UserError(f"source {source.name!r} has no file")
    whole = any(file.url.endswith(".txt") for file in files)
    count = lanes or min(MOST, max(1 if whole else FEWEST, len(files)))
    if whole and count > len(files):
        raise UserError(
            f"data.lanes {count}: {len(files)} .txt files (a document each) fill {len(files)} lanes at most"
        )
    cut = []
    for lane in range(count):
        shares = tuple(Share(file) for file in files[lane::count])
        if not shares:
            owner = lane % len(files)
            shares = (Share(files[owner], lane // len(files), len(range(owner, count, len(files)))),)
        elif count > len(files):
            shares = (Share(files[lane], 0, len(range(lane, count, len(files)))),)
        cut.append(Lane(first + lane, source, shares, max_bad_fraction, form))
    return cut


def _rows(lane: Lane, start: Cursor) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, document in enumerate(read_lane(lane, start)):
        yield number, document._asdict()


def read_lane(lane: Lane, start: Cursor) -> Generator[Document, None, None]:
    """As `Lane.documents`, as plain tuples. Raises DataError for an empty lane or one with too many bad lines."""
    epoch, file, line, byte = start.epoch, start.file, start.line, start.byte
    tally = Tally(lane.index, lane.max_bad_fraction, start.lines, start.bad)
    from_the_top = (file, line) == (0, 0)
    bad: list[BadLine] = []
    while True:
        found = False
        for position in range(file, len(lane.shares)):
            share = lane.shares[position]
            for number, offset, entry in _read_share(share, lane, line=line, byte=byte):
                if isinstance(entry, _Unfit):
                    bad.append(bad_line(epoch, share.file.url, number, entry.reason, entry.data))
                    tally.quarantine(bad[-1])
                    continue
                found = True
                tally.good()
                yield Document(*entry, epoch, position, number, offset, tuple(bad))
                bad.clear()
            line = byte = 0
        if from_the_top and not found:
            raise DataError(_empty(lane, tally))
        epoch, file, from_the_top = epoch + 1, 0, True


def _empty(lane: Lane, tally: Tally) -> str:
    share = lane.shares[0]
    if tally.bad:
        other = ". Text under another key needs a card whose `text:` names it (data/README.md)"
        remedy = other if isinstance(lane.form, RawText) else ""
        return f"lane {lane.index} is empty: all its {tally.bad} lines are bad. {tally.examples()}{remedy}"
    if share.modulus > 1 and not _holds_nothing(share.file):
        return (
            f"{share.file.url}: lane {lane.index} is empty: the file has too few documents to be cut into "
            f"{share.modulus} lanes; set data.lanes lower, or give more text"
        )
    return f"{share.file.url}: holds no document (lane {lane.index}); take the file out, or fetch it again"


def _holds_nothing(file: File) -> bool:
    """Whether no lane finds anything in it, so that fewer lanes do not help."""
    if file.url.endswith(".parquet"):
        return next(read_rows(file, first=0, columns=()), None) is None
    return not any(line.data.strip() for line in read_lines(file))


class _Fit(NamedTuple):
    text: str
    domain: str


class _Unfit(NamedTuple):
    reason: str
    data: bytes


def _read_share(share: Share, lane: Lane, *, line: int, byte: int) -> Iterator[tuple[int, int, _Fit | _Unfit]]:
    """Line, decompressed offset and what is there, from a line on; blank lines are nothing."""
    file = share.file
    if file.url.endswith(".txt"):
        if line == 0:
            yield 0, 0, _Fit(_decoded(read_all(file), file.url), lane.source.name)
    elif file.url.endswith(".parquet"):
        for number, record in read_rows(file, first=line, columns=lane.columns):
            if number % share.modulus == share.residue:
                yield number, 0, _of_row(record, lane)
    else:
        for number, offset, data in read_lines(file, number=line, byte=byte):
            if number % share.modulus == share.residue and data and not data.isspace():
                yield number, offset, _of_json(data, lane)


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
