"""A rank's micro-batches: the rows of each step, cut so that any number of ranks sees the same ones."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from lamda.data.block_files import BlockFolder
from lamda.data.blocks import Block, Packing, read_blocks
from lamda.data.corpus import Corpus
from lamda.data.lanes import Cursor
from lamda.data.order import next_samples
from lamda.data.quarantine import KEPT, BadLine, Quarantined, first_of
from lamda.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class MicroBatch:
    """Rows that a rank computes at a time.

    ids: [b, L+1] uint32. scored: [b, L] bool, the targets that count. domains: [b, L] int16, each
    target's domain. documents: [b, L+1] int32, an id a token as an input, where attention is to stay inside
    a document or an example.
    """

    ids: NDArray[np.uint32]
    scored: NDArray[np.bool_]
    domains: NDArray[np.int16]
    documents: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Step:
    """What a rank computes in a step.

    digests: the sha256 of each of the rank's rows, and positions: its place among the step's
    samples; `batch_digest` puts all ranks' together. consumed: the order's next sample after this
    step.
    """

    micro_batches: tuple[MicroBatch, ...]
    positions: NDArray[np.int64]
    digests: NDArray[np.uint8]
    consumed: int


def batch_digest(digests: NDArray[np.uint8]) -> str:
    """16 hex digits that name a step's data. digests: [B, 32], the rows' sha256 in global order."""
    return sha256(digests.tobytes()).hexdigest()[:16]


def row_digest(ids: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The sha256 of a row's ids as little-endian uint32, [32] uint8."""
    return np.frombuffer(sha256(ids.astype("<u4").tobytes()).digest(), np.uint8)


class _LaneReader:
    """A lane's rows by number, in rising order; the next block is made in the background."""

    def __init__(
        self,
        blocks: Generator[tuple[Block, Cursor]],
        cursor: Cursor,
        pool: ThreadPoolExecutor,
        domains: Mapping[str, int],
    ) -> None:
        self._domains = domains
        self.cursors = [cursor]
        self.quarantined: list[tuple[int, BadLine]] = []
        self._blocks, self._pool = blocks, pool
        self._block: Block | None = None
        self._coming: Future[tuple[Block, Cursor]] = pool.submit(next, blocks)

    def block(self, block: int) -> tuple[Block, NDArray[np.int16]]:
        """A block and the domain of each of its tokens, [R, L+1]."""
        while self._block is None or self._block.number < block:
            self._block, cursor = self._coming.result()
            self._domain_of = self._domains_of(self._block)
            self.cursors.append(cursor)
            if len(self.quarantined) < KEPT:
                self.quarantined += [(self._block.number, bad) for bad in self._block.quarantined]
            self._coming = self._pool.submit(next, self._blocks)
        return self._block, self._domain_of

    def _domains_of(self, block: Block) -> NDArray[np.int16]:
        other = len(self._domains)
        numbers = np.array([self._domains.get(document.domain, other) for document in block.documents], np.int16)
        return numbers[block.document_of]

    def close(self) -> None:
        """Let go of files; ready blocks that were made are kept."""
        self._blocks.close()

    def best_cursor(self, block: int) -> Cursor:
        """The last known cursor that is not past `block`; older ones are forgotten."""
        while len(self.cursors) > 1 and self.cursors[1].block <= block:
            self.cursors.pop(0)
        return self.cursors[0]


class Loader:
    """The steps of one rank, from any place in the global order.

    `cursors` are starting points of lanes (missing ones start at their beginning); with them or
    without, the samples are the same. domains: their names in the order of their numbers; every
    other name counts as one more. document_mask: attention stays inside a document, and its documents are handed
    on; the end symbol before a document is its first input, as where inference begins a text, and other targets in
    another document than the token before do not count. ready: where blocks are kept. Close it, or use it as a
    context, to end its threads.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        packing: Packing,
        batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        consumed: int = 0,
        skipped: Sequence[tuple[int, int]] = (),
        cursors: Mapping[int, Cursor] | None = None,
        threads: int = 1,
        domains: Sequence[str] = (),
        document_mask: bool = False,
        ready: BlockFolder | None = None,
    ) -> None:
        self._corpus, self._tokenizer, self._packing = corpus, tokenizer, packing
        self._batch, self._micro_batch = batch, micro_batch
        self._runs = batch // (micro_batch * world)
        self._rank = rank
        self._consumed, self._skipped = consumed, tuple(skipped)
        self._start = dict(cursors or {})
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lane")
        self._domains = {name: index for index, name in enumerate(domains)}
        self._document_mask, self._ready = document_mask, ready
        self._readers: dict[int, _LaneReader] = {}
        self._open_lanes()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield self._next_step()

    def close(self) -> None:
        """End the background threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers.values():
            reader.close()

    def cursors(self, consumed: int) -> dict[int, Cursor]:
        """For each lane this rank knows of, the nearest cursor at or before its first row that is not consumed."""
        blocks = self._corpus.order.rows_before(consumed) // self._packing.rows
        known = {lane: cursor for lane, cursor in self._start.items() if cursor.block <= blocks[lane]}
        known.update({lane: reader.best_cursor(int(blocks[lane])) for lane, reader in self._readers.items()})
        return known

    def quarantined(self) -> list[Quarantined]:
        """The first bad lines, by lane and block, of all blocks that this rank took rows from or passed by."""
        return first_of(
            Quarantined(lane, block, bad) for lane, reader in self._readers.items() for block, bad in reader.quarantined
        )

    def _own_samples(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], int]:
        """Positions in the step, lanes and rows of this rank's samples, sorted by lane; the next `consumed`."""
        samples, consumed = next_samples(self._consumed, self._batch, self._skipped)
        lanes, rows = self._corpus.order.rows(samples)
        share = self._runs * self._micro_batch
        own = np.argsort(lanes, kind="stable")[self._rank * share : (self._rank + 1) * share]
        return own, lanes[own], rows[own], consumed

    def _open_lanes(self) -> None:
        """Begin with the lanes of the first step, so that their first blocks are made side by side."""
        for lane in np.unique(self._own_samples()[1]):
            self._reader(int(lane))

    def _reader(self, lane: int) -> _LaneReader:
        if lane not in self._readers:
            cursor = self._start.get(lane, Cursor())
            make = read_blocks if self._ready is None else self._ready.blocks
            blocks = make(self._corpus.lanes[lane], cursor, packing=self._packing, tokenizer=self._tokenizer)
            self._readers[lane] = _LaneReader(blocks, cursor, self._pool, self._domains)
        return self._readers[lane]

    def _next_step(self) -> Step:
        positions, lanes, numbers, consumed = self._own_samples()
        blocks, places = np.divmod(numbers, self._packing.rows)
        rows = [
            self._row(*self._reader(int(lane)).block(int(block)), int(place))
            for lane, block, place in zip(lanes, blocks, places, strict=True)
        ]
        self._consumed = consumed
        starts = range(0, len(rows), self._micro_batch)
        return Step(
            micro_batches=tuple(_stacked(rows[start : start + self._micro_batch]) for start in starts),
            positions=positions,
            digests=np.stack([row_digest(row.ids) for row in rows]),
            consumed=consumed,
        )

    def _row(self, block: Block, domain_of: NDArray[np.int16], place: int) -> MicroBatch:
        """One row, without the dimension of the batch."""
        ids, documents = block.ids[place], None
        scored = np.ones(len(ids) - 1, bool) if block.loss_mask is None else block.loss_mask[place, 1:]
        if self._document_mask:
            documents, is_inside = separated(
                block, place, packing=self._packing, end_of_document=self._tokenizer.end_of_document
            )
            scored = scored & is_inside
        return MicroBatch(ids, scored, domain_of[place, 1:], documents)


def separated(
    block: Block, place: int, *, packing: Packing, end_of_document: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Of a row: [L+1] the document of each token as an input, [L] whether a target is of its input's document.

    The end symbol before a document's first token is that document's first input. Examples that are packed whole
    bring one of their own, where they want one.
    """
    runs = block.run_of[place]
    is_inside = runs[1:] == runs[:-1]
    if packing.method == "whole":
        return runs, is_inside
    begins = block.runs["token"][runs[1:]] == 0
    opens = ~is_inside & begins & (block.ids[place, :-1] == end_of_document)
    documents = runs.copy()
    documents[:-1][opens] = runs[1:][opens]
    return documents, is_inside | opens


def _stacked(rows: Sequence[MicroBatch]) -> MicroBatch:
    separated = [row.documents for row in rows if row.documents is not None]
    documents = np.stack(separated) if separated else None
    ids, scored, domains = (np.stack([getattr(row, name) for row in rows]) for name in ("ids", "scored", "domains"))
    return MicroBatch(ids, scored, domains, documents)


def merge_cursors(parts: Iterable[Mapping[int, Cursor]]) -> dict[int, Cursor]:
    """Of what all ranks know, the furthest cursor of each lane."""
    merged: dict[int, Cursor] = {}
    for part in parts:
        for lane, cursor in part.items():
            if lane not in merged or cursor.block > merged[lane].block:
                merged[lane] = cursor
    return dict(sorted(merged.items()))
