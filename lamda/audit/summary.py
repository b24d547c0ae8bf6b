"""The counts of an audit, and its examples. Those of shards add up to those of the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KEPT = 10
"""Examples of each kind."""

MAX_NAMES = 10_000
"""Rows of a table; further names are counted together, since names come from the text."""

OTHER = "(other)"

Example = tuple[tuple[int, ...], str]
"""A rank, of which the smallest are kept, ending in file, byte and line; and what is shown."""


@dataclass
class Summary:
    """Tables of counts by name, and examples by kind."""

    tables: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    overlapping: set[int] = field(default_factory=set)

    def count(self, table: str, name: str, *amounts: int) -> None:
        """Add to the row of a name."""
        rows = self.tables.setdefault(table, {})
        if name not in rows and len(rows) >= MAX_NAMES:
            name = OTHER
        row = rows.setdefault(name, [0] * len(amounts))
        for place, amount in enumerate(amounts):
            row[place] += amount

    def keep(self, kind: str, rank: tuple[int, ...], text: str) -> None:
        """Keep an example, if its rank is among the smallest."""
        kept = self.examples.setdefault(kind, [])
        if len(kept) < KEPT or rank < kept[-1][0]:
            kept.append((rank, text))
            kept.sort()
            del kept[KEPT:]

    def accepts(self, kind: str, rank: tuple[int, ...]) -> bool:
        """Whether `keep` would keep it."""
        kept = self.examples.get(kind, [])
        return len(kept) < KEPT or rank < kept[-1][0]

    def add(self, other: Summary) -> None:
        """Add the summary of another shard."""
        for table, rows in other.tables.items():
            for name, amounts in rows.items():
                self.count(table, name, *amounts)
        for kind, kept in other.examples.items():
            for rank, text in kept:
                self.keep(kind, rank, text)
        self.overlapping |= other.overlapping

    def to_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return {"tables": self.tables, "examples": self.examples, "overlapping": sorted(self.overlapping)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Summary:
        """The inverse of `to_json`."""
        examples = {
            kind: [(tuple(rank), str(text)) for rank, text in kept] for kind, kept in values["examples"].items()
        }
        return cls(values["tables"], examples, set(values["overlapping"]))
