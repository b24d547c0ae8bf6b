"""What a chat's client sees before the answer is complete: its text where that may be shown, else its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lamda.inference.generation import OnToken

OnProgress = Callable[[dict[str, Any]], None]


class ReplyProgress:
    """The stages of one reply: its candidates are sampled and rated; then come the steps with tools, if any."""

    def __init__(self, report: OnProgress | None, *, is_rated: bool) -> None:
        self._report, self._is_rated, self._stage = report, is_rated, "sampling"

    @contextmanager
    def of(self, count: int, on_token: OnToken | None) -> Iterator[OnToken | None]:
        """Reports once per token of `count` candidates; gives the callback that knows of them."""
        report = self._report
        if report is None:
            yield on_token
            return
        lengths = [0] * count

        def watched(number: int, id: int) -> bool | None:
            longest = max(lengths)
            lengths[number] += 1
            if lengths[number] > longest:  # those that continue are equally long: a shorter one has ended
                counts = {"candidates": count, "finished": sum(n < longest for n in lengths), "tokens": sum(lengths)}
                report({"stage": self._stage, **counts})
            return on_token(number, id) if on_token else None

        yield watched
        if self._is_rated and self._stage == "sampling":
            report({"stage": "rating", "candidates": count})
        self._stage = "tools"


class StrippedText:
    """Passes on a text without the white space around it. sent: its length so far."""

    def __init__(self, on_text: Callable[[str], None] | None) -> None:
        self.sent, self._text, self._on_text = 0, "", on_text

    def add(self, text: str) -> None:
        """The next piece."""
        self._text += text
        new = self._text.strip()[self.sent :]
        self.sent += len(new)
        if new and self._on_text is not None:
            self._on_text(new)
