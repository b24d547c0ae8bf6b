"""Reading ahead: the rows of a rank's lanes, read in background threads and dropped after use."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamda.data.blocks import LaneProgress, LaneReader, Packing, Part, PartRows, RowBlock
from lamda.data.lanes import Lane
from lamda.data.quarantine import KEPT, Quarantined, first_of
from lamda.data.row_cache import RowCache
from lamda.data.tokenizer import Tokenizer


class LaneRows(NamedTuple):
    """The rows of a lane in a window. domains: [n + 1], of each of their documents; last, of document -1."""

    block: RowBlock
    domains: NDArray[np.int16]
    progress: LaneProgress


class PartReader:
    """Reads parts of lanes, by way of the row cache if there is one. Threads may share it."""

    def __init__(
        self, lanes: tuple[Lane, ...], tokenizer: Tokenizer, packing: Packing, *, row_cache: RowCache | None
    ) -> None:
        self._lanes, self._tokenizer, self._packing, self._row_cache = lanes, tokenizer, packing, row_cache
        self._readers: dict[int, tuple[Lock, LaneReader]] = {}

    def read(self, lane: int, window: int, part: Part) -> PartRows:
        """The rows of a lane in a window. Raises DataError if the text cannot be read."""
        if self._row_cache is None:
            return self._compute(lane, part)
        rows = self._row_cache.find(lane, window, part)
        if rows is None:
            rows = self._compute(lane, part)
            self._row_cache.store(lane, window, part, rows, narrow=self._tokenizer.vocab_size <= 1 << 16)
            rows = self._row_cache.find(lane, window, part) or rows  # memory-mapped: a window may be an epoch
        return rows

    def _compute(self, lane: int, part: Part) -> PartRows:
        new = (Lock(), LaneReader(self._lanes[lane], self._tokenizer, self._packing))
        lock, reader = self._readers.setdefault(lane, new)
        with lock:
            return reader.read(part)


class RowReader:
    """Reads parts of lanes in background threads. Close it to end them.

    domains: number of each domain name that is reported separately.
    """

    def __init__(
        self,
        lanes: tuple[Lane, ...],
        tokenizer: Tokenizer,
        packing: Packing,
        *,
        threads: int,
        domains: Mapping[str, int],
        row_cache: RowCache | None,
    ) -> None:
        self._parts, self._domains = PartReader(lanes, tokenizer, packing, row_cache=row_cache), domains
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lane")
        self._pending: dict[int, dict[int, Future[LaneRows]]] = {}  # by lane and window
        self._quarantined: list[Quarantined] = []

    def begin(self, lane: int, window: int, part: Part) -> None:
        """Start reading a lane's part of a window, unless it was started already."""
        windows = self._pending.setdefault(lane, {})
        if window not in windows:
            windows[window] = self._pool.submit(self._read, lane, window, part)

    def get(self, lane: int, window: int, part: Part) -> LaneRows:
        """Wait for a lane's part of a window. Raises DataError if the text cannot be read."""
        self.begin(lane, window, part)
        return self._pending[lane][window].result()

    def drop(self, lane: int, *, before: int) -> None:
        """Drop a lane's rows of the windows before one."""
        windows = self._pending.get(lane, {})
        for window in [window for window in windows if window < before]:
            windows.pop(window).cancel()

    def quarantined(self) -> list[Quarantined]:
        """The first bad lines, by lane and place, of all parts read."""
        return first_of(self._quarantined)

    def close(self) -> None:
        """End the threads and close files."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, lane: int, window: int, part: Part) -> LaneRows:
        rows = self._parts.read(lane, window, part)
        if len(self._quarantined) < KEPT:
            self._quarantined += [Quarantined(lane, bad) for bad in rows.block.quarantined]
        other = len(self._domains)
        domains = [self._domains.get(document.domain, other) for document in rows.block.documents]
        return LaneRows(rows.block, np.array([*domains, other], np.int16), rows.progress)
