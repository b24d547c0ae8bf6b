"""Replies in a terminal: nothing that a model or a file says can command it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from lamda.console import visible

if TYPE_CHECKING:
    from lamda.dialog.ranking import Scored
    from lamda.dialog.research import Step
    from lamda.dialog.speaker import Reply


class Typewriter:
    """Writes a reply as it is known.

    Attributes:
        written: the text so far, as the model wrote it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.written = ""

    def write(self, text: str) -> None:
        """Type some more."""
        self.written += text
        self._stream.write(visible(text))
        self._stream.flush()

    def end(self) -> None:
        """End the line."""
        self._stream.write("\n")
        self._stream.flush()


def explanation(reply: Reply) -> str:
    """What /why shows: the candidates with their scores, what was dropped and why, the steps, the sources."""
    lines = [_candidate(candidate) for candidate in reply.candidates]
    if reply.refused:
        lines.append("every candidate was dropped: the reply is the refusal that was configured")
    for step in reply.steps:
        lines += _step(step)
    lines += [f"source: {source}" for source in reply.sources]
    return visible("\n".join(lines))


def _candidate(candidate: Scored) -> str:
    place = "dropped" if candidate.rank is None else f"#{candidate.rank}"
    scores = " ".join(f"{name} {value:.3f}" for name, value in candidate.scores.items())
    reason = f" ({candidate.dropped})" if candidate.dropped else ""
    return f"{place:>8} {candidate.value:7.3f}  {scores}{reason}\n{'':18}{_line(candidate.text)}"


def _step(step: Step) -> list[str]:
    if step.to == "user":
        dropped = f" (not said: {step.dropped}; the base answer was)" if step.dropped else ""
        return [f"research: User, {_line(step.text)}{dropped}"]
    found = [
        f"          {_line(result.text)}{f' [{result.source}]' if result.source else ''}" for result in step.results
    ]
    return [f"research: TS, {_line(step.text)}", *(found or ["          (nothing was found)"])]


def _line(text: str) -> str:
    return " ".join(text.split())
