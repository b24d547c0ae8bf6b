"""Held-out text as rows: every document once, unshuffled; each row begins with the last token of the previous row.

The first row begins with EOS, so every token is scored exactly once. The first token of a document is scored after EOS
of the previous one, as in training and in the rolling log-likelihood of lm-eval.
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
from lamda.data.lanes import RAW_TEXT, Cursor, in_turn
from lamda.data.partitioning import whole_lane
from lamda.data.quarantine import BadLine, examples
from lamda.data.resolving import resolve
from lamda.data.tokenizer import Tokenizer

MAX_OPEN_FILES = 64
"""Files that are read concurrently, approximately."""

_TOKEN = np.dtype([("id", "<u4"), ("is_first", "?"), ("domain", "<i4")])
"""A token of a domain; is_first: whether it begins a document."""


@dataclass(frozen=True)
class EvalRow:
    """A row of held-out text.

    ids: [L+1] uint32. loss_mask: [L] bool, the targets that count: all but the padding of the last row. domains: [L]
    int32, of the targets. utf8_bytes: [number of domains so far] int64, bytes of text of the targets. documents: [L]
    int32, of the inputs, if attention is limited to a document; EOS is the first input of the next document,
    as in training.
    """

    ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]
    domains: NDArray[np.int32]
    utf8_bytes: NDArray[np.int64]
    documents: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class HeldOut:
    """The validation text of a run. document_mask: as for the loader. on_wait: called while waiting for a server."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    sequence_length: int
    form: Form = RAW_TEXT
    document_mask: bool = False
    on_wait: Callable[[], object] = field(default=lambda: None, compare=False, repr=False)

    def documents(self) -> Iterator[Document]:
        """Every document once, source by source, file by file."""
        for source in self.sources:
            yield from self._documents_in(source, resolve(source, on_wait=self.on_wait))

    def rows(self, domains: list[str]) -> Iterator[EvalRow]:
        """All rows, one from each file in turn (from each group of files, if a source has many).

        So the first rows represent all text. New domain names are appended to `domains`.
        """
        yield from in_turn([self._rows_of(documents, domains) for documents in self._file_groups()])

    def _file_groups(self) -> Iterator[Iterator[Document]]:
        """The documents of each file, or of each group of files if a source has many, to limit open files."""
        for source in self.sources:
            files = resolve(source, on_wait=self.on_wait)
            count = min(len(files), max(1, MAX_OPEN_FILES // len(self.sources)))
            yield from (self._documents_in(source, files[group::count]) for group in range(count))

    def _documents_in(self, source: Source, files: Sequence[File]) -> Iterator[Document]:
        for file in files:
            entries = whole_lane(source, file, form=self.form).read(Cursor())
            yield from (entry for entry in entries if isinstance(entry, Document))

    def _rows_of(self, documents: Iterator[Document], domains: list[str]) -> Iterator[EvalRow]:
        length = self.sequence_length
        stream = np.array([(self.tokenizer.end_of_document, False, 0)], _TOKEN)
        for tokens in self._encoded(documents, domains):
            stream = np.concatenate([stream, tokens])
            while len(stream) > length:
                yield self._row(stream[: length + 1], len(domains))
                stream = stream[length:]
        if len(stream) > 1:
            yield self._row(stream, len(domains))

    def _encoded(self, documents: Iterator[Document], domains: list[str]) -> Iterator[NDArray[np.void]]:
        for document in documents:
            if document.domain not in domains:
                domains.append(document.domain)
            (ids,) = self.tokenizer.encode_documents([document.text], threads=1)
            tokens = np.zeros(len(ids) + 1, _TOKEN)
            tokens["id"] = np.append(ids, np.uint32(self.tokenizer.end_of_document))
            tokens["is_first"][0] = True
            tokens["domain"] = domains.index(document.domain)
            yield tokens

    def _row(self, stream: NDArray[np.void], known: int) -> EvalRow:
        targets = stream[1:]
        missing = self.sequence_length - len(targets)
        sizes = self.tokenizer.token_bytes[targets["id"]]
        documents = None
        if self.document_mask:  # that of an input's target, so EOS begins the next one; padding has none
            number = np.cumsum(stream["is_first"], dtype=np.int32)
            documents = np.pad(number[1:], (0, missing), constant_values=len(stream) + 1)
        return EvalRow(
            ids=np.pad(stream["id"], (0, missing), constant_values=self.tokenizer.padding),
            loss_mask=np.pad(np.ones(len(targets), bool), (0, missing)),
            domains=np.pad(targets["domain"], (0, missing)),
            utf8_bytes=np.bincount(targets["domain"], weights=sizes, minlength=known).astype(np.int64),
            documents=documents,
        )


def require_documents(source: Source, *, form: Form, on_wait: Callable[[], object]) -> None:
    """Read the first document of each validation file (at most the first MAX_OPEN_FILES files).

    Raises DataError if there is none: at the start of a run, not at its first evaluation.
    """
    for file in resolve(source, on_wait=on_wait)[:MAX_OPEN_FILES]:
        bad: list[BadLine] = []
        with closing(whole_lane(source, file, form=form).read(Cursor())) as entries:
            for entry in entries:
                if isinstance(entry, Document):
                    break
                bad.append(entry)
            else:
                raise DataError(f"{file.url}: holds no document. {examples(bad)}")


def micro_batches(rows: Iterator[EvalRow], *, size: int, rank: int, world_size: int) -> Iterator[Sequence[EvalRow]]:
    """This rank's micro-batches of up to `size` rows, dealt in turn: the same number on every rank, some empty."""
    while True:
        turn = [[row for _, row in zip(range(size), rows, strict=False)] for _ in range(world_size)]
        if not turn[0]:
            return
        yield turn[rank]
