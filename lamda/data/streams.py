"""The records of a file whose format is neither plain lines nor parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lamda.config.errors import DataError
from lamda.data.archives import read_archive
from lamda.data.encodings import decoded
from lamda.data.files import LONGEST_LINE, File, chunks_of, read_lines
from lamda.data.pages import text_of_page
from lamda.data.records import DELIMITERS, Record, Text, header_of, read_array, read_batches, read_table
from lamda.data.sections import read_sections


def read_records(file: File, *, first: int, byte: int, columns: Sequence[str] | None) -> Iterator[Record]:
    """The records from number `first` on, which begins at offset `byte` if its format can be read from there.

    columns: those that are read if a file has columns; None: all. Raises DataError if the file cannot be read.
    """
    records = file.records
    if records == "sections":
        for section in read_sections(file, first=first):
            text = section.data.decode("utf-8", "replace").removeprefix("\ufeff" if section.number == 0 else "")
            yield Record(section.number, section.byte, section.stored, len(section.data), Text(text))
    elif records == "table":
        delimiter = DELIMITERS[file.format.suffix]
        header = header_of(read_lines(file), delimiter=delimiter) if byte else ()
        rows = read_table(read_lines(file, byte=byte), delimiter=delimiter, header=header, number=first if byte else 0)
        yield from (row for row in rows if row.number >= first)
    elif records == "json":
        yield from (item for item in read_array(chunks_of(file), file.url) if item.number >= first)
    elif records == "batches":
        yield from read_batches(file, first=first, columns=columns)
    elif records in ("zip", "tar"):
        yield from read_archive(file, first=first)
    elif first == 0:  # one document: a cursor beyond it finds nothing, so the text was changed
        yield Record(0, 0, 0, file.size, Text(_document(file)))


def _document(file: File) -> str:
    parts, length = [], 0
    for chunk in chunks_of(file):
        parts.append(chunk.data)
        length += len(chunk.data)
        if length > LONGEST_LINE and (file.records == "page" or file.format.compression is not None):
            raise DataError(f"{file.url}: one document of more than {LONGEST_LINE >> 20} MiB; cut it into smaller ones")
    try:
        text = decoded(b"".join(parts))
    except ValueError as error:
        raise DataError(f"{file.url}: {error}") from error
    return text_of_page(text) if file.records == "page" else text
