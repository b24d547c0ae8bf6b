"""Held-out text as rows: once, in order, unshuffled; each row begins with the last token of the one before.

The first one begins with an end symbol, so that every token is scored once: a document's first one after the end of
the document before it, as in training and in the rolling log-likelihood of lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lamda.config.errors import DataError
from lamda.data.card import Source
from lamda.data.documents import Document, Form
from lamda.data.files import File
from lamda.data.lanes import RAW_TEXT, Cursor, read_lane, whole_lane
from lamda.data.quarantine import BadLine
from lamda.data.resolving import resolve
from lamda.data.tokenizer import Tokenizer

MOST_SHARES = 64
"""Files that are read side by side, about."""


@dataclass(frozen=True)
class Row:
    """A row of held-out text.

    ids: [L+1] uint32. scored: [L] bool, the targets that count: all but the padding of the last row. domains: [L]
    int32, of the targets. utf8_bytes: [number of domains so far] int64, the text of the targets. documents: [L] int32,
    of the inputs, where attention stays inside a document: an end symbol is the first input of the next, as in
    training.
    """

    ids: NDArray[np.uint32]
    scored: NDArray[np.bool_]
    domains: NDArray[np.int32]
    utf8_bytes: NDArray[np.int64]
    documents: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class HeldOut:
    """The validation text of a run.

    document_mask: attention stays inside a document. on_wait: called while a server is waited for.
    """

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    sequence_length: int
    form: Form = RAW_TEXT
    document_mask: bool = False
    on_wait: Callable[[], object] = field(default=lambda: None, compare=False, repr=False)

    def documents(self) -> Iterator[Document]:
        """Every document once, source by source, file by file."""
        for source in self.sources:
            for file in resolve(source, on_wait=self.on_wait):
                yield from self._documents_of(source, file)

    def rows(self, domains: list[str]) -> Iterator[Row]:
        """All rows, one of each file in turn (of each share of a source's files, where there are many).

        So the first ones are of all the text that there is. Names of domains are added to `domains` as they appear.
        """
        streams = [self._rows_of(documents, domains) for documents in self._shares()]
        while streams:
            going_on = []
            for stream in streams:
                row = next(stream, None)
                if row is not None:
                    yield row
                    going_on.append(stream)
            streams = going_on

    def _shares(self) -> Iterator[Iterator[Document]]:
        """The documents of each file, or of each share of a source's many files, so that few are open at a time."""
        for source in self.sources:
            files = resolve(source, on_wait=self.on_wait)
            count = min(len(files), max(1, MOST_SHARES // len(self.sources)))
            yield from (self._documents_in(source, files[share::count]) for share in range(count))

    def _documents_in(self, source: Source, files: Sequence[File]) -> Iterator[Document]:
        for file in files:
            yield from self._documents_of(source, file)

    def _documents_of(self, source: Source, file: File) -> Iterator[Document]:
        entries = read_lane(whole_lane(source, file, form=self.form), Cursor())
        return (entry for entry in entries if isinstance(entry, Document))

    def _rows_of(self, documents: Iterator[Document], domains: list[str]) -> Iterator[Row]:
        length = self.sequence_length
        stream = _Stream.of_end(self.tokenizer.end_of_document)
        for chunk in self._encoded(documents, domains):
            stream = stream + chunk
            while len(stream.ids) > length:
                yield self._row(stream.head(length + 1), len(domains))
                stream = stream.tail(length)
        if len(stream.ids) > 1:
            yield self._row(stream, len(domains))

    def _encoded(self, documents: Iterator[Document], domains: list[str]) -> Iterator[_Stream]:
        for document in documents:
            if document.domain not in domains:
                domains.append(document.domain)
            (ids,) = self.tokenizer.encode_documents([document.text], threads=1)
            ids = np.append(ids, np.uint32(self.tokenizer.end_of_document))
            first = np.zeros(len(ids), bool)
            first[0] = True
            yield _Stream(ids, first, np.full(len(ids), domains.index(document.domain), np.int32))

    def _row(self, stream: _Stream, known: int) -> Row:
        sizes = self.tokenizer.token_bytes[stream.ids[1:]]
        shown = np.bincount(stream.domains[1:], weights=sizes, minlength=known)
        missing = self.sequence_length + 1 - len(stream.ids)
        return Row(
            ids=np.pad(stream.ids, (0, missing), constant_values=self.tokenizer.padding),
            scored=np.pad(np.ones(len(stream.ids) - 1, bool), (0, missing)),
            domains=np.pad(stream.domains[1:], (0, missing)),
            utf8_bytes=shown.astype(np.int64),
            documents=self._documents_of_inputs(stream, missing) if self.document_mask else None,
        )

    @staticmethod
    def _documents_of_inputs(stream: _Stream, missing: int) -> NDArray[np.int32]:
        """An input is of its target's document, so that the end symbol begins the next; padding is of none."""
        number = np.cumsum(stream.first, dtype=np.int32)
        return np.pad(number[1:], (0, missing), constant_values=len(stream.ids) + 1)


@dataclass(frozen=True)
class _Stream:
    """Tokens in a row, whether each begins a document, and its domain."""

    ids: NDArray[np.uint32]
    first: NDArray[np.bool_]
    domains: NDArray[np.int32]

    @staticmethod
    def of_end(end: int) -> _Stream:
        """The end symbol that comes before the first document."""
        return _Stream(np.array([end], np.uint32), np.zeros(1, bool), np.zeros(1, np.int32))

    def __add__(self, other: _Stream) -> _Stream:
        return _Stream(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.first, other.first]),
            np.concatenate([self.domains, other.domains]),
        )

    def head(self, count: int) -> _Stream:
        return _Stream(self.ids[:count], self.first[:count], self.domains[:count])

    def tail(self, start: int) -> _Stream:
        return _Stream(self.ids[start:], self.first[start:], self.domains[start:])


def require_documents(source: Source, *, form: Form, on_wait: Callable[[], object]) -> None:
    """Read the first document of each validation file, of the first MOST_SHARES at the most.

    Raises DataError where there is none, at a run's start and not at its first evaluation.
    """
    for file in resolve(source, on_wait=on_wait)[:MOST_SHARES]:
        bad: list[BadLine] = []
        with closing(read_lane(whole_lane(source, file, form=form), Cursor())) as entries:
            for entry in entries:
                if isinstance(entry, Document):
                    break
                bad.append(entry)
            else:
                raise DataError(
                    f"{file.url}: holds no document. {'; '.join(f'{b.place}: {b.reason}' for b in bad[:3])}"
                )


def micro_batches(rows: Iterator[Row], *, size: int, rank: int, world: int) -> Iterator[Sequence[Row]]:
    """This rank's micro-batches of up to `size` rows, dealt in turn; as many on every rank, some empty."""
    while True:
        turn = [[row for _, row in zip(range(size), rows, strict=False)] for _ in range(world)]
        if not turn[0]:
            return
        yield turn[rank]
