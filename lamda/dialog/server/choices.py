"""The text of one choice as it comes: whole characters, up to and without the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from lamda.data.tokenizer import Tokenizer
from lamda.inference.generation import TextStream


class ChoiceText:
    """Holds back what may yet become a stop string.

    Attributes:
        text: all that was given out.
        stopped: whether a stop string ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._stream, self._stops, self._held = TextStream(tokenizer), stops, ""

    def add(self, id: int) -> str:
        """What is certain with one id more; nothing after a stop."""
        return self._give(self._stream.add(id), final=False)

    def end(self) -> str:
        """The rest."""
        return self._give(self._stream.end(), final=True)

    def _give(self, more: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += more
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(places)
        certain = min(places) if places else len(self._held) - (0 if final else self._doubtful())
        given, self._held = self._held[:certain], self._held[certain:]
        self.text += given
        return given

    def _doubtful(self) -> int:
        """Characters at the end with which a stop string begins."""
        longest = min(max(map(len, self._stops), default=0) - 1, len(self._held))
        return next(
            (size for size in range(longest, 0, -1) if any(s.startswith(self._held[-size:]) for s in self._stops)), 0
        )
