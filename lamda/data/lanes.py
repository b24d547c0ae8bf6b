"""Lanes: a corpus cut into endless streams of documents, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import orjson
from datasets import IterableDataset, load_dataset

from lamda.config.errors import UserError
from lamda.data.card import Source
from lamda.data.files import DataError, File, read_all, read_lines

FEWEST, MOST = 8, 64


class Document(NamedTuple):
    """A text and its place: epoch of the lane, file of the lane, line, decompressed offset of the line."""

    text: str
    domain: str
    epoch: int
    file: int
    line: int
    byte: int


@dataclass(frozen=True)
class Cursor:
    """The place of a lane's next token, and the number of the block that begins there.

    `token` counts tokens of the document at (`epoch`, `file`, `line`); `byte` is the decompressed
    offset of that line, so that a seekable file is sought.
    """

    block: int = 0
    epoch: int = 0
    file: int = 0
    line: int = 0
    byte: int = 0
    token: int = 0


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
    """A deterministic, endless stream of documents."""

    index: int
    source: Source
    shares: tuple[Share, ...]

    def documents(self, start: Cursor) -> IterableDataset:
        """Documents from the one that holds the cursor, for ever; rows as `Document._asdict()`."""
        return IterableDataset.from_generator(_rows, gen_kwargs={"lane": self, "start": start})


def cut_into_lanes(source: Source, files: list[File], *, lanes: int | None, first: int = 0) -> list[Lane]:
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
        cut.append(Lane(first + lane, source, shares))
    return cut


def _rows(lane: Lane, start: Cursor) -> Iterator[dict[str, Any]]:
    for document in read_lane(lane, start):
        yield document._asdict()


def read_lane(lane: Lane, start: Cursor) -> Iterator[Document]:
    """As `Lane.documents`, as plain tuples. Raises DataError for an empty lane or an unreadable record."""
    epoch, file, line, byte = start.epoch, start.file, start.line, start.byte
    from_the_top = (file, line) == (0, 0)
    while True:
        found = False
        for position in range(file, len(lane.shares)):
            share = lane.shares[position]
            for text, domain, number, offset in _read_share(share, lane.source, line=line, byte=byte):
                found = True
                yield Document(text, domain, epoch, position, number, offset)
            line = byte = 0
        if from_the_top and not found:
            raise DataError(_empty(lane))
        epoch, file, from_the_top = epoch + 1, 0, True


def _empty(lane: Lane) -> str:
    share = lane.shares[0]
    if share.modulus > 1:
        return (
            f"{share.file.url}: lane {lane.index} is empty: the file has too few documents to be cut into "
            f"{share.modulus} lanes; set data.lanes lower, or give more text"
        )
    return f"{share.file.url}: holds no document (lane {lane.index})"


def _read_share(share: Share, source: Source, *, line: int, byte: int) -> Iterator[tuple[str, str, int, int]]:
    file = share.file
    if file.url.endswith(".txt"):
        if line == 0:
            yield _decoded(read_all(file), f"{file.url}"), source.name, 0, 0
        return
    records = _parquet(share, line) if file.url.endswith(".parquet") else _json_lines(share, line=line, byte=byte)
    for record, number, offset in records:
        where = f"{file.url}, line {number + 1}"
        text = _field(record, source.text, where)
        domain = source.name if source.domain is None else _field(record, source.domain, where)
        yield text, domain, number, offset


def _json_lines(share: Share, *, line: int, byte: int) -> Iterator[tuple[Any, int, int]]:
    for number, offset, data in read_lines(share.file, number=line, byte=byte):
        if number % share.modulus == share.residue and not data.isspace() and data:
            try:
                yield orjson.loads(data), number, offset
            except orjson.JSONDecodeError as error:
                raise DataError(f"{share.file.url}, line {number + 1}: not JSON ({error})") from error


def _parquet(share: Share, line: int) -> Iterator[tuple[Any, int, int]]:
    rows = load_dataset("parquet", data_files=share.file.url, split="train", streaming=True)
    for number, record in enumerate(rows.skip(line), start=line):
        if number % share.modulus == share.residue:
            yield record, number, 0


def _field(record: Any, path: str, where: str) -> str:
    value = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise DataError(f"{where}: no text at {path!r} (found {type(value).__name__})")
    return value


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error})") from error


def cursor_to_json(cursor: Cursor) -> dict[str, int]:
    """A cursor as plain numbers."""
    return asdict(cursor)
