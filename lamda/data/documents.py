"""Documents: what a record holds, and how it becomes ids. Raw text here; conversations are `lamda.dialog`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lamda.data.card import Source
from lamda.data.packing import Method
from lamda.data.quarantine import few
from lamda.data.tokenizer import Tokenizer


class Document(NamedTuple):
    """A text and its place: file of the lane, line of its share, decompressed offset of the line, epoch of the source.

    begin, end: where it lies on the lane's axis (`lamda.data.lanes`). is_end: whether the document ends with this
    text, which may be a piece of it.
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


class Encoded(NamedTuple):
    """A document, or an example that is made of it: [n] ids, not empty.

    scored: [n], the ids that count as targets; all of them where it is None. domain: in place of the document's.
    """

    ids: NDArray[np.uint32]
    scored: NDArray[np.bool_] | None = None
    domain: str | None = None


class Form(Protocol):
    """What the records of a corpus are. It travels with lanes into other processes and holds no tokenizer."""

    @property
    def packings(self) -> tuple[Method, ...]:
        """The ways of `data.packing` that suit it."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """By name, what else the order of samples depends on."""
        ...

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of its examples, where not the documents' own."""
        ...

    def keys_of(self, source: Source) -> tuple[str, ...] | None:
        """The keys of a record that its text is made of; None: all of them."""
        ...

    def text_of(self, record: Any, source: Source) -> str:
        """What a document keeps of its record. Raises ValueError that says why a record holds no document."""
        ...

    def pieces(self, document: Document, tokenizer: Tokenizer) -> list[Document]:
        """What can be encoded by itself, in order: together these give what the document gives."""
        ...

    def encode(self, documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[Encoded]]:
        """What each document, or piece of one, gives in an epoch; a pure function of it."""
        ...


@dataclass(frozen=True)
class RawText:
    """Text at the source's path, encoded whole and ended by the end symbol."""

    packings: tuple[Method, ...] = ("concat", "best_fit")
    domains: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """Nothing: a source's rules are in the fingerprint already."""
        return {}

    def keys_of(self, source: Source) -> tuple[str, ...]:
        """See `Form`."""
        return (first_key(source.text),)

    def text_of(self, record: Any, source: Source) -> str:
        """See `Form`."""
        text = at(record, source.text)
        if not isinstance(text, str):
            found = f"nothing{_keys_beside(record)}" if text is None else type(text).__name__
            raise ValueError(f"no text at {source.text!r} (found {found})")
        return text

    def pieces(self, document: Document, tokenizer: Tokenizer) -> list[Document]:
        """See `Form`: a book is a few of them for each window that it is in."""
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


def at(record: Any, path: str) -> Any:
    """What a record holds at a dotted path, or None."""
    value = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _keys_beside(record: Any) -> str:
    """What a record has, for one who named the wrong key."""
    return f"; its keys are {few(map(str, record))}" if isinstance(record, dict) and record else ""


def first_key(path: str) -> str:
    """The key of a record that a dotted path goes through."""
    return path.split(".", 1)[0]
