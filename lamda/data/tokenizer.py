"""The tokenizer: lossless SentencePiece BPE (arXiv 1808.06226) with byte fallback.

All models share one layout, so the ids of control symbols are constants:

    0..63    control symbols: end of document, padding, the dialog roles and attributes, spares
    64       unknown: required by SentencePiece, never produced with byte fallback
    65..67   newline, tab, carriage return
    68..323  the 256 bytes
    324..    learned pieces

Control symbols have the SentencePiece type CONTROL: no text encodes to them, even if it contains their name.

Two optimizations do not change any id. Text is cut after newlines into pieces of about 20 kB, which encode several
times faster than a whole book: newlines never merge with anything. And text is cut into words, at the finest level at
which no learned piece crosses a cut, and the ids of words are cached: BPE never merges across such a cut.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
import sentencepiece

from lamda.config.errors import UserError

_NAMED = (
    "end_of_document",
    "padding",
    *("RESPONSE", "SENSIBLE", "SPECIFIC", "INTERESTING", "UNSAFE", "GROUNDED", "USER", "ASSISTANT", "SYSTEM", "TS"),
)
CONTROL_SYMBOLS = (*_NAMED, *(f"spare_{number}" for number in range(len(_NAMED), 64)))
CONTROL_PIECES = tuple(f"<{name}>" for name in CONTROL_SYMBOLS)
UNKNOWN_PIECE = "<unknown>"
WHITE_SPACE_PIECES = ("\n", "\t", "\r")
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
RESERVED_PIECES = (*CONTROL_PIECES, UNKNOWN_PIECE, *WHITE_SPACE_PIECES, *BYTE_PIECES)

SPACE_PIECE = "\u2581"
"""SentencePiece writes a space as this character, so it cannot encode the character itself."""

_SPACE_PIECE_UTF8 = SPACE_PIECE.encode()
_PIECE_BYTES = 20_000

_MARKS = (
    r"\x00-\x08\x0b\x0c\x0e-\x1f!-/:-@\[-`{-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7\u2000-\u206f\u20a0-\u20cf"
    r"\u2100-\u2bff\u3000-\u303f\ufe30-\ufe6f\uff00-\uff0f\uff1a-\uff20\U0001f000-\U0001faff"
)
"""Punctuation and symbols, as a regex character class. Ranges match twice as fast as Unicode categories."""

_WORDS = (
    re.compile(rf" *(?:[^ \n\t\r0-9{_MARKS}]+|[{_MARKS}]+)|[0-9]| +|[\n\t\r]"),
    re.compile(r" *[^ \n\t\r]+| +|[\n\t\r]"),
)
"""Patterns that cut a text into words, finest first: on code, it gives a quarter as many distinct words."""

_CACHED_CHARACTERS = 1 << 23
"""Size of the word cache, in characters of words."""

_WORDS_PER_LINE = 64


class Tokenizer:
    """A trained vocabulary of V = `vocab_size` ids.

    sha256: hex digest of the model file. symbols: id of each control symbol by name. end_of_document: id of the end
    symbol after each document. token_bytes: int64 [V], number of UTF-8 bytes of each id; 0 for control symbols.
    """

    def __init__(self, model: bytes) -> None:
        """From the bytes of a model file, unchecked; see `load`."""
        self._processor = sentencepiece.SentencePieceProcessor.from_proto(model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.symbols: Mapping[str, int] = MappingProxyType({name: id for id, name in enumerate(CONTROL_SYMBOLS)})
        self.end_of_document = self.symbols["end_of_document"]
        self.padding = self.symbols["padding"]
        self._utf8 = [_source_bytes(id, piece) for id, piece in enumerate(self._pieces())]
        self.token_bytes = np.array([len(utf8) for utf8 in self._utf8], np.int64)
        self._space_piece_ids = np.array([RESERVED_PIECES.index(BYTE_PIECES[byte]) for byte in _SPACE_PIECE_UTF8])
        self._word = self._finest_words()
        self._words, self._cached = self._white_space(), 0

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a model file written by `train_tokenizer`. Raises UserError if it is not one, or cannot be read."""
        remedy = "set tokenizer.path to a model that `lamda tokenizer train` wrote"
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path} ({error.strerror}): {remedy}") from error
        try:
            tokenizer = cls(model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is not a SentencePiece model: {remedy}") from error
        missing = tokenizer._missing_piece()
        if missing is not None:
            raise UserError(f"the tokenizer {path} does not have this project's layout, {missing}: {remedy}")
        return tokenizer

    def encode_documents(self, texts: Sequence[str], *, threads: int) -> list[np.ndarray]:
        """The ids of each text (uint32), without EOS; the same in any batch, on any number of CPU threads.

        Raises UnicodeEncodeError for a lone surrogate, which UTF-8 cannot express.
        """
        if self._word is not None and not any(SPACE_PIECE in text for text in texts):
            return self._encode_words(self._word, texts, threads=threads)
        segments = [text.encode().split(_SPACE_PIECE_UTF8) for text in texts]
        pieces = [[list(_cut(segment)) for segment in document] for document in segments]
        batch = [piece for document in pieces for segment in document for piece in segment]
        encoded = iter(self._processor.encode(batch, return_type="numpy", num_threads=threads))
        return [self._join(document, encoded) for document in pieces]

    def pieces(self, text: str) -> list[str]:
        """Parts of a text of about 20 kB; their concatenated ids are those of the text."""
        if len(text) < _PIECE_BYTES // 4 or SPACE_PIECE in text:
            return [text]
        return [piece.decode() for piece in _cut(text.encode())] or [text]

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without EOS; equal to those of `encode_documents`."""
        return self.encode_documents([text], threads=1)[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: the inverse of `encode`.

        Control symbols have no text; invalid UTF-8 becomes U+FFFD, but the beginning of a character at the end, such
        as a length limit leaves, is left out.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(b"".join(self._utf8[id] for id in ids))

    def utf8(self, id: int) -> bytes:
        """The UTF-8 bytes of an id; empty for control symbols."""
        return self._utf8[id]

    def _encode_words(self, word: re.Pattern[str], texts: Sequence[str], *, threads: int) -> list[np.ndarray]:
        """As `encode_documents`, for texts without U+2581, with a cache of words."""
        if self._cached > _CACHED_CHARACTERS:
            self._words, self._cached = self._white_space(), 0
        known = self._words
        documents = [word.findall(text) for text in texts]
        new = list(set().union(*documents).difference(known))
        if new:  # an empty call of the encoder takes a third of a millisecond
            known.update(zip(new, self._ids_of_words(new, threads=threads), strict=True))
            self._cached += sum(map(len, new))
        return [np.frombuffer(b"".join(map(known.__getitem__, words)), np.uint32) for words in documents]

    def _ids_of_words(self, words: Sequence[str], *, threads: int) -> Iterator[bytes]:
        """Ids (uint32) of each word. Many words are encoded as lines of one text, to reduce overhead."""
        newline = RESERVED_PIECES.index("\n")
        lines = ["\n".join(words[i : i + _WORDS_PER_LINE]).encode() for i in range(0, len(words), _WORDS_PER_LINE)]
        for ids in self._processor.encode(lines, return_type="numpy", num_threads=threads):
            ends = 4 * np.flatnonzero(ids == newline)
            encoded = ids.tobytes()
            for start, end in zip([0, *(ends + 4)], [*ends, len(encoded)], strict=True):
                yield encoded[start:end]

    def _finest_words(self) -> re.Pattern[str] | None:
        """The first of _WORDS that cuts no learned piece, or None."""
        learned = [piece.replace(SPACE_PIECE, " ") for piece in self._pieces() if piece not in RESERVED_PIECES]
        return next((word for word in _WORDS if all(map(word.fullmatch, learned))), None)

    @staticmethod
    def _white_space() -> dict[str, bytes]:
        """The initial word cache: words with reserved ids."""
        return {piece: np.uint32(RESERVED_PIECES.index(piece)).tobytes() for piece in WHITE_SPACE_PIECES}

    def _join(self, document: list[list[bytes]], encoded: Iterator[np.ndarray]) -> np.ndarray:
        """Ids of a document from those of its pieces, with the bytes of U+2581 between its segments."""
        arrays: list[np.ndarray] = [np.empty(0, np.int32)]
        for number, segment in enumerate(document):
            if number:
                arrays.append(self._space_piece_ids)
            arrays.extend(next(encoded) for _ in segment)
        return np.concatenate(arrays).astype(np.uint32)

    def _pieces(self) -> list[str]:
        return [self._processor.id_to_piece(id) for id in range(self.vocab_size)]

    def _missing_piece(self) -> str | None:
        """The first deviation of the vocabulary from the layout, or None."""
        pieces = self._pieces()
        for id, expected in enumerate(RESERVED_PIECES):
            found = pieces[id] if id < len(pieces) else None
            if found != expected or self._processor.is_control(id) != (id < len(CONTROL_PIECES)):
                return f"id {id} should be {expected!r} and is {found!r}"
        return None if SPACE_PIECE in pieces else "there is no piece for a space"


def _source_bytes(id: int, piece: str) -> bytes:
    """UTF-8 bytes of a piece."""
    if id < len(RESERVED_PIECES) and RESERVED_PIECES[id] == piece:
        if piece in WHITE_SPACE_PIECES:
            return piece.encode()
        return bytes([BYTE_PIECES.index(piece)]) if piece in BYTE_PIECES else b""
    return piece.replace(SPACE_PIECE, " ").encode()


def _cut(text: bytes) -> Iterator[bytes]:
    """Cut after the first newline at or after every 20,000 bytes."""
    start = 0
    while start < len(text):
        end = text.find(b"\n", start + _PIECE_BYTES - 1) + 1 or len(text)
        yield text[start:end]
        start = end
