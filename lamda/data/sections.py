"""Long plain texts in sections: a file of any size is read in bounded memory, from any place, as several documents.

Section n of a text begins at the first line end from byte n * SECTION on (without one in a section's length: at the
first space, or immediately) and ends where the next one begins. So it depends on the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lamda.data.files import File, chunks_of

SECTION = 1 << 16
"""Bytes per section."""

SECTIONED_FROM = 1 << 20
"""Stored bytes from which a text is read in sections; a shorter one is one document."""


class Section(NamedTuple):
    """A section: its number, its offset in the text, its bytes, and about where it is stored."""

    number: int
    byte: int
    data: bytes
    stored: int


def count_sections(size: int) -> int:
    """The number of sections of a text of `size` bytes; the last ones may be empty."""
    return -(-size // SECTION)


def read_sections(file: File, *, first: int) -> Iterator[Section]:
    """The sections from number `first` on that are not empty; raises as `read_lines`."""
    number, at = first, max(0, first * SECTION - 1)  # the offset of `held`
    held, chunks, stored, is_end = b"", chunks_of(file, skip=at), 0, False
    begin = None if first else 0
    while not (is_end and number * SECTION >= at + len(held)):
        while not is_end and at + len(held) < (number + 2) * SECTION:
            chunk = next(chunks, None)
            is_end = chunk is None
            if chunk is not None:
                held, stored = held + chunk.data, chunk.after
        if begin is None:
            begin = _boundary(held, at, number)
        end = _boundary(held, at, number + 1)
        if begin < end:
            yield Section(number, begin, held[begin - at : end - at], stored if file.is_compressed else begin)
        number, begin = number + 1, end
        keep = max(0, min(end, number * SECTION - 1) - at)
        held, at = held[keep:], at + keep


def _boundary(held: bytes, at: int, number: int) -> int:
    """Where a section begins, or the end of the text; `held` are the bytes from `at` on."""
    place = number * SECTION - at
    if place >= len(held):
        return at + len(held)
    for separator in (b"\n", b" "):
        found = held.find(separator, place - 1, place - 1 + SECTION)
        if found >= 0:
            return at + found + 1
    while place < len(held) and held[place] & 0xC0 == 0x80:  # inside a character
        place += 1
    return at + place
