"""The interface of a tool, and its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Result:
    """A result: a text and, if it has a source, its URL or `file:line`."""

    text: str
    source: str | None = None


class Tool(Protocol):
    """A tool takes one string, returns nothing if it cannot parse it, and keeps no state between calls.

    `again` is how often the query was repeated: a tool that ranks its results returns the next one.
    """

    name: str

    def __call__(self, query: str, *, again: int = 0) -> list[Result]:
        """The results for the query."""
        ...
