"""The data loader of a rank: micro-batches of every step, from any position in the global order.

Step by step, the loader maps sample indices to sources and rows (`lamda.data.order`), and those to lanes
(`lamda.data.windows`). It sorts the rows of the global batch by lane and takes the rank's equal share, so the global
batch is the same on any number of ranks, and each rank reads mostly its own lanes. Rows are read ahead in threads
(`lamda.data.rows`). When a source needs its next window, the ranks exchange the row counts of their lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamda.config.errors import DataError
from lamda.data.blocks import LaneProgress, Packing, Part, RowBlock
from lamda.data.corpus import Corpus
from lamda.data.order import next_samples
from lamda.data.quarantine import Quarantined
from lamda.data.row_cache import RowCache
from lamda.data.rows import LaneRows, RowReader
from lamda.data.tokenizer import Tokenizer
from lamda.data.windows import SourceOrder, Window, places


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass on a rank.

    ids: [b, L+1] uint32. loss_mask: [b, L] bool, the targets that count. domains: [b, L] int16, of each target.
    documents: [b, L+1] int32, a document id per input token, if attention is limited to a document or an example.
    """

    ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]
    domains: NDArray[np.int16]
    documents: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class StepBatch:
    """The batch of a rank in one step.

    positions: index of each row of the rank in the global batch. digests: sha256 of each row; `batch_digest` combines
    those of all ranks. consumed: the next sample after this step. epochs: completed epochs of each source, by name.
    """

    micro_batches: tuple[MicroBatch, ...]
    positions: NDArray[np.int64]
    digests: NDArray[np.uint8]
    consumed: int
    epochs: Mapping[str, float] = field(default_factory=dict)


def batch_digest(digests: NDArray[np.uint8]) -> str:
    """16 hex digits that identify the data of a step. digests: [B, 32], sha256 of the rows in global order."""
    return sha256(digests.tobytes()).hexdigest()[:16]


def row_digest(ids: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """sha256 of the ids of a row as little-endian uint32, [32] uint8."""
    return np.frombuffer(sha256(np.ascontiguousarray(ids, "<u4").data).digest(), np.uint8)


def alone(value: Any) -> list[Any]:
    """The exchange between ranks for a single rank."""
    return [value]


class Loader:
    """The steps of one rank, from any sample on.

    order: the known windows of each source, as `order` returned them; without them the samples are the same, but all
    text before `consumed` is read again. skipped: ranges of samples to skip. exchange: all-gather of a value; every
    rank calls it before the same steps. domains: names by number; all other names share one more number. document_mask:
    limit attention to a document. EOS before a document is then its first input, as in inference, and other targets in
    another document than their input do not count. on_window: called with the number of a source and its windows when a
    new one is known. Close the loader, or use it as a context manager, to end its threads.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        packing: Packing,
        seed: int,
        batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        consumed: int = 0,
        skipped: Sequence[tuple[int, int]] = (),
        order: Sequence[SourceOrder] = (),
        exchange: Callable[[Any], list[Any]] = alone,
        threads: int = 1,
        domains: Sequence[str] = (),
        document_mask: bool = False,
        row_cache: RowCache | None = None,
        on_window: Callable[[int, SourceOrder], object] = lambda source, order: None,
    ) -> None:
        self._corpus, self._tokenizer, self._packing, self._seed = corpus, tokenizer, packing, seed
        self._batch, self._micro_batch = batch, micro_batch
        self._rows_per_rank = batch // world_size
        self._rank, self._world_size = rank, world_size
        self._consumed, self._skipped = consumed, tuple(skipped)
        self._exchange, self._on_window = exchange, on_window
        self._document_mask = document_mask
        numbers = {name: index for index, name in enumerate(domains)}
        self._rows = RowReader(corpus.lanes, tokenizer, packing, threads=threads, domains=numbers, row_cache=row_cache)
        before = corpus.mixture.rows_before(consumed).tolist()
        known = order or [SourceOrder() for _ in corpus.sources]
        self._order = [each.without(row) for each, row in zip(known, before, strict=True)]
        self._places: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}  # by source and window
        self._stage = -1
        self._enter_stage(corpus.mixture.stage(consumed))

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[StepBatch]:
        while True:
            yield self._next_step()

    def close(self) -> None:
        """End the background threads."""
        self._rows.close()

    def order(self) -> tuple[SourceOrder, ...]:
        """The windows that a loader needs to continue after the last step; the same on every rank."""
        return tuple(self._order)

    def quarantined(self) -> list[Quarantined]:
        """The first bad lines, by lane and place, of the text that this rank has read."""
        return self._rows.quarantined()

    def _lanes_of(self, *, margin: float) -> list[frozenset[int]]:
        """For each source, the lanes of this rank's share of a step's rows, sorted by lane.

        margin: widens the share, to include lanes at its edges. With margin 0, each lane belongs to exactly one rank.
        """
        found, begin = [], 0.0
        table = self._corpus.mixture.tables[self._stage]
        for lanes, fraction in zip(self._corpus.sources, table.count / len(table.slots), strict=True):
            lengths = np.array([lane.axis_length for lane in lanes], np.float64)
            ends = begin + fraction * np.cumsum(lengths) / max(1.0, lengths.sum())
            begins = np.concatenate([[begin], ends[:-1]])
            low, high = self._rank / self._world_size, (self._rank + 1) / self._world_size
            if margin:
                is_local = (ends > low - margin) & (begins < high + margin)
            else:
                rank = np.minimum(self._world_size - 1, ((begins + ends) / 2 * self._world_size).astype(int))
                is_local = rank == self._rank
            found.append(frozenset(np.flatnonzero(is_local).tolist()))
            begin += float(fraction)
        return found

    def _enter_stage(self, stage: int) -> None:
        """Switch to the lanes of a new stage of weights; all ranks do so at the same step."""
        if stage != self._stage:
            self._stage = stage
            self._local_lanes, self._edge_lanes = self._lanes_of(margin=0.0), self._lanes_of(margin=2 / self._batch)
            for source in range(len(self._corpus.sources)):
                self._begin_known(source)
                self._begin_next(source)

    def _begin_known(self, source: int) -> None:
        """Start reading this rank's rows of the known windows, oldest first."""
        for window in self._order[source].windows:
            for lane in sorted(self._local_lanes[source] | self._edge_lanes[source]):
                if window.counts[lane]:
                    self._rows.begin(*self._part(source, lane, window))

    def _begin_next(self, source: int) -> None:
        """Start reading this rank's lanes of the next window, unless two windows are in memory already."""
        if len(self._order[source].windows) < 2:
            plan = self._order[source].plan(self._corpus.shapes[source])
            for lane in sorted(self._local_lanes[source]):
                self._rows.begin(*self._part(source, lane, plan))

    def _part(self, source: int, lane: int, window: Window) -> tuple[int, int, Part]:
        """A lane's part of a window, as the row reader takes it: index of the lane, number of the window, and part."""
        source_lane = self._corpus.sources[source][lane]
        return source_lane.index, window.number, window.part(lane, axis_length=source_lane.axis_length)

    def _next_step(self) -> StepBatch:
        samples, consumed = next_samples(self._consumed, self._batch, self._skipped)
        self._enter_stage(self._corpus.mixture.stage(int(samples[0])))
        sources, numbers = self._corpus.mixture.rows(samples)
        needed = {source: numbers[sources == source] for source in np.unique(sources).tolist()}
        self._exchange_windows(needed)
        windows, lanes, rows = (np.empty(self._batch, np.int64) for _ in range(3))
        for source, source_rows in needed.items():
            is_here = sources == source
            windows[is_here], lanes[is_here], rows[is_here] = self._places_of(source, source_rows)
        first = self._rank * self._rows_per_rank
        positions = np.lexsort((lanes, sources))[first : first + self._rows_per_rank]
        local_rows = zip(*(each[positions].tolist() for each in (sources, windows, lanes, rows)), strict=True)
        found = [(self._rows_of(source, window, lane), row) for source, window, lane, row in local_rows]
        self._consumed = consumed
        starts = range(0, len(found), self._micro_batch)
        micro_batches = tuple(self._micro_batch_of(found[start : start + self._micro_batch]) for start in starts)
        return StepBatch(
            micro_batches=micro_batches,
            positions=positions,
            digests=np.stack([row_digest(ids) for each in micro_batches for ids in each.ids]),
            consumed=consumed,
            epochs=self._epochs(consumed),
        )

    def _exchange_windows(self, needed: Mapping[int, NDArray[np.int64]]) -> None:
        """Exchange windows until the needed rows of each source are in the first three quarters of the last known one.

        All ranks know the same windows and need the same rows, so they exchange before the same steps.
        """
        for source, rows in needed.items():
            self._release(source, int(rows.min()))
        while due := [source for source, rows in needed.items() if self._is_due(source, int(rows.max()))]:
            plans = {source: self._order[source].plan(self._corpus.shapes[source]) for source in due}
            local = {
                (source, lane): self._rows.get(*self._part(source, lane, plan)).progress
                for source, plan in plans.items()
                for lane in sorted(self._local_lanes[source])
            }
            progress = {key: value for part in self._exchange(local) for key, value in part.items()}
            for source, plan in plans.items():
                self._add(source, plan, progress)
                self._release(source, int(needed[source].min()))

    def _is_due(self, source: int, row: int) -> bool:
        windows = self._order[source].windows
        return not windows or row >= windows[-1].base + 3 * windows[-1].rows // 4

    def _add(self, source: int, plan: Window, progress: Mapping[tuple[int, int], LaneProgress]) -> None:
        shape = self._corpus.shapes[source]
        self._order[source] = self._order[source].add(
            plan, [progress[source, lane] for lane in range(len(shape.axis_lengths))], shape
        )
        window = self._order[source].windows[-1]
        if window.ends_an_empty_epoch:
            name = self._corpus.sources[source][0].source.name
            raise DataError(f"source {name!r}: none of its lines holds a document")
        self._on_window(source, self._order[source])
        self._begin_known(source)
        self._begin_next(source)

    def _release(self, source: int, row: int) -> None:
        """Drop windows that end before a row of the source, and start reading the next one if there is room."""
        before = self._order[source]
        self._order[source] = before.without(row)
        windows = self._order[source].windows
        if len(windows) == len(before.windows):
            return
        for lane in self._corpus.sources[source]:
            self._rows.drop(lane.index, before=windows[0].number)
        for number in {window.number for window in before.windows} - {window.number for window in windows}:
            self._places.pop((source, number), None)
        self._begin_next(source)

    def _places_of(
        self, source: int, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Window, lane and row within the lane for each row of a source."""
        found = np.empty((3, len(rows)), np.int64)
        for window in self._order[source].windows:
            key, is_inside = (source, window.number), (rows >= window.base) & (rows < window.base + window.rows)
            if key not in self._places:
                number = self._corpus.start.number(source)
                self._places[key] = places(window, seed=self._seed, source=number, in_order=self._corpus.is_in_order)
            found[0, is_inside] = window.number
            found[1, is_inside], found[2, is_inside] = (
                each[rows[is_inside] - window.base] for each in self._places[key]
            )
        return found[0], found[1], found[2]

    def _epochs(self, consumed: int) -> dict[str, float]:
        before = self._corpus.mixture.rows_before(consumed).tolist()
        return {
            lanes[0].source.name: order.epochs_at(row)
            for lanes, order, row in zip(self._corpus.sources, self._order, before, strict=True)
        }

    def _rows_of(self, source: int, number: int, lane: int) -> LaneRows:
        window = next(window for window in self._order[source].windows if window.number == number)
        return self._rows.get(*self._part(source, lane, window))

    def _micro_batch_of(self, found: Sequence[tuple[LaneRows, int]]) -> MicroBatch:
        shape = len(found), self._packing.sequence_length
        ids, loss_mask = np.empty((shape[0], shape[1] + 1), np.uint32), np.ones(shape, bool)
        domains = np.empty(shape, np.int16)
        documents = np.empty(ids.shape, np.int32) if self._document_mask else None
        for place, (rows, row) in enumerate(found):
            block = rows.block
            ids[place] = block.ids[row]
            if block.loss_mask is not None:
                loss_mask[place] = block.loss_mask[row, 1:]
            if documents is not None:
                end = self._tokenizer.end_of_document
                documents[place], is_inside = separated(block, row, packing=self._packing, end_of_document=end)
                loss_mask[place] &= is_inside
            spans = block.spans[block.spans_of(row)]
            domain_of = rows.domains[spans["document"]]  # document -1 takes the last entry
            domains[place] = np.repeat(domain_of, spans["length"])[1:]
        return MicroBatch(ids, loss_mask, domains, documents)


def separated(
    block: RowBlock, place: int, *, packing: Packing, end_of_document: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """For a row: document id of each token as an input [L+1], and whether a target is in the document of its input [L].

    EOS before the first token of a document is the first input of that document. Examples that are packed whole have
    their own start symbol, if any.
    """
    spans = block.spans_of(place)
    ids = np.repeat(np.arange(spans.start, spans.stop, dtype=np.int32), block.spans["length"][spans])
    is_inside = ids[1:] == ids[:-1]
    if packing.method == "whole":
        return ids, is_inside
    begins = (block.spans["token"][ids[1:]] == 0) & (block.spans["document"][ids[1:]] >= 0)
    opens = ~is_inside & begins & (block.ids[place, :-1] == end_of_document)
    documents = ids.copy()
    documents[:-1][opens] = ids[1:][opens]
    return documents, is_inside | opens
