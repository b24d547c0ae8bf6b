"""Documents: the text of a record and its conversion to ids. Raw text here; conversations are in `lamda.dialog`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lamda.data.card import Source
from lamda.data.packing import Method
from lamda.data.quarantine import few
from lamda.data.tokenizer import Tokenizer


class Document(NamedTuple):
    """A text and its position: file in the lane, line, decompressed byte offset of the line, epoch of the source.

    begin, end: interval on the axis of the lane (`lamda.data.lanes`). is_end: whether the document ends with this text,
    which may be a piece of it.
    """

    text: str
    domain: str
    file: int
    line: int
    byte: int
    begin: int = 0
    end: int = 0
    is_end: bool = True
    epoch: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """File and line."""
        return self.file, self.line


class Encoded(NamedTuple):
    """A document, or an example made of it: [n] ids, not empty.

    loss_mask: [n], the ids that count as targets; None: all. domain: replaces that of the document.
    """

    ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_] | None = None
    domain: str | None = None


class Form(Protocol):
    """The kind of records in a corpus. It is pickled with lanes, so it holds no tokenizer."""

    @property
    def packings(self) -> tuple[Method, ...]:
        """The supported values of `data.packing`."""

    @property
    def identity(self) -> dict[str, Any]:
        """Further entries of the fingerprint, by name."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of its examples, if they replace those of the documents."""

    def keys_of(self, source: Source) -> tuple[str, ...] | None:
        """The keys of a record that are read; None: all."""

    def text_of(self, record: Any, source: Source) -> str:
        """The text of a record. Raises ValueError with the reason if there is none."""

    def pieces(self, document: Document, tokenizer: Tokenizer) -> list[Document]:
        """The document cut into pieces that can be encoded separately, with the same ids."""

    def encode(self, documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[Encoded]]:
        """The ids or examples of each document or piece; a pure function of it."""


@dataclass(frozen=True)
class RawText:
    """The text at the `text` path of the source, followed by EOS (`Tokenizer.end_of_document`)."""

    packings: tuple[Method, ...] = ("concat", "best_fit")
    domains: tuple[str, ...] = ()
    identity: ClassVar[dict[str, Any]] = {}  # the rules of a source are part of the fingerprint anyway

    def keys_of(self, source: Source) -> tuple[str, ...]:
        """See `Form`."""
        return (source.text.partition(".")[0],)

    def text_of(self, record: Any, source: Source) -> str:
        """See `Form`."""
        text = get_path(record, source.text)
        if not isinstance(text, str):
            keys = f"; its keys are {few(map(str, record))}" if isinstance(record, dict) and record else ""
            found = f"nothing{keys}" if text is None else type(text).__name__
            raise ValueError(f"no text at {source.text!r} (found {found})")
        return text

    def pieces(self, document: Document, tokenizer: Tokenizer) -> list[Document]:
        """See `Form`. A book has many pieces, so that a window encodes only a part of it."""
        texts = tokenizer.pieces(document.text)
        if len(texts) < 2:
            return [document]
        ends = np.cumsum([len(text) for text in texts])
        places = document.begin + (document.end - document.begin) * ends // max(1, int(ends[-1]))
        return [
            document._replace(text=text, begin=int(begin), end=int(end), is_end=text is texts[-1])
            for text, begin, end in zip(texts, [document.begin, *places[:-1]], places, strict=True)
        ]

    def encode(self, documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[Encoded]]:
        """See `Form`."""
        end = np.array([tokenizer.end_of_document], np.uint32)
        encoded = tokenizer.encode_documents([document.text for document in documents], threads=1)
        return [
            [Encoded(np.concatenate([ids, end]) if document.is_end else ids)]
            for document, ids in zip(documents, encoded, strict=True)
        ]


def get_path(record: Any, path: str) -> Any:
    """The value at a dotted path in a record, or None."""
    value = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
