"""Lines that hold no document: counted, kept for a look, and an end to the run where they are too many."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lamda.best_effort import BestEffort
from lamda.config.errors import DataError
from lamda.durable import replace_file

log = logging.getLogger(__name__)

JUDGED_FROM = 10_000
"""Lines of a lane from which on its share of bad ones is judged."""

KEPT = 100
"""Bad lines that a run keeps."""


class BadLine(NamedTuple):
    """A line that gives no document: its place for a person, and its first 200 characters."""

    place: str
    reason: str
    beginning: str


class Quarantined(NamedTuple):
    """A bad line, and the lane that it was met in."""

    lane: int
    bad: BadLine


def bad_line(place: str, reason: str, data: bytes) -> BadLine:
    """The record of a bad line from its bytes, which need not be text."""
    return BadLine(place, reason, data[:800].decode("utf-8", "backslashreplace")[:200])


def few(names: Iterable[str]) -> str:
    """The first of some names, for a message: they are a stranger's, and may be many or long."""
    first = [name if len(name) <= 40 else f"{name[:40]}..." for name in islice(names, 9)]
    return ", ".join([*map(repr, first[:8]), *(["..."] if len(first) > 8 else [])])


def first_of(found: Iterable[Quarantined]) -> list[Quarantined]:
    """The first KEPT by lane and place; what several ranks or runs found is counted once."""
    return sorted(set(found))[:KEPT]


def write_first(path: Path, found: Iterable[Quarantined]) -> list[Quarantined]:
    """Keep the first of what `path` holds already and what was found, a JSON object a line; returns what is new."""
    known = [_from_json(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    kept = first_of([*known, *found])
    if kept != known:
        replace_file(path, "".join(_to_json(each) + "\n" for each in kept))
    return sorted(set(kept) - set(known))


class QuarantineFile:
    """A run's file of its first bad lines, as far as the disk takes them: it is for a look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keeping = BestEffort(f"{path} cannot be updated", errors=(OSError, ValueError, KeyError, TypeError))

    def add(self, found: Iterable[Quarantined]) -> list[Quarantined]:
        """Keep what was found, as `write_first`; returns what is new in the file."""
        with self._keeping:
            return write_first(self._path, found)
        return []


def _to_json(each: Quarantined) -> str:
    return json.dumps({"lane": each.lane, **each.bad._asdict()})


def _from_json(line: str) -> Quarantined:
    values = json.loads(line)
    return Quarantined(values.pop("lane"), BadLine(**values))


@dataclass
class Tally:
    """A lane's lines so far, and the bad ones among them; raises DataError for more than `limit` of them."""

    lane: int
    limit: float
    lines: int = 0
    bad: int = 0
    first: list[BadLine] = field(default_factory=list)

    def good(self) -> None:
        """Count a line that holds a document."""
        self.lines += 1
        self._judge()

    def quarantine(self, line: BadLine) -> None:
        """Count a bad line."""
        self.lines, self.bad = self.lines + 1, self.bad + 1
        if len(self.first) < 3:
            self.first.append(line)
            log.warning("lane %d: %s quarantined: %s", self.lane, line.place, line.reason)
        self._judge()

    def examples(self) -> str:
        """The first bad lines that were met, for a message."""
        return "; ".join(f"{line.place}: {line.reason}" for line in self.first)

    def _judge(self) -> None:
        if self.lines >= JUDGED_FROM and self.bad > self.limit * self.lines:
            raise DataError(
                f"lane {self.lane}: {self.bad:,} of {self.lines:,} lines hold no document, more than "
                f"data.max_bad_line_fraction {self.limit:g}: mend the text, or raise it. {self.examples()}"
            )
