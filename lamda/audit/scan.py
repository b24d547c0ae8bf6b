"""One pass over a corpus: what an audit counts, and the records from which duplicates are found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamda.audit import pii
from lamda.audit.evaluation_overlap import EvaluationNgrams
from lamda.audit.records import (
    BEGINNING,
    DOCUMENT,
    EMPTY,
    OVERLAP,
    PII,
    SIGNATURE,
    SIGNED,
    Writer,
    require_memory,
)  # fmt: skip
from lamda.audit.summary import Summary
from lamda.audit.words import NOT_WORD, Hashes, Offsets, ngrams, words
from lamda.config.errors import UserError
from lamda.data.card import OWN_FILES
from lamda.data.corpus import Corpus
from lamda.data.documents import Document
from lamda.data.files import File
from lamda.data.hashing import document_hash
from lamda.data.lanes import UNKNOWN_DOMAIN, Cursor, Lane
from lamda.data.quarantine import BadLine
from lamda.data.tokenizer import Tokenizer

BATCH = 1 << 20
"""Bytes of text that are worked on together."""

SHINGLE = 5
"""Words per n-gram of near duplicates; a shorter document is compared exactly, and no other way."""

SEED = 1
SHOWN = 200
"""Characters of an example."""

LANGUAGE_CHARACTERS = 200
"""Characters of a document from whose beginning its language is identified."""

_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\r"))
_DECODED_TWICE = re.compile(rb"\xc3[\x82\x83]\xc2[\x80-\xbf]|\xc3\xa2\xe2\x82\xac")
"""UTF-8 that was read as Latin-1 or Windows-1252 and written as UTF-8: `Ã©` for `é`, `â€` for a quotation mark."""


@dataclass(frozen=True)
class Parts:
    """What a pass does beside counting and exact hashes."""

    near: bool = True
    pii: bool = True
    lines: bool = True
    language: bool = True
    evaluation: EvaluationNgrams | None = None
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Item:
    """A document, its UTF-8, and the number of its file in the corpus."""

    document: Document
    data: bytes
    file: int
    source: str

    @property
    def place(self) -> tuple[int, int, int]:
        """File, byte and line."""
        return self.file, self.document.byte, self.document.line


class Scan:
    """A pass over the files of a corpus whose number modulo `shards` is `shard`, into a shard.

    memory: bytes that finding duplicates may take; None: that is for another process to check.
    """

    def __init__(
        self,
        corpus: Corpus,
        writer: Writer,
        parts: Parts,
        *,
        shard: int = 0,
        shards: int = 1,
        memory: int | None = None,
    ) -> None:
        self.summary, self.documents = Summary(), 0
        self._writer, self._parts, self._memory = writer, parts, memory
        numbers = {file.url: number for number, file in enumerate(corpus.files)}
        self._lanes = [
            replace(lane, slices=slices, max_bad_line_fraction=1.0)
            for lane in corpus.lanes
            if (slices := tuple(each for each in lane.slices if numbers[each.file.url] % shards == shard))
        ]
        self._numbers = numbers

    @property
    def total(self) -> int:
        """Bytes of the axis that are read."""
        return sum(lane.axis_length for lane in self._lanes)

    def run(self, progress: Callable[[int], object] = lambda amount: None) -> None:
        """Read all documents. Raises DataError, and UserError if there are too many for the memory or the disk.

        progress: called with bytes of the axis of the files (`lamda.data.lanes`).
        """
        batch: list[Item] = []
        size = 0
        for lane in self._lanes:
            done = 0
            for item in self._items(lane):
                progress(item.document.end - done)
                done = item.document.end
                batch.append(item)
                size += len(item.data)
                if size >= BATCH:
                    self._add(batch)
                    batch, size = [], 0
        if batch:
            self._add(batch)
        if self._parts.evaluation is not None:
            self.summary.overlapping = set(self._parts.evaluation.seen())

    def _items(self, lane: Lane) -> Iterator[Item]:
        files = [(self._numbers[each.file.url], _name(each.file)) for each in lane.slices]
        for entry in lane.read(Cursor()):
            if isinstance(entry, BadLine):
                self.summary.count("bad lines", entry.reason.partition(" (")[0], 1)
                continue
            number, name = files[entry.file]
            has_domain = entry.domain not in (UNKNOWN_DOMAIN, OWN_FILES)
            yield Item(entry, entry.text.encode(), number, entry.domain if has_domain else name)

    def _add(self, batch: Sequence[Item]) -> None:
        """Count a batch of documents, and write their records."""
        self.documents += len(batch)
        if self._memory is not None:
            require_memory(self.documents, self._memory)
        records = np.zeros(len(batch), DOCUMENT)
        records["file"] = [item.file for item in batch]
        records["line"] = [item.document.line for item in batch]
        records["byte"] = [item.document.byte for item in batch]
        records["hash"] = [int(document_hash(item.document.text), 16) for item in batch]
        records["size"] = [len(item.data) for item in batch]
        signatures = self._compare(batch, records)
        tokens = self._tokens(batch)
        for number, item in enumerate(batch):
            records["flags"][number] |= self._count(item, tokens[number])
        beginnings = np.array([item.data[: BEGINNING.itemsize] for item in batch], BEGINNING)
        self._writer.add(records, beginnings, signatures)

    def _compare(self, batch: Sequence[Item], records: NDArray[np.void]) -> NDArray[np.uint32]:
        """The signatures of a batch, and the flags that follow from words."""
        parts, signatures = self._parts, np.zeros((0, SIGNATURE), np.uint32)
        if not parts.near and parts.evaluation is None:
            return signatures
        found, offsets = words([item.data for item in batch])
        if parts.evaluation is not None:
            counts = parts.evaluation.counts(found, offsets)
            records["flags"][counts > 0] |= OVERLAP
            self.summary.count("overlap", "all", int((counts > 0).sum()), int(counts.sum()))
            for number in np.flatnonzero(counts).tolist():
                self._keep("evaluation overlap", batch[number], f"{counts[number]:,} n-grams")
        if parts.near:
            signatures, is_signed = signatures_of(found, offsets)
            records["flags"][is_signed] |= SIGNED
        return signatures

    def _tokens(self, batch: Sequence[Item]) -> list[int]:
        if self._parts.tokenizer is None:
            return [0] * len(batch)
        texts = [item.document.text for item in batch]
        return [len(ids) for ids in self._parts.tokenizer.encode_documents(texts, threads=1)]

    def _count(self, item: Item, tokens: int) -> int:
        """Count a document in all tables; returns its flags."""
        text, size, flags = item.document.text, len(item.data), 0
        amounts = (1, size, tokens)
        letters = len(item.data.translate(None, NOT_WORD))
        self.summary.count("total", "all", *amounts, len(text), int(letters == 0))
        self.summary.count("sources", item.source, *amounts)
        self.summary.count("lengths", str(size.bit_length()), *amounts)
        if self._parts.language:
            language = _identify(text[:LANGUAGE_CHARACTERS]) if letters else "none"
            self.summary.count("languages", language, *amounts)
        self._keep("longest", item, f"{size:,} bytes", rank=-size)
        self._keep("emptiest", item, f"{letters:,} letters and digits of {size:,} bytes", rank=letters)
        if letters == 0:
            flags |= EMPTY
        if self._parts.lines:
            self._count_lines(item)
        for trouble in _troubles(item.data, len(text)):
            self.summary.count("encoding", trouble, 1)
            self._keep(trouble, item, "")
        if self._parts.pii:
            for kind, strings in pii.found_in(text, item.data).items():
                flags |= PII
                self.summary.count("pii", kind, 1, len(strings))
                self._keep(kind, item, pii.masked(strings[0]), shows_text=False)
        return flags

    def _count_lines(self, item: Item) -> None:
        """Count lines that a document has already had, and the characters in them."""
        lines = [line for line in map(str.strip, item.document.text.split("\n")) if line]
        distinct = set(lines)
        repeated = len(lines) - len(distinct)
        every = sum(map(len, lines)) if repeated else 0
        characters = every - sum(map(len, distinct)) if repeated else 0
        share = 10 * characters // every if every else 0
        self.summary.count("repeated lines", str(share), 1, repeated, characters)
        if share >= 3:
            self._keep("repeated lines", item, f"{characters / every:.0%} of it", rank=-characters)

    def _keep(self, kind: str, item: Item, text: str, *, rank: int = 0, shows_text: bool = True) -> None:
        """Keep an example: what is said of it, and its beginning unless that may hold what must not be shown."""
        if self.summary.accepts(kind, (rank, *item.place)):
            beginning = item.document.text[:SHOWN]
            shown = pii.hidden(beginning, is_whole=beginning == item.document.text) if shows_text else ""
            self.summary.keep(kind, (rank, *item.place), f"{text}\n{shown}")


def _name(file: File) -> str:
    """The source of documents without a domain: their file, or the folder of a file that is a document."""
    is_document = file.format.records in ("document", "page")
    return f"{Path(file.url).parent.name}/" if is_document and not file.is_remote else file.name


def signatures_of(found: Hashes, offsets: Offsets) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """MinHash signatures of documents, [n, SIGNATURE], and whether they have words enough for one, [n].

    found, offsets: as `words` gives them.
    """
    from rensa import RMinHash

    found, offsets = ngrams(found, offsets, SHINGLE)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(found, offsets.astype(np.uint64), SIGNATURE, SEED).to_rows()
    return np.array(rows, np.uint32).reshape(-1, SIGNATURE), np.diff(offsets) > 0


def _troubles(data: bytes, characters: int) -> Iterator[str]:
    """What is wrong with the encoding of a text."""
    if len(data.translate(None, _CONTROLS)) < len(data):
        yield "control characters"
    if characters < len(data):
        if b"\xef\xbf\xbd" in data:
            yield "replacement characters (U+FFFD)"
        if _DECODED_TWICE.search(data):
            yield "decoded twice"


@cache
def _identifier() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE).classify


def _identify(text: str) -> str:
    return _identifier()(text)[0]


def require_packages() -> None:
    """Raise UserError if the packages of an audit are not installed."""
    if missing := [name for name in ("rensa", "py3langid") if find_spec(name) is None]:
        raise UserError(f"an audit needs {' and '.join(missing)}: pip install 'lamda-pytorch[audit]'")
