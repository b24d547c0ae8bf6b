"""Reading rows of parquet files, local or remote: only the needed columns, from any row on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lamda.config.errors import DataError
from lamda.data.files import File, open_seekable
from lamda.data.quarantine import few
from lamda.data.remote import CHUNK

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 256
"""Rows per decoded batch."""


def row_groups(file: File) -> tuple[int, ...]:
    """The number of rows of each row group. Raises DataError if the file is not parquet."""
    import pyarrow as pa  # large, and only parquet needs it
    import pyarrow.parquet as pq

    with open_seekable(file) as (source, _):
        try:
            footer = pq.ParquetFile(source).metadata
            return tuple(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error


def read_rows(file: File, *, first: int, columns: Sequence[str] | None) -> Iterator[tuple[int, int, Any]]:
    """For each row from `first` on: its number, the total number of rows, and the record.

    A record that cannot be decoded is replaced by a ValueError. columns: keys to read, of those that the file has;
    None: all. Raises DataError if the file is not parquet, or not the one that was resolved.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_seekable(file) as (source, require_same):
        try:
            # A remote column is read in one request; a local one is buffered.
            table = pq.ParquetFile(source, buffer_size=0 if file.is_remote else CHUNK)
            names = table.schema_arrow.names
            missing = None  # in place of every record of a file that has none of the columns
            if columns and not {*columns} & {*names}:
                missing = ValueError(f"no column {' or '.join(map(repr, columns))} (the file has {few(names)})")
            number, total = 0, table.metadata.num_rows
            for group in range(table.num_row_groups):
                length = table.metadata.row_group(group).num_rows
                if number + length > first:
                    rows = table.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False)
                    for place, record in _records(rows, number, first=first):
                        require_same()
                        yield place, total, missing or record
                number += length
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error


def _unreadable(file: File, error: Exception) -> DataError:
    return DataError(f"{file.url}: cannot be read as parquet ({str(error).splitlines()[0]})")


def _records(batches: Iterator[pa.RecordBatch], number: int, *, first: int) -> Iterator[tuple[int, Any]]:
    """The records from row `first` on, numbered; the batches begin at row `number`."""
    for batch in batches:
        begin, number = max(number, first), number + batch.num_rows
        if begin < number:  # rows before `first` are decoded, but not converted to Python objects
            kept = batch.slice(batch.num_rows - (number - begin))
            yield from enumerate(records_of(kept), start=begin)


def records_of(batch: pa.RecordBatch) -> list[Any]:
    """The records of a batch; one that cannot be decoded is replaced by a ValueError."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, or a date outside of Python's range
        if batch.num_rows == 1:
            return [ValueError(f"cannot be decoded ({error})")]
        return [record for row in range(batch.num_rows) for record in records_of(batch.slice(row, 1))]
