"""The research loop of section 6.2 of the paper: the base answer, then queries to the toolset, then the user.

What the tools find is data. It enters the model's context as text behind a control symbol, and who is
addressed next is read from one place alone: which of two control symbols the model finds likelier there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lamda.dialog.tools.result import Result
from lamda.dialog.tools.toolset import Toolset

MAX_QUERIES = 4
"""The paper's example; it says that the number is a parameter of serving."""


@dataclass(frozen=True)
class Step:
    """A query to the toolset with what it found, or the response to the user.

    dropped: why the response was not said, and the base answer in its place; None where it was.
    """

    to: Literal["TS", "user"]
    text: str
    results: tuple[Result, ...] = ()
    dropped: str | None = None

    @property
    def snippet(self) -> str:
        """The results as the model reads them."""
        return "\n".join(result.text for result in self.results)

    def to_record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "to": self.to,
            "text": self.text,
            "results": [{"text": result.text, "source": result.source} for result in self.results],
            "dropped": self.dropped,
        }


class Researcher(Protocol):
    """Who decides what to do after some steps."""

    def __call__(self, steps: Sequence[Step], *, may_ask: bool) -> tuple[Literal["TS", "user"], str]:
        """A query or the response; always the response where it may not ask."""
        ...


def research(researcher: Researcher, toolset: Toolset, *, max_queries: int = MAX_QUERIES) -> tuple[Step, ...]:
    """All steps up to the response to the user, which is the last.

    After `max_queries` the researcher must respond. A query asked again gets what ranks next.
    """
    steps: list[Step] = []
    asked: Counter[str] = Counter()
    while True:
        to, text = researcher(steps, may_ask=len(steps) < max_queries)
        if to == "user":
            return (*steps, Step("user", text))
        steps.append(Step("TS", text, tuple(toolset(text, again=asked[text]))))
        asked[text] += 1


def sources(steps: Sequence[Step]) -> tuple[str, ...]:
    """Where the results were read, each once, in the order they came."""
    return tuple(dict.fromkeys(result.source for step in steps for result in step.results if result.source))
