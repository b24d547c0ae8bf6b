"""`lamda prepare`: make a run's blocks ahead, side by side, and go on where it was stopped."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from lamda.config.errors import RunError, UserError
from lamda.config.loading import load_config
from lamda.config.progress import Progress
from lamda.config.schema import Config
from lamda.data.block_files import GROUP, BlockFolder
from lamda.data.blocks import Block, Packing
from lamda.data.corpus import Corpus, fingerprint, open_corpus, packing_of
from lamda.data.lanes import Lane
from lamda.data.run_tokenizer import ensure_tokenizer
from lamda.data.tokenizer import Tokenizer


@dataclass
class Summary:
    """What blocks hold, by domain: documents that begin in them, tokens, UTF-8 bytes; and lines that hold nothing."""

    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    utf8_bytes: Counter[str] = field(default_factory=Counter)
    bad_lines: int = 0
    cuts: int = 0
    blocks: int = 0

    def add(self, block: Block, token_bytes: np.ndarray) -> None:
        """Count a block."""
        bytes_of = token_bytes[block.ids]
        for run in block.runs:
            domain = block.documents[run["document"]].domain
            part = slice(run["start"], run["start"] + run["length"])
            self.documents[domain] += int(run["token"] == 0)
            self.tokens[domain] += int(run["length"])
            self.utf8_bytes[domain] += int(bytes_of[run["row"], part].sum())
        self.bad_lines += len(block.quarantined)
        self.cuts += int((block.runs["token"] > 0).sum())
        self.blocks += 1

    def merge(self, other: Summary) -> None:
        """Add another summary to this one."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.utf8_bytes += other.utf8_bytes
        self.bad_lines += other.bad_lines
        self.cuts += other.cuts
        self.blocks += other.blocks

    def table(self) -> Iterator[str]:
        """Lines for a person."""
        every = sum(self.tokens.values())
        yield f"{'':28}{'documents':>12}{'tokens':>16}{'bytes/token':>13}{'share':>9}"
        for domain, tokens in [("all", every), *self.tokens.most_common()]:
            documents = sum(self.documents.values()) if domain == "all" else self.documents[domain]
            size = sum(self.utf8_bytes.values()) if domain == "all" else self.utf8_bytes[domain]
            yield f"{domain[:28]:28}{documents:12,}{tokens:16,}{size / max(1, tokens):13.3f}{tokens / every:9.2%}"
        yield f"{self.cuts:,} cuts: pieces that go on with a document begun elsewhere"
        if self.bad_lines:
            yield f"{self.bad_lines:,} lines hold no document"


def main(argv: list[str]) -> int:
    """`[--json] --config FILE [--section.key VALUE ...]` with `data.blocks` set; raises UserError."""
    as_json = "--json" in argv
    config = load_config([word for word in argv if word != "--json"])
    if config.data.blocks is None:
        raise UserError("data.blocks: name the folder that the blocks go to")
    corpus = open_corpus(config.data)
    target = Path(config.run.dir) / "tokenizer.model"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir {config.run.dir}: cannot be made ({error.strerror})") from error
    tokenizer = ensure_tokenizer(config, target=target, corpus=corpus)
    folder = BlockFolder.of(config.data.blocks, fingerprint(corpus, config, tokenizer))
    summary = prepare(corpus, folder, config=config, tokenizer=target)
    if as_json:
        print(json.dumps({"folder": str(folder.path), **vars(summary)}, indent=1))
    else:
        print("\n".join(summary.table()))
        print(f"ready in {folder.path}")
    return 0


def prepare(corpus: Corpus, folder: BlockFolder, *, config: Config, tokenizer: Path) -> Summary:
    """Fill `folder` with every block that the run's steps take; a process a core, a lane at a time in each."""
    samples = config.steps * config.train.global_batch_size
    counts = -(-corpus.order.rows_before(samples) // config.data.block_rows)
    packing, summary = packing_of(config), Summary()
    workers = len(os.sched_getaffinity(0))
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        Progress("making blocks", total=int(counts.sum()), unit="blocks") as shown,
    ):

        def fill(lane: Lane, number: int) -> Future[tuple[Lane, int, Summary]]:
            return pool.submit(_fill, lane, number, int(counts[lane.index]), folder, packing, tokenizer)

        coming = {fill(lane, 0) for lane in corpus.lanes if counts[lane.index]}
        while coming:
            done, coming = wait(coming, return_when=FIRST_COMPLETED)
            for lane, number, part in map(_result, done):
                summary.merge(part)
                shown.advance(part.blocks)
                if number < counts[lane.index]:
                    coming.add(fill(lane, number))
    return summary


def _result(done: Future[tuple[Lane, int, Summary]]) -> tuple[Lane, int, Summary]:
    """What `_fill` gave. Raises RunError where its process is gone, and as `_fill`."""
    try:
        return done.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that made blocks was killed (by the system, where memory is short); what is complete stays, and "
            "the same command continues"
        ) from error


def _fill(
    lane: Lane, number: int, stop: int, folder: BlockFolder, packing: Packing, tokenizer_path: Path
) -> tuple[Lane, int, Summary]:
    """Bring blocks from `number` to the end of its file, or to `stop`; the block to go on with, and what they hold."""
    tokenizer, summary = Tokenizer.load(tokenizer_path), Summary()
    stop = min(stop, (number // GROUP + 1) * GROUP)
    blocks = folder.blocks(lane, folder.cursor_at(lane.index, number), packing=packing, tokenizer=tokenizer)
    for block, _ in islice(blocks, stop - number):
        summary.add(block, tokenizer.token_bytes)
    blocks.close()
    return lane, stop, summary
