"""What a tool is and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Result:
    """What a tool found: a text and, where it was read somewhere, its URL or `file:line`."""

    text: str
    source: str | None = None


class Tool(Protocol):
    """A tool takes one string, says nothing where it cannot parse it, and keeps no state between calls.

    `again` is how often the same query was asked before: a tool that ranks what it finds then gives the next.
    """

    name: str

    def __call__(self, query: str, *, again: int = 0) -> list[Result]:
        """What the tool has to say to the query."""
        ...
