"""The research loop of section 6.2 of the paper: the base answer, then queries to the toolset, then the response.

Tool results are data: they enter the model's context as text after a control symbol. The next addressee is decided
in one place only, by which of two control symbols is more probable there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lamda.dialog.tools.result import Result
from lamda.dialog.tools.toolset import Toolset

MAX_QUERIES = 4
"""The paper's example; it calls the number a serving parameter."""


@dataclass(frozen=True)
class ToolCall:
    """A query with its results, or, as the last step, the response. dropped: why the base answer replaces it."""

    to: Literal["TS", "user"]
    text: str
    results: tuple[Result, ...] = ()
    dropped: str | None = None

    @property
    def snippet(self) -> str:
        """The results as text for the model."""
        return "\n".join(result.text for result in self.results)


class Researcher(Protocol):
    """Chooses the next step."""

    def __call__(self, steps: Sequence[ToolCall], *, may_ask: bool) -> tuple[Literal["TS", "user"], str]:
        """Addressee and text: a query, or the response; always the response unless `may_ask`."""
        ...


def research(researcher: Researcher, toolset: Toolset, *, max_queries: int = MAX_QUERIES) -> tuple[ToolCall, ...]:
    """All steps, the response to the user last.

    After `max_queries` the researcher must respond. A repeated query gets the next result in rank.
    """
    steps: list[ToolCall] = []
    asked: Counter[str] = Counter()
    while True:
        to, text = researcher(steps, may_ask=len(steps) < max_queries)
        if to == "user":
            return (*steps, ToolCall("user", text))
        steps.append(ToolCall("TS", text, tuple(toolset(text, again=asked[text]))))
        asked[text] += 1


def sources(steps: Sequence[ToolCall]) -> tuple[str, ...]:
    """The distinct sources of the results, in order."""
    return tuple(dict.fromkeys(result.source for step in steps for result in step.results if result.source))
