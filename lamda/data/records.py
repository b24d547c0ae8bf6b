"""Records that are read one after another: items of JSON arrays, rows of delimited values, and rows of Arrow files."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from lamda.config.errors import DataError
from lamda.data.files import LONGEST_LINE, File, Line, open_seekable
from lamda.data.inflate import Chunk
from lamda.data.parquet import records_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BETWEEN_ITEMS = " \t\r\n,\ufeff"


class Text(NamedTuple):
    """The text of a document, where a record has nothing else."""

    text: str


class Record(NamedTuple):
    """A record of a file.

    number: from 0. byte: offset in the text from which it can be read alone; 0: only from the beginning of the file.
    stored: about its offset in the stored file. size: about its bytes. value: a `Text`, the bytes of a JSON record, a
    record, or a ValueError for one that cannot be read. member: of the archive that it is in.
    """

    number: int
    byte: int
    stored: int
    size: int
    value: Any
    member: str = ""


def is_array(chunks: Iterable[Chunk]) -> bool:
    """Whether a text of JSON is one array, not a record per line."""
    for chunk in chunks:
        if text := chunk.data.removeprefix(codecs.BOM_UTF8).lstrip():
            return text.startswith(b"[")
    return False


def read_array(chunks: Iterable[Chunk], name: str) -> Iterator[Record]:
    """The items of a JSON array, of which one at a time is in memory.

    Raises DataError with `name` if it is damaged, has no end, or has an item longer than LONGEST_LINE.
    """
    chunks = iter(chunks)
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    decoder = json.JSONDecoder(parse_constant=lambda _: None)
    text, place, number, wanted, problem = "", 0, -1, 1, ""
    for chunk in chain(chunks, [Chunk(b"", 0, 0, 0)]):
        added = decode(chunk.data)
        text, place, wanted = text[place:] + added, 0, wanted if added else 1
        while len(text) - place >= wanted:
            while place < len(text) and text[place] in _BETWEEN_ITEMS:
                place += 1
            if text[place : place + 1] == "]":
                _require_end(chain([text[place + 1 :]], (decode(each.data) for each in chunks)), name)
                return
            if place == len(text) or number < 0:  # the end of the chunk, or the opening bracket
                place, number, wanted = place + (place < len(text)), max(0, number), 1
                if place == len(text):
                    break
                continue
            try:
                value, end = decoder.raw_decode(text, place)
                if end == len(text):
                    raise ValueError("it may continue")
            except (ValueError, RecursionError) as error:
                wanted, problem = 2 * (len(text) - place), f" ({error})"
                break
            left = min(len(text) - place, len(added)) * (chunk.after - chunk.before) // max(1, len(added))
            yield Record(number, 0, chunk.after - left, end - place, value)
            place, number, wanted, problem = end, number + 1, 1, ""
        if len(text) - place > LONGEST_LINE:
            break
    raise DataError(
        f"{name}: item {max(0, number) + 1} of its JSON array cannot be read{problem}: damaged, truncated, or longer "
        f"than {LONGEST_LINE >> 20} MiB; write one JSON record per line"
    )


def _require_end(texts: Iterable[str], name: str) -> None:
    """Raise DataError if there is more than space."""
    for text in texts:
        if text.strip():
            raise DataError(f"{name}: more text follows the end of its JSON array; write one JSON record per line")


class _Feed:
    """Lines as `csv` reads them, with the first and the last one of a row."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.first: Line | None = None
        self.last: Line | None = None

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.first, self.last = self.first or line, line
            yield line.data.decode("utf-8", "replace") + "\n"


def read_table(
    lines: Iterator[Line], *, delimiter: str, header: Sequence[str] = (), number: int = 0
) -> Iterator[Record]:
    """The rows of a table as records by the names of its columns. header: if the lines do not begin with it."""
    csv.field_size_limit(LONGEST_LINE)
    feed, names = _Feed(lines), list(header)
    rows = csv.reader(feed, delimiter=delimiter)
    while True:
        feed.first = None
        value: Any = None
        try:
            row = next(rows, None)
        except csv.Error as error:
            row, value = [""], ValueError(f"not a row of values ({error})")
        if row is None or feed.first is None or feed.last is None:
            return
        if not row:  # a blank line
            continue
        if not names:
            names = row
            continue
        first, last = feed.first, feed.last
        size = last.byte + len(last.data) + 1 - first.byte
        yield Record(number, first.byte, first.stored, size, value or dict(zip(names, row, strict=False)))
        number += 1


def header_of(lines: Iterator[Line], *, delimiter: str) -> list[str]:
    """The names of the columns."""
    return next(csv.reader(iter(_Feed(lines)), delimiter=delimiter), [])


def read_batches(file: File, *, first: int, columns: Sequence[str] | None) -> Iterator[Record]:
    """The rows of an Arrow file (IPC file or stream) from number `first` on; see `parquet.read_rows`."""
    import pyarrow as pa  # large, and few files need it

    with open_seekable(file) as (source, require_same):
        try:
            number = 0
            for stored, size, batch in _batches(source, file.size, columns):
                require_same()
                rows, begin = batch.num_rows, max(first - number, 0)
                for place, record in enumerate(records_of(batch.slice(begin)) if begin < rows else (), start=begin):
                    yield Record(number + place, 0, stored + place * size // rows, size // rows, record)
                number += rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.url}: cannot be read as Arrow ({str(error).splitlines()[0]})") from error


def _batches(source: Any, size: int, columns: Sequence[str] | None) -> Iterator[tuple[int, int, Any]]:
    """The batches with their stored offsets and sizes, about; with the given columns only, if there are any of them."""
    import pyarrow as pa

    def options(schema: pa.Schema) -> pa.ipc.IpcReadOptions:
        wanted = [place for place, name in enumerate(schema.names) if columns is None or name in columns]
        return pa.ipc.IpcReadOptions(included_fields=wanted or None)

    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source, options=options(pa.ipc.open_file(source).schema))
        count = file.num_record_batches
        yield from ((size * n // count, size // count, file.get_batch(n)) for n in range(count))
        return
    source.seek(0)
    chosen = options(pa.ipc.open_stream(source).schema)
    source.seek(0)
    before = 0
    for batch in pa.ipc.open_stream(source, options=chosen):
        yield before, source.tell() - before, batch
        before = source.tell()
