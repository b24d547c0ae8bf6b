"""`lamda trace`: the documents that a training row came from, and its text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamda.best_effort import BestEffort
from lamda.config.errors import DataError, UserError
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.config.stages import Stage, plan_stages, stage_at
from lamda.data.blocks import LaneReader, Packing, PartRows, RowBlock
from lamda.data.corpus import Corpus, differences, fingerprint, packing_of
from lamda.data.files import read_lines
from lamda.data.lanes import RAW_TEXT, FileSlice, Lane
from lamda.data.loader import batch_digest, row_digest
from lamda.data.order import consumed_after, next_samples
from lamda.data.row_cache import RowCache
from lamda.data.split import open_text
from lamda.data.tokenizer import Tokenizer
from lamda.data.windows import SourceOrder, Window, places
from lamda.dialog.examples import form_of
from lamda.storage.manifest import STATE, complete, problem_of, read_state
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.stage_log import stage_start
from lamda.storage.state import RunState
from lamda.storage.window_log import KeptWindows


@dataclass(frozen=True)
class ExamplePart:
    """A part of a dialogue example: a control symbol with the text after it, or text where targets begin or end."""

    symbol: str | None
    text: str
    is_target: bool


@dataclass(frozen=True)
class Piece:
    """A span of a row: tokens `first` to `last` of the document at a line (from 1) of a file.

    parts: of a dialogue example, in order; empty for text.
    """

    file: str
    line: int
    epoch: int
    domain: str
    first: int
    last: int
    text: str
    parts: tuple[ExamplePart, ...] = ()


def parser() -> argparse.ArgumentParser:
    """The options of `lamda trace`."""
    parser = argparse.ArgumentParser(prog="lamda trace", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="a finished step; the first is 1")
    parser.add_argument("--row", type=int, metavar="R", help="one row of the step; the first is 0; default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    return parser


def main(argv: list[str]) -> int:
    """`RUN --step S [--row R] [--json]`; raises UserError."""
    options = parser().parse_args(argv)
    directory = RunDirectory(options.run)
    rows = list(trace(directory, step=options.step, row=options.row))
    drop = stage_at(_stages(directory), options.step - 1).config.data.drop
    for row, pieces in rows:
        if options.json:
            values = {"step": options.step, "row": row, "pieces": [asdict(piece) for piece in pieces]}
            print(json.dumps(values | ({} if drop is None else {"drop": drop})))
        else:
            print(f"step {options.step}, row {row}" + ("" if drop is None else f", without the texts of {drop}"))
            for piece in pieces:
                place = f"{piece.file}, line {piece.line}, tokens {piece.first} to {piece.last}"
                print(f"--- {place} ({piece.domain}, epoch {piece.epoch})")
                print("\n".join(map(_line, piece.parts)) if piece.parts else piece.text)
    return 0


def trace(directory: RunDirectory, *, step: int, row: int | None) -> Iterator[tuple[int, list[Piece]]]:
    """The rows of a step, or one of them, each with its pieces.

    Raises UserError for a step that the run does not have, or if the text has changed since the run.
    """
    stages = _stages(directory)
    stage = stage_at(stages, step - 1)
    config = stage.config
    intact = (path for path in complete(directory.checkpoints) if problem_of(path, only={STATE}) is None)
    states = [read_state(path) for path in intact]
    newest = states[-1] if states else RunState()
    start = newest.start if newest.stage == stage.number else stage_start(directory.stages, stage.number)
    is_current = newest.stage == stage.number
    corpus = open_text(
        config, form=form_of(config), saved=newest.fingerprint, first=stages[0].config, is_current=is_current
    )
    corpus = replace(corpus, start=start)
    tokenizer = Tokenizer.load(directory.tokenizer)
    current = fingerprint(corpus, config, tokenizer)
    if newest.fingerprint and newest.stage == stage.number and (differing := differences(newest.fingerprint, current)):
        raise UserError(
            f"{directory.path}: the text or its settings have changed since the run: {', '.join(differing)}"
        )
    known = newest.skipped
    samples, digest = _samples_of(directory, step, {*known, *directory.skipped()}, batch=config.train.global_batch_size)
    if samples[0] < start.sample:
        raise UserError(f"--step {step}: is from before the text of {directory.path} began; look in its parent")
    if row is not None and not 0 <= row < len(samples):
        raise UserError(f"--row {row}: step {step} has rows 0 to {len(samples) - 1}")
    inputs = _Inputs(corpus, tokenizer, packing_of(config), config.run.seed, _row_cache(config, current))
    found, digests = _read_rows(samples, row, inputs, KeptWindows(directory.order))
    if batch_digest(digests) != digest:
        raise UserError(
            f"{directory.path}: the rows of step {step} do not match its batch_digest in {directory.metrics}: the "
            "text, skipped.json or the batch size has changed"
        )
    yield from sorted(found.items())


def _stages(directory: RunDirectory) -> tuple[Stage, ...]:
    if not directory.config.is_file():
        raise UserError(f"{directory.path}: no run here (no config.yaml); `lamda list DIR` lists the runs in a folder")
    moved = f"--run.dir={directory.path}"  # perhaps
    return plan_stages(load_config(["--config", str(directory.config), moved]))


def _read_rows(
    samples: NDArray[np.int64], row: int | None, inputs: _Inputs, kept: KeptWindows
) -> tuple[dict[int, list[Piece]], NDArray[np.uint8]]:
    """The pieces of all rows of a step, or of one, and the digests of all rows, [B, 32]."""
    pieces: dict[int, list[Piece]] = {}
    digests = np.empty((len(samples), 32), np.uint8)
    sources, numbers = inputs.corpus.mixture.rows(samples)
    lines = _LineNumbers()
    for source in np.unique(sources).tolist():
        indices = np.flatnonzero(sources == source)
        for at, lane, block, block_row in _SourceRows(source, inputs, kept).rows(numbers[indices]):
            index = int(indices[at])
            digests[index] = row_digest(block.ids[block_row])
            if row in (None, index):
                pieces[index] = _pieces(block, block_row, lane, inputs.tokenizer, lines)
    return pieces, digests


def _row_cache(config: Config, fingerprint: dict[str, Any]) -> RowCache | None:
    """The run's cached rows, if they exist. `RowCache.of` would create the folder; this reads only."""
    folder, wanted = config.data.cache_dir, json.loads(json.dumps({**fingerprint, "weights": None}))
    guard = BestEffort(
        f"data.cache_dir {folder} cannot be read", then="the text is read", errors=(OSError, ValueError, DataError)
    )
    with guard:
        for path in () if folder is None else Path(folder).glob("*/fingerprint.json"):
            if {**json.loads(path.read_text("utf-8")), "weights": None} == wanted:
                return RowCache(path.parent, guard)
    return None


class _Inputs(NamedTuple):
    """The inputs of rows. row_cache: of the run, if it exists."""

    corpus: Corpus
    tokenizer: Tokenizer
    packing: Packing
    seed: int
    row_cache: RowCache | None


class _SourceRows:
    """Finds rows of a source by the windows that the run recorded, and computes the other windows."""

    def __init__(self, source: int, inputs: _Inputs, kept: KeptWindows) -> None:
        self._number, self._inputs, self._kept = inputs.corpus.start.number(source), inputs, kept
        self._lanes, self._shape = inputs.corpus.sources[source], inputs.corpus.shapes[source]
        self._readers: dict[int, LaneReader] = {}

    def rows(self, numbers: NDArray[np.int64]) -> Iterator[tuple[int, Lane, RowBlock, int]]:
        """For each row its index in `numbers`, its lane, the block of that lane and window, and its row in the block.

        In order of lane and window, so that one block is in memory at a time.
        """
        corpus, table = self._inputs.corpus, list[tuple[int, int, int, int]]()
        windows = self._windows(numbers)
        for age, window in enumerate(windows):
            indices = np.flatnonzero((numbers >= window.base) & (numbers < window.base + window.rows))
            found = places(window, seed=self._inputs.seed, source=self._number, in_order=corpus.is_in_order)
            lanes, rows = (each[numbers[indices] - window.base].tolist() for each in found)
            table += zip(lanes, repeat(age), indices.tolist(), rows, strict=False)
        for (lane, age), of_block in groupby(sorted(table), key=itemgetter(0, 1)):
            block = self._read(lane, windows[age]).block
            for _, _, index, row in of_block:
                yield index, self._lanes[lane], block, row

    def _windows(self, numbers: NDArray[np.int64]) -> list[Window]:
        """The windows that contain the rows, oldest first."""
        order, found = SourceOrder(), list[Window]()
        for number in np.sort(numbers).tolist():
            if found and number < found[-1].base + found[-1].rows:
                continue
            if number >= order.end:
                kept = self._kept.up_to(self._number, number, lanes=len(self._lanes))
                order = kept if kept.end > order.end else order
            while number >= order.end:
                order = self._with_next(order).without(number)
            found.append(order.at(number))
        return found

    def _with_next(self, order: SourceOrder) -> SourceOrder:
        """The order with its next window, which was not recorded: it is read as in training."""
        plan = order.plan(self._shape)
        progress = [self._read(lane, plan).progress for lane in range(len(self._lanes))]
        order = order.add(plan, progress, self._shape)
        if order.windows[-1].ends_an_empty_epoch:
            raise UserError(f"source {self._lanes[0].source.name!r} has no documents any more")
        return order

    def _read(self, lane: int, window: Window) -> PartRows:
        inputs, source_lane = self._inputs, self._lanes[lane]
        part, cache = window.part(lane, axis_length=source_lane.axis_length), inputs.row_cache
        if cache is not None and (rows := cache.find(source_lane.index, window.number, part)) is not None:
            return rows
        if lane not in self._readers:
            self._readers[lane] = LaneReader(source_lane, inputs.tokenizer, inputs.packing)
        return self._readers[lane].read(part)


class _LineNumbers:
    """Line numbers within files. A slice counts from its first line; the lines before it are counted once per file."""

    def __init__(self) -> None:
        self._first: dict[str, dict[int, tuple[int, int]]] = {}  # by file and start of a slice: line number and byte

    def in_file(self, file_slice: FileSlice, line: int) -> int:
        """The number in the file of a line of a slice, both from 0."""
        if file_slice.start == 0 or file_slice.file.is_indexed:
            return line
        first = self._first.setdefault(file_slice.file.url, {0: (0, 0)})
        if file_slice.start not in first:
            number, byte = first[max(start for start in first if start < file_slice.start)]
            lines = read_lines(file_slice.file, number=number, byte=byte)
            first[file_slice.start] = next((each.number, each.byte) for each in lines if each.byte >= file_slice.start)
        return first[file_slice.start][0] + line


def _samples_of(
    directory: RunDirectory, step: int, skipped: Iterable[tuple[int, int]], *, batch: int
) -> tuple[np.ndarray, str]:
    """The samples of a step in global order, and their digest. batch: the batch size if the previous row is missing."""
    rows = {row["step"]: row for row in read_metrics(directory.metrics)}
    if step not in rows:
        raise UserError(
            f"--step {step}: {directory.metrics} has steps {min(rows, default=0)} to {max(rows, default=0)}"
        )
    after, windows = rows[step]["samples"], tuple(skipped)
    before = rows[step - 1]["samples"] if step - 1 in rows else 0 if step == 1 else after - batch
    return next_samples(consumed_after(before, windows), after - before, windows)[0], rows[step]["batch_digest"]


def _pieces(block: RowBlock, row: int, lane: Lane, tokenizer: Tokenizer, lines: _LineNumbers) -> list[Piece]:
    pieces, spans = [], block.spans[block.spans_of(row)]
    for span in spans[spans["document"] >= 0]:
        document = block.documents[span["document"]]
        tokens = slice(span["start"], span["start"] + span["length"])
        ids = block.ids[row, tokens]
        mask = None if block.loss_mask is None else block.loss_mask[row, tokens]
        file_slice = lane.slices[document.file]
        pieces.append(
            Piece(
                file=file_slice.file.url,
                line=lines.in_file(file_slice, document.line) + 1,
                epoch=document.epoch,
                domain=document.domain,
                first=int(span["token"]),
                last=int(span["token"] + span["length"] - 1),
                text=tokenizer.decode(ids),
                parts=() if lane.form is RAW_TEXT or mask is None else tuple(_parts(ids, mask, tokenizer)),
            )
        )
    return pieces


def _parts(ids: np.ndarray, is_target: np.ndarray, tokenizer: Tokenizer) -> Iterator[ExamplePart]:
    """Ids split at control symbols and where targets begin or end."""
    names = {id: name for name, id in tokenizer.symbols.items()}
    starts = [n for n, id in enumerate(ids) if n == 0 or int(id) in names or is_target[n] != is_target[n - 1]]
    for start, stop in pairwise([*starts, len(ids)]):
        symbol = names.get(int(ids[start]))
        yield ExamplePart(symbol, tokenizer.decode(ids[start:stop]), bool(is_target[start]))


def _line(part: ExamplePart) -> str:
    """A part as text: `*` if it is a target, the symbol, and the text with continuation lines indented."""
    text = part.text.replace("\n", "\n" + " " * 18)
    return f"{'*' if part.is_target else ' '} {part.symbol or '':15} {text}".rstrip()
