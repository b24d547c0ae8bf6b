"""Corpora that are hard to shuffle: sorted, clumped, of files and documents of very different lengths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import orjson
import zstandard

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.corpus import open_corpus

Labels = Literal["domain", "source", "sixteenth"]
"""By what a batch is compared with the corpus: `sixteenth` is of the corpus, in the order of its files."""


class Labelled(NamedTuple):
    """A document and its domain."""

    text: str
    domain: str = ""


@dataclass(frozen=True)
class Case:
    """A corpus. files: the documents of each, named `SOURCE/FILE`. rows: to read; None: an epoch's worth."""

    name: str
    files: Mapping[str, Sequence[Labelled]]
    labels: Labels = "sixteenth"
    weights: Mapping[str, float] = field(default_factory=dict)
    length: int = 256
    rows: int | None = None

    def texts(self, size: int) -> Iterator[str]:
        """Documents from all files, drawn evenly, of about `size` characters together."""
        every = max(1, sum(len(document.text) for each in self.files.values() for document in each) // size)
        for documents in self.files.values():
            for document in documents:
                yield document.text[: -(-len(document.text) // every)]

    def write(self, folder: Path) -> Path:
        """Write the files and a card of them; returns the card."""
        names = list(dict.fromkeys(file.partition("/")[0] for file in self.files))
        for file, documents in self.files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            data = b"".join(orjson.dumps(document._asdict()) + b"\n" for document in documents)
            path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)
        sources = [
            {"name": name, "license": "none", "files": f"{folder}/{name}/*", "weight": self.weights.get(name, 1.0)}
            | ({"domain": "domain"} if self.labels == "domain" else {})
            for name in names
        ]
        card = folder / "card.yaml"
        card.write_text(json.dumps({"name": "order", "description": self.name, "sources": sources}), "utf-8")
        return card


def pile_documents(files: str) -> list[Labelled]:
    """The documents of files of The Pile's format, sorted by domain, none twice. Raises UserError."""
    card = Config.model_validate({"data": {"corpus": "pile", "files": files}, "train": {"steps": 1}})
    documents = {document.text: document.domain for document in open_corpus(card.data).documents_once()}
    if not documents:
        raise UserError(f"--data {files}: there is no document")
    return sorted((Labelled(*each) for each in documents.items()), key=lambda each: each.domain)


def cases(sorted_documents: Sequence[Labelled] | None) -> Iterator[Case]:
    """All corpora, one at a time. sorted_documents: in place of made-up ones."""
    make = _Maker(np.random.default_rng(0))
    if sorted_documents is None:
        sorted_documents = [Labelled(make(9_000), f"domain {number // 300}") for number in range(1_200)]
    yield Case("one file, sorted by domain", {"all/0.jsonl": sorted_documents}, "domain")
    sources = {f"{name}/{file}.jsonl": make.documents(150_000, 2_000) for name in "abc" for file in range(8)}
    yield Case("three equal sources", sources, "source")
    book = [Labelled(make(400_000)), *(Labelled(make(2_000)) for _ in range(40))]
    yield Case("a book of 400 kB and 40 documents of 2 kB", {"all/0.jsonl": book})
    halves = {f"all/{name}": make.documents(4_000_000, 3_000) for name in ("0.jsonl", "1.jsonl.zst")}
    yield Case("a plain file and a .zst file of equal text", halves)
    lengths = np.exp(make.random.normal(0, 1.5, 310))
    lengths = np.maximum(20, lengths * 2_800_000 / lengths.sum()).astype(int)
    yield Case("310 documents of lognormal length", {"all/0.jsonl": [Labelled(make(size)) for size in lengths]})
    yield Case("135,000 tokens", {"all/0.jsonl": make.documents(634_000, 2_000)}, length=1024)
    light = {f"light/{file:02}.jsonl": make.documents(20_000, 2_000) for file in range(64)}
    heavy = {"heavy/0.jsonl": make.documents(4_000_000, 2_000)}
    weights = {"light": 0.001, "heavy": 1.0}
    yield Case("weight 0.001 with 64 files beside 1", light | heavy, "source", weights, length=64, rows=16_384)
    files = {f"all/{file:02}.jsonl": make.documents(300_000, 3_000) for file in range(63)}
    yield Case("63 files of 300 kB and one of 10 kB", files | {"all/63.jsonl": make.documents(10_000, 1_000)})


class _Maker:
    """Makes text of words, the n-th of them used 1/n as often as the first; no two texts are equal."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
        sizes = random.integers(2, 9, 20_000)
        self._words = ["".join(random.choice(letters, size)) for size in sizes]
        self._made = 0

    def __call__(self, size: int) -> str:
        """A text of `size` bytes."""
        self._made += 1
        ranks = (len(self._words) ** self.random.random(size // 3 + 1)).astype(int) - 1
        return f"{self._made} {' '.join(self._words[rank] for rank in ranks)}"[:size]

    def documents(self, total: int, size: int) -> list[Labelled]:
        """Documents of about `size` bytes each, `total` together."""
        return [Labelled(self(int(each))) for each in self.random.integers(size // 2, size * 3 // 2, total // size)]
