"""Cutting the axis of a source (`lamda.data.lanes`) into at most 64 lanes of equal size, whatever its files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lamda.config.errors import UserError
from lamda.data.card import Source
from lamda.data.documents import Form
from lamda.data.files import File, chunks_of, decompressed_size
from lamda.data.lanes import BYTES_PER_TOKEN, RAW_TEXT, FileSlice, Lane
from lamda.data.parquet import row_groups
from lamda.data.quarantine import few
from lamda.data.records import is_array
from lamda.data.sections import count_sections

MAX_LANES = 64
"""Lanes per source, at most. They mix a sorted file: with 8, batches are further from the corpus than random draws."""

MIN_ROWS_PER_LANE = 64
"""Minimum rows per lane, approximately, since the last row of each epoch is padded."""

CUT_COMPRESSED = (8 << 20, 64 << 20)
"""Largest compressed file, and total of compressed files per source, that is cut, in stored bytes: a lane that begins
inside a file decompresses everything before it."""

MIN_LANES = 8
"""Minimum number of lanes for files that cannot be cut, so that several ranks and threads have work."""


def whole_lane(source: Source, file: File, *, form: Form = RAW_TEXT) -> Lane:
    """A whole file as one lane."""
    whole = FileSlice(file, file.text_size, is_estimated=file.text_size != file.size)
    return Lane(0, source, (whole,), max_bad_line_fraction=0.001, form=form)


def cut_into_lanes(
    source: Source,
    files: list[File],
    *,
    sequence_length: int,
    max_lanes: int = MAX_LANES,
    first: int = 0,
    max_bad_line_fraction: float = 0.001,
    form: Form = RAW_TEXT,
) -> list[Lane]:
    """Lanes `first`, `first + 1`, ... of a source: its axis cut into up to `max_lanes` equal parts.

    A file that cannot be cut goes to the lane of its midpoint; if there are fewer than MIN_LANES files, its lines are
    dealt to several lanes by their number modulo the count. sequence_length: targets per row. Raises UserError if there
    is no file or all are empty, DataError if one is damaged.
    """
    if not files:
        raise UserError(f"source {source.name!r} has no file")
    is_small = sum(file.size for file in files if file.is_compressed) <= CUT_COMPRESSED[1]
    extents = [_Extent.of(file, cut_compressed=is_small and max_lanes > 1) for file in files]
    total = sum(extent.axis_length for extent in extents)
    max_lanes = min(max_lanes, _max_lanes_of_row_groups(extents, total))
    count = max(1, min(max_lanes, total // (MIN_ROWS_PER_LANE * sequence_length * BYTES_PER_TOKEN)))
    parts: list[list[FileSlice]] = [[] for _ in range(count)]
    begin, ways = 0, min(count, -(-MIN_LANES // len(files)))
    for extent in extents:
        for part, file_slice in extent.slices(begin, count=count, total=total, ways=ways):
            parts[part].append(file_slice)
        begin += extent.axis_length
    kept = [tuple(part) for part in parts if part]
    if not kept:
        where = few(file.name for file in files)
        raise UserError(f"source {source.name!r} has no document: nothing is in {where} (data.files, or the card)")
    return [Lane(first + number, source, part, max_bad_line_fraction, form) for number, part in enumerate(kept)]


class _Extent(NamedTuple):
    """A file on the axis.

    units: bytes, rows or sections, in which a slice's start and stop are counted; None if the file cannot be cut.
    groups: rows of each parquet row group.
    """

    file: File
    axis_length: int
    units: int | None
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, file: File, *, cut_compressed: bool) -> _Extent:
        if file.records == "rows":
            groups = () if file.is_remote else row_groups(file)
            return cls(file, file.size, None if file.is_remote else sum(groups), groups)
        if file.records == "sections" and not file.is_compressed:
            return cls(file, file.size, count_sections(file.size))
        is_cut = not file.is_compressed or (cut_compressed and file.size <= CUT_COMPRESSED[0])
        if file.records == "json" and is_cut:
            is_cut = not file.is_remote and not is_array(chunks_of(file))
        if file.records not in ("lines", "json") or not is_cut:
            return cls(file, file.text_size, None)
        if not file.is_compressed:
            return cls(file, file.size, file.size)
        if file.is_remote:
            return cls(file, file.text_size, None)
        size = decompressed_size(file)
        return cls(file, size, size)

    def slices(self, begin: int, *, count: int, total: int, ways: int) -> Iterator[tuple[int, FileSlice]]:
        """The slices of this file, which begins at `begin`, with lanes. ways: their number if it cannot be cut."""
        if self.units is None:
            ways = 1 if self.file.records in ("document", "page") else ways
            is_estimated = self.file.records not in ("document", "rows") or self.file.text_size != self.file.size
            for way in range(ways):
                middle = begin + self.axis_length * (2 * way + 1) // (2 * ways)
                part = min(count - 1, middle * count // max(1, total))
                yield part, FileSlice(self.file, self.axis_length // ways, 0, None, way, ways, is_estimated)
            return
        if self.axis_length == 0:
            return
        for part in range(begin * count // total, (begin + self.axis_length - 1) * count // total + 1):
            low, high = (max(0, -(-edge * total // count) - begin) for edge in (part, part + 1))
            low, high = min(low, self.axis_length), min(high, self.axis_length)
            start, stop = (place * self.units // self.axis_length for place in (low, high))
            if start < stop:
                yield part, FileSlice(self.file, high - low, start, None if high == self.axis_length else stop)


def _max_lanes_of_row_groups(extents: list[_Extent], total: int) -> int:
    """The number of lanes up to which decoding wasted on row groups stays below MIN_LANES / 2 times the source.

    A lane that begins inside a row group first decodes half of it, on average. Over n lanes this is
    n / total * (sum of squared groups) / 2.
    """
    squares = sum(
        (each.axis_length * rows // each.units) ** 2 for each in extents if each.units for rows in each.groups
    )
    return max(1, MIN_LANES * total**2 // squares) if squares else MAX_LANES
