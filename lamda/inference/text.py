"""Text as it comes, id by id: never a piece of a character."""

from __future__ import annotations

import codecs

from lamda.data.tokenizer import Tokenizer


class TextStream:
    """Turns ids into text; the bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        """The text that is certain with one id more; may be empty."""
        return self._decoder.decode(self._tokenizer.utf8(id))

    def end(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing. All parts together are `Tokenizer.decode`'s text."""
        return self._decoder.decode(b"", final=True)
