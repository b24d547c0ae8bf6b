"""`lamda prepare`: fill the row cache of a run in parallel processes; resumes where it was stopped.

Several machines that share the folder divide the lanes (`--shard`). Where a lane's next window ends depends on the rows
of all lanes, so each waits for the files of the others.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lamda.config.errors import DataError, RunError, UserError
from lamda.config.help import ConfigParser
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.console import Progress
from lamda.data.blocks import LaneProgress, Packing, Part, RowBlock
from lamda.data.corpus import Corpus, fingerprint, packing_of
from lamda.data.lanes import Lane
from lamda.data.row_cache import RowCache
from lamda.data.rows import PartReader
from lamda.data.split import open_text
from lamda.data.tokenizer import Tokenizer
from lamda.data.tokenizer_training import ensure_tokenizer
from lamda.data.windows import SourceOrder

log = logging.getLogger(__name__)

POLL_SECONDS, NOTABLE_SECONDS = 1.0, 60.0
"""Between two looks for the file of another shard, and until a wait for it is worth a line."""


class Shard(NamedTuple):
    """One of `shards` shares of the lanes; number: from 0."""

    number: int = 0
    shards: int = 1

    def has(self, lane: Lane) -> bool:
        """Whether the lane is in this share."""
        return lane.index % self.shards == self.number

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.shards}"


@dataclass
class BlockStats:
    """Statistics of rows by domain: documents that begin in them, tokens, UTF-8 bytes; and bad lines."""

    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    utf8_bytes: Counter[str] = field(default_factory=Counter)
    bad_lines: int = 0
    cuts: int = 0
    rows: int = 0

    def add(self, block: RowBlock, token_bytes: np.ndarray) -> None:
        """Count the targets of a block; a context token at the beginning of a row is not a target."""
        bytes_of = token_bytes[block.ids]
        for span in block.spans[block.spans["document"] >= 0]:
            domain = block.documents[span["document"]].domain
            is_context = block.loss_mask is None or block.loss_mask[span["row"], 0]
            start, stop = int(span["start"]), int(span["start"] + span["length"])
            first = max(start, 1) if is_context else start
            part, begins = slice(first, stop), int(span["token"]) + first - start == 0
            self.documents[domain] += begins
            self.cuts += not begins
            self.tokens[domain] += part.stop - part.start
            self.utf8_bytes[domain] += int(bytes_of[span["row"], part].sum())
        self.bad_lines += len(block.quarantined)
        self.rows += len(block.ids)

    def merge(self, other: BlockStats) -> None:
        """Add other statistics to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def table(self) -> Iterator[str]:
        """The statistics as lines of text."""
        every = self.tokens.total()
        yield f"{'':28}{'documents':>12}{'tokens':>16}{'bytes/token':>13}{'share':>9}"
        by_domain = [
            (domain, self.documents[domain], tokens, self.utf8_bytes[domain])
            for domain, tokens in self.tokens.most_common()
        ]
        for domain, documents, tokens, size in [
            ("all", self.documents.total(), every, self.utf8_bytes.total()),
            *by_domain,
        ]:
            yield f"{domain[:28]:28}{documents:12,}{tokens:16,}{size / max(1, tokens):13.3f}{tokens / every:9.2%}"
        yield f"{self.cuts:,} cuts: pieces that continue a document"
        if self.bad_lines:
            yield f"{self.bad_lines:,} lines hold no document"


def parser() -> ConfigParser:
    """The options of `lamda prepare`."""
    parser = ConfigParser("lamda prepare")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--shard", type=_shard, default=Shard(), metavar="I/N",
        help="only the I-th of N shares of the lanes, from 1; all N run at the same time and share data.cache_dir",
    )  # fmt: skip
    return parser


def _shard(text: str) -> Shard:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard {text}: is no share such as 1/4, from 1/4 to 4/4")
    return Shard(int(found[1]) - 1, int(found[2]))


def main(argv: list[str]) -> int:
    """`[--json] [--shard I/N] --config FILE [--section.key VALUE ...]` with `data.cache_dir`; raises UserError."""
    options, flags = parser().parse_known_args(argv)
    config = load_config(flags)
    if config.data.cache_dir is None:
        raise UserError("data.cache_dir: name the folder for the rows")
    if config.stages:
        raise UserError(
            "stages: rows are prepared for one stage at a time: --stages=null prepares the first, and a file with the "
            "keys of another stage that one"
        )
    corpus = open_text(config)
    target = Path(config.run.dir) / "tokenizer.model"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir {config.run.dir}: cannot be created ({error.strerror})") from error
    tokenizer = ensure_tokenizer(config, target=target, corpus=corpus)
    cache = RowCache.of(config.data.cache_dir, fingerprint(corpus, config, tokenizer))
    summary = prepare(corpus, cache, config=config, tokenizer=target, shard=options.shard)
    if options.json:
        print(json.dumps({"folder": str(cache.path), "shard": str(options.shard), **vars(summary)}, indent=1))
    else:
        print("\n".join(summary.table()))
        print(f"ready in {cache.path}" + f", shard {options.shard}" * (options.shard.shards > 1))
    return 0


def prepare(corpus: Corpus, cache: RowCache, *, config: Config, tokenizer: Path, shard: Shard) -> BlockStats:
    """Fill the row cache with all rows of the run's steps, with one process per core and disjoint lanes per process.

    The statistics are of this shard's lanes.
    """
    samples = config.steps * config.train.global_batch_size
    needed = corpus.mixture.rows_before(samples).tolist()
    total = BlockStats()
    with (
        _Workers(shard, corpus, cache, packing_of(config), tokenizer) as workers,
        Progress("making rows", total=sum(needed), unit="rows") as shown,
    ):
        for lanes, shape, rows in zip(corpus.sources, corpus.shapes, needed, strict=True):
            order = SourceOrder()
            while order.end < rows:
                plan = order.plan(shape)
                parts = [plan.part(place, axis_length=lane.axis_length) for place, lane in enumerate(lanes)]
                found = workers.fill(lanes, plan.number, parts)
                for _, stats in found:
                    total.merge(stats)
                order = order.add(plan, [progress for progress, _ in found], shape)
                if order.windows[-1].ends_an_empty_epoch:
                    raise DataError(f"source {lanes[0].source.name!r}: none of its lines holds a document")
                order = order.without(order.end)
                shown.advance(sum(progress.rows for progress, _ in found))
    return total


class _Workers:
    """One process per core. A lane is always read by the same process, which continues after its last part."""

    def __init__(self, shard: Shard, corpus: Corpus, cache: RowCache, packing: Packing, tokenizer: Path) -> None:
        self._shard, self._cache = shard, cache
        context, initial = get_context("spawn"), (corpus, cache, packing, tokenizer)
        self._pools = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=initial)
            for _ in os.sched_getaffinity(0)
        ]

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def fill(self, lanes: Sequence[Lane], number: int, parts: Sequence[Part]) -> list[tuple[LaneProgress, BlockStats]]:
        """Write this shard's parts of a window to the cache, and wait for those of the others.

        Raises RunError if a process was killed, and DataError.
        """
        jobs = {
            lane.index: self._pools[place % len(self._pools)].submit(_fill, lane.index, number, part)
            for place, (lane, part) in enumerate(
                (lane, part) for lane, part in zip(lanes, parts, strict=True) if self._shard.has(lane)
            )
        }
        made = {index: _result(job) for index, job in jobs.items()}  # before any wait: the others wait for these
        return [
            made.get(lane.index) or (self._made_elsewhere(lane, number, part), BlockStats())
            for lane, part in zip(lanes, parts, strict=True)
        ]

    def _made_elsewhere(self, lane: Lane, number: int, part: Part) -> LaneProgress:
        """The progress of another shard's lane, once its file is there."""
        notable = time.monotonic() + NOTABLE_SECONDS
        while (rows := self._cache.find(lane.index, number, part)) is None:
            if time.monotonic() > notable:
                maker = Shard(lane.index % self._shard.shards, self._shard.shards)
                log.warning("waiting for lane %d of window %d, which --shard %s makes", lane.index, number, maker)
                notable = float("inf")
            time.sleep(POLL_SECONDS)
        return rows.progress


def _result(job: Future[tuple[LaneProgress, BlockStats]]) -> tuple[LaneProgress, BlockStats]:
    """The result of `_fill`. Raises RunError if its process was killed, and as `_fill`."""
    try:
        return job.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process was killed (by the system, if memory is short); complete files are kept, and the same "
            "command continues"
        ) from error


_worker: list[tuple[PartReader, Tokenizer]] = []
"""The state of this worker process: a pool offers no other place for it."""


def _begin(corpus: Corpus, cache: RowCache, packing: Packing, model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    _worker.append((PartReader(corpus.lanes, tokenizer, packing, row_cache=cache), tokenizer))


def _fill(lane: int, number: int, part: Part) -> tuple[LaneProgress, BlockStats]:
    """Write a lane's part of a window to the cache, unless it is cached."""
    reader, tokenizer = _worker[0]
    rows, stats = reader.read(lane, number, part), BlockStats()
    stats.add(rows.block, tokenizer.token_bytes)
    return rows.progress, stats
