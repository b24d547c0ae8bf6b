"""A run's corpus: its lanes, their order, and the fingerprint of all that the order depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lamda.config.errors import UserError
from lamda.config.schema import Config, DataConfig
from lamda.data.blocks import Packing
from lamda.data.card import Card, load_card
from lamda.data.files import resolve
from lamda.data.lanes import Cursor, Document, Lane, cut_into_lanes, read_lane
from lamda.data.order import Order, make_order
from lamda.data.tokenizer import Tokenizer

FORMAT = 1
"""Raised with every change that gives other samples from the same text."""


@dataclass(frozen=True)
class Corpus:
    """The training text of a run, resolved and cut into lanes."""

    card: Card
    lanes: tuple[Lane, ...]

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """A lane's share of all samples: its source's weight times its share of the source's bytes."""
        sizes = [sum(share.bytes for share in lane.shares) for lane in self.lanes]
        totals: dict[str, float] = {}
        for lane, size in zip(self.lanes, sizes, strict=True):
            totals[lane.source.name] = totals.get(lane.source.name, 0.0) + size
        return tuple(
            lane.source.weight * size / totals[lane.source.name] for lane, size in zip(self.lanes, sizes, strict=True)
        )

    @cached_property
    def order(self) -> Order:
        """The table of slots over all lanes."""
        return make_order(self.weights)

    def documents_once(self) -> Iterator[Document]:
        """The documents of every lane's first epoch, one from each lane in turn."""
        readers = [iter(read_lane(lane, Cursor())) for lane in self.lanes]
        while readers:
            still = []
            for reader in readers:
                document = next(reader)
                if document.epoch == 0:
                    yield document
                    still.append(reader)
            readers = still


def open_corpus(config: DataConfig) -> Corpus:
    """Resolve the card's files and cut them into lanes. Raises UserError where something is missing."""
    card = load_card(config)
    lanes: list[Lane] = []
    for source in card.sources:
        lanes += cut_into_lanes(source, resolve(source), lanes=config.lanes, first=len(lanes))
    return Corpus(card, tuple(lanes))


def packing_of(config: Config) -> Packing:
    """How this run cuts a lane's tokens into rows."""
    return Packing(rows=config.data.block_rows, row_length=config.data.sequence_length + 1, seed=config.run.seed)


def fingerprint(corpus: Corpus, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the order of samples depends on, by name; not batch sizes, not ranks."""
    return {
        "format": FORMAT,
        "files": [[list(share.file.identity) for share in lane.shares] for lane in corpus.lanes],
        "text": [[source.text, source.domain] for source in corpus.card.sources],
        "weights": [source.weight for source in corpus.card.sources],
        "tokenizer": tokenizer.sha256,
        "packing": "concat",
        "sequence_length": config.data.sequence_length,
        "block_rows": config.data.block_rows,
        "lanes": len(corpus.lanes),
        "seed": config.run.seed,
    }


def require_a_batch(corpus: Corpus, config: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError where all text together is shorter than one batch."""
    needed = config.train.global_batch_size * (config.data.sequence_length + 1)
    found = 0
    for document in corpus.documents_once():
        found += len(tokenizer.encode_documents([document.text], threads=1)[0]) + 1
        if found >= needed:
            return
    raise UserError(
        f"the corpus has {found:,} tokens, fewer than one batch of {needed:,} "
        f"(train.global_batch_size {config.train.global_batch_size} rows of data.sequence_length + 1 = "
        f"{config.data.sequence_length + 1}); give more text in data.files, or lower one of the two"
    )
