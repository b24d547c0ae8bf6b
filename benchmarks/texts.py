"""Texts for benchmarks, from the standard library or from files, written as shards in the format of The Pile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import zstandard
from numpy.typing import NDArray

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.corpus import open_corpus
from lamda.data.standard_library import write_corpus
from lamda.data.tokenizer import Tokenizer

SHARDS = 8
SHORT = 1_500
BOOK = 1_000_000


@dataclass(frozen=True)
class Text:
    """A text in shards, and its content.

    shards: .jsonl.zst files. documents and ids: by shard, in its order; ids without end symbols.
    """

    shards: tuple[Path, ...]
    documents: tuple[tuple[str, ...], ...]
    ids: tuple[tuple[NDArray[np.uint32], ...], ...]

    @property
    def tokens(self) -> int:
        """All ids, and one end symbol per document."""
        return sum(len(ids) + 1 for shard in self.ids for ids in shard)

    @property
    def bytes(self) -> int:
        """Bytes of UTF-8."""
        return sum(len(document.encode()) for shard in self.documents for document in shard)


def library_documents(folder: Path) -> Iterator[str]:
    """The source files of Python's standard library, shuffled."""
    write_corpus(folder, shards=1)
    return read_documents(f"{folder}/train/*")


def read_documents(files: str) -> Iterator[str]:
    """The documents of files, one file after the other."""
    config = Config.model_validate({"data": {"files": files, "shuffle": "none"}, "train": {"steps": 1}})
    return (document.text for document in open_corpus(config.data).documents_once())


def short_documents(texts: Iterable[str]) -> Iterator[str]:
    """The texts cut into documents of SHORT characters, and what a line has beyond; the last of a text is shorter."""
    for text in texts:
        yield from _joined(text.splitlines(keepends=True), SHORT)


def books(texts: Iterable[str]) -> Iterator[str]:
    """Texts bound together into documents of BOOK characters, and what a text has beyond."""
    return _joined(texts, BOOK)


def _joined(parts: Iterable[str], characters: int) -> Iterator[str]:
    held: list[str] = []
    length = 0
    for part in parts:
        held.append(part)
        length += len(part)
        if length >= characters:
            yield "".join(held)
            held, length = [], 0
    if held:
        yield "".join(held)


def write_text(folder: Path, documents: Iterable[str], tokenizer: Tokenizer, *, tokens: int) -> Text:
    """The first documents that have `tokens` tokens together, or all, dealt out to shards in `folder`.

    Raises UserError where there is none.
    """
    taken: list[tuple[str, NDArray[np.uint32]]] = []
    for document in documents:
        ids = tokenizer.encode_documents([document], threads=1)[0]
        taken.append((document, ids))
        tokens -= len(ids) + 1
        if tokens <= 0:
            break
    if not taken:
        raise UserError("there is no document to measure: give --files that hold some")
    dealt = [taken[shard::SHARDS] for shard in range(min(SHARDS, len(taken)))]
    folder.mkdir(parents=True)
    shards = tuple(
        write_shard(folder / f"{shard}.jsonl.zst", [document for document, _ in part])
        for shard, part in enumerate(dealt)
    )
    return Text(
        shards,
        tuple(tuple(document for document, _ in part) for part in dealt),
        tuple(tuple(ids for _, ids in part) for part in dealt),
    )


def write_shard(path: Path, documents: Iterable[str]) -> Path:
    """One zstd frame of JSON lines."""
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as frame:
        for document in documents:
            frame.write(orjson.dumps({"text": document, "meta": {"pile_set_name": "benchmark"}}) + b"\n")
    return path
