"""Text to token ids and back without loss: SentencePiece BPE (arXiv 1808.06226) with byte fallback.

Every model has one layout, so that ids of control symbols are constants of the project:

    0..63    control symbols: end of document, padding, the dialog roles and attributes, spares
    64       unknown, which SentencePiece demands and byte fallback never gives
    65..67   newline, tab, carriage return
    68..323  the 256 bytes
    324..    learned pieces

Control symbols are of SentencePiece's CONTROL type: no text encodes to them, even where it spells one out.

The encoding is a function of the text alone. A text is cut after newlines into pieces of about 20 kB, which
encode several times faster than a whole book; newlines never merge with anything, so the cut changes no id.
Text is also cut into words, as finely as no learned piece reaches over a cut, and a word that comes again is not
encoded again: BPE never merges over a cut that no piece reaches over, so this changes no id either.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

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
"""What SentencePiece writes for a space, and would confuse with one."""

_SPACE_PIECE_UTF8 = SPACE_PIECE.encode()
_PIECE_BYTES = 20_000

_MARKS = (
    r"\x00-\x08\x0b\x0c\x0e-\x1f!-/:-@\[-`{-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7\u2000-\u206f\u20a0-\u20cf"
    r"\u2100-\u2bff\u3000-\u303f\ufe30-\ufe6f\uff00-\uff0f\uff1a-\uff20\U0001f000-\U0001faff"
)
"""Punctuation and symbols, for a class of characters. Written as ranges, they match twice as fast as by categories."""

_WORDS = (
    re.compile(rf" *(?:[^ \n\t\r0-9{_MARKS}]+|[{_MARKS}]+)|[0-9]| +|[\n\t\r]"),
    re.compile(r" *[^ \n\t\r]+| +|[\n\t\r]"),
)
"""Ways to cut a text into words, the finest first: it has a quarter as many different words of code."""

_KEPT = 1 << 23
"""Characters of words whose ids are remembered."""

_TOGETHER = 64


class Tokenizer:
    """A trained vocabulary.

    Attributes:
        vocab_size: V, the number of ids.
        sha256: hex digest of the model file.
        symbols: id of each control symbol by name.
        end_of_document: id that follows each document.
        padding: id of padding.
        token_bytes: int64 [V], UTF-8 bytes of source text that each id stands for; 0 for control symbols.
    """

    def __init__(self, model: bytes) -> None:
        """Take the bytes of a model file; `load` is the way in that checks them."""
        self._processor = sentencepiece.SentencePieceProcessor.from_proto(model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.symbols: Mapping[str, int] = MappingProxyType({name: id for id, name in enumerate(CONTROL_SYMBOLS)})
        self.end_of_document = self.symbols["end_of_document"]
        self.padding = self.symbols["padding"]
        self._utf8 = [_source_bytes(id, piece) for id, piece in enumerate(self._pieces())]
        self.token_bytes = np.array([len(utf8) for utf8 in self._utf8], np.int64)
        first_byte = RESERVED_PIECES.index(BYTE_PIECES[0])
        self._space_piece_ids = np.array([first_byte + byte for byte in _SPACE_PIECE_UTF8], np.int32)
        self._word = self._finest_words()
        self._words, self._kept = self._white_space(), 0

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a model file that `train_tokenizer` wrote.

        Raises:
            UserError: the file cannot be read, is no SentencePiece model, or lacks the layout above.
        """
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
        """Encode whole documents together, without end symbols.

        How many texts go together, and on how many threads, never changes an id.

        Args:
            texts: documents without lone surrogates.
            threads: CPU threads that share the work.

        Returns:
            An array of ids (uint32) for each text.

        Raises:
            UnicodeEncodeError: a text has a lone surrogate, which UTF-8 cannot express.
        """
        if self._word is not None and not any(SPACE_PIECE in text for text in texts):
            return self._encode_words(self._word, texts, threads=threads)
        stretches = [text.encode().split(_SPACE_PIECE_UTF8) for text in texts]
        pieces = [[list(_cut(stretch)) for stretch in document] for document in stretches]
        batch = [piece for document in pieces for stretch in document for piece in stretch]
        encoded = iter(self._processor.encode(batch, return_type="numpy", num_threads=threads))
        return [self._join(document, encoded) for document in pieces]

    def pieces(self, text: str) -> list[str]:
        """Parts of a text of about 20 kB: their ids, one after the other, are those of the text."""
        if len(text) < _PIECE_BYTES // 4 or SPACE_PIECE in text:
            return [text]
        return [piece.decode() for piece in _cut(text.encode())] or [text]

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without an end symbol; the same as `encode_documents` gives."""
        return self.encode_documents([text], threads=1)[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: the inverse of `encode`.

        Control symbols stand for no text and vanish; bytes that are not UTF-8 (a character cut in two, say)
        become U+FFFD.
        """
        return b"".join(self._utf8[id] for id in ids).decode(errors="replace")

    def utf8(self, id: int) -> bytes:
        """The bytes of source text that an id stands for; none for control symbols."""
        return self._utf8[id]

    def _encode_words(self, word: re.Pattern[str], texts: Sequence[str], *, threads: int) -> list[np.ndarray]:
        """As `encode_documents`, for texts without U+2581: only words that are not remembered are encoded."""
        if self._kept > _KEPT:
            self._words, self._kept = self._white_space(), 0
        known = self._words
        documents = [word.findall(text) for text in texts]
        new = list(set().union(*documents).difference(known))
        if new:  # the encoder takes a third of a millisecond even for nothing
            known.update(zip(new, self._ids_of_words(new, threads=threads), strict=True))
            self._kept += sum(map(len, new))
        return [np.frombuffer(b"".join(map(known.__getitem__, words)), np.uint32) for words in documents]

    def _ids_of_words(self, words: Sequence[str], *, threads: int) -> Iterator[bytes]:
        """Ids (uint32) of each word; many go through the encoder as lines of one text, which saves its overhead."""
        newline = RESERVED_PIECES.index("\n")
        lines = ["\n".join(words[i : i + _TOGETHER]).encode() for i in range(0, len(words), _TOGETHER)]
        for ids in self._processor.encode(lines, return_type="numpy", num_threads=threads):
            ends = 4 * np.flatnonzero(ids == newline)
            encoded = ids.tobytes()
            for start, end in zip([0, *(ends + 4)], [*ends, len(encoded)], strict=True):
                yield encoded[start:end]

    def _finest_words(self) -> re.Pattern[str] | None:
        """The first of _WORDS of which each learned piece is inside one word; None where no one is."""
        learned = [piece.replace(SPACE_PIECE, " ") for piece in self._pieces() if piece not in RESERVED_PIECES]
        return next((word for word in _WORDS if all(map(word.fullmatch, learned))), None)

    @staticmethod
    def _white_space() -> dict[str, bytes]:
        """The words that have an id of their own, to begin the memory with."""
        return {piece: np.uint32(RESERVED_PIECES.index(piece)).tobytes() for piece in WHITE_SPACE_PIECES}

    def _join(self, document: list[list[bytes]], encoded: Iterator[np.ndarray]) -> np.ndarray:
        """Ids of a document from those of its pieces, with the bytes of U+2581 between its stretches."""
        arrays: list[np.ndarray] = [np.empty(0, np.int32)]
        for number, stretch in enumerate(document):
            if number:
                arrays.append(self._space_piece_ids)
            arrays.extend(next(encoded) for _ in stretch)
        return np.concatenate(arrays).astype(np.uint32)

    def _pieces(self) -> list[str]:
        return [self._processor.id_to_piece(id) for id in range(self.vocab_size)]

    def _missing_piece(self) -> str | None:
        """What the vocabulary lacks of the layout, or None."""
        pieces = self._pieces()
        for id, expected in enumerate(RESERVED_PIECES):
            found = pieces[id] if id < len(pieces) else None
            if found != expected or self._processor.is_control(id) != (id < len(CONTROL_PIECES)):
                return f"id {id} should be {expected!r} and is {found!r}"
        return None if SPACE_PIECE in pieces else "there is no piece for a space"


def _source_bytes(id: int, piece: str) -> bytes:
    """UTF-8 bytes of source text behind a piece."""
    if id < len(RESERVED_PIECES) and RESERVED_PIECES[id] == piece:
        if piece in WHITE_SPACE_PIECES:
            return piece.encode()
        return bytes([BYTE_PIECES.index(piece)]) if piece in BYTE_PIECES else b""
    return piece.replace(SPACE_PIECE, " ").encode()


def _cut(text: bytes) -> Iterator[bytes]:
    """Cut after the first newline at or past every 20,000 bytes; the pieces joined are the text."""
    start = 0
    while start < len(text):
        end = text.find(b"\n", start + _PIECE_BYTES - 1) + 1 or len(text)
        yield text[start:end]
        start = end
