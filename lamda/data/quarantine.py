"""Bad lines, which hold no document: counted, reported, and an error if there are too many."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lamda.best_effort import BestEffort
from lamda.config.errors import DataError
from lamda.durable import replace_file

log = logging.getLogger(__name__)

CHECKED_FROM = 10_000
"""Lines of a lane after which its fraction of bad lines is checked."""

KEPT = 100
"""Bad lines that a run reports."""


class BadLine(NamedTuple):
    """A line without a document: its place for messages, the reason, and its first 200 characters."""

    place: str
    reason: str
    beginning: str

    @classmethod
    def of(cls, place: str, reason: str, data: bytes) -> BadLine:
        """From the line's bytes, which need not be text."""
        return cls(place, reason, data[:800].decode("utf-8", "backslashreplace")[:200])


class Quarantined(NamedTuple):
    """A bad line and its lane."""

    lane: int
    bad: BadLine


def few(names: Iterable[str]) -> str:
    """The first names, shortened, for a message: they come from unknown data, and may be many or long."""
    first = [name if len(name) <= 40 else f"{name[:40]}..." for name in islice(names, 9)]
    return ", ".join([*map(repr, first[:8]), *(["..."] if len(first) > 8 else [])])


def examples(bad: Sequence[BadLine]) -> str:
    """The first bad lines, for a message."""
    return "; ".join(f"{line.place}: {line.reason}" for line in bad[:3])


def first_of(found: Iterable[Quarantined]) -> list[Quarantined]:
    """The first KEPT by lane and place, without duplicates."""
    return sorted(set(found))[:KEPT]


class QuarantineFile:
    """The first bad lines of a run, as JSON lines. Errors of the file are ignored: it is for information only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keeping = BestEffort(f"{path} cannot be updated", errors=(OSError, ValueError, KeyError, TypeError))

    def add(self, found: Iterable[Quarantined]) -> list[Quarantined]:
        """Add bad lines, and keep the first; returns those that are new."""
        with self._keeping:
            lines = map(json.loads, self._path.read_text("utf-8").splitlines() if self._path.exists() else ())
            known = [Quarantined(values.pop("lane"), BadLine(**values)) for values in lines]
            kept = first_of([*known, *found])
            if kept != known:
                texts = (json.dumps({"lane": each.lane, **each.bad._asdict()}) for each in kept)
                replace_file(self._path, "".join(f"{text}\n" for text in texts))
            return sorted(set(kept) - set(known))
        return []


@dataclass
class Tally:
    """Counts lines and bad lines of a lane; raises DataError if the fraction of bad ones exceeds `limit`."""

    lane: int
    limit: float
    lines: int = 0
    bad: int = 0
    first: list[BadLine] = field(default_factory=list)

    def good(self) -> None:
        """Count a line with a document."""
        self.lines += 1
        self._check()

    def quarantine(self, line: BadLine) -> None:
        """Count a bad line."""
        self.lines, self.bad = self.lines + 1, self.bad + 1
        if len(self.first) < 3:
            self.first.append(line)
            log.warning("lane %d: %s quarantined: %s", self.lane, line.place, line.reason)
        self._check()

    def _check(self) -> None:
        if self.lines >= CHECKED_FROM and self.bad > self.limit * self.lines:
            raise DataError(
                f"lane {self.lane}: {self.bad:,} of {self.lines:,} lines hold no document, more than "
                f"data.max_bad_line_fraction {self.limit:g}: fix the text, or raise the limit. {examples(self.first)}"
            )
