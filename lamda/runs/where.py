"""`lamda where`: which documents a training row came from, and its text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.data.blocks import LaneReader, Packing, RowBlock
from lamda.data.corpus import Corpus, differences, fingerprint, open_corpus, packing_of
from lamda.data.lanes import RAW_TEXT, Lane
from lamda.data.loader import batch_digest, row_digest
from lamda.data.order import next_samples
from lamda.data.tokenizer import Tokenizer
from lamda.data.windows import Announcement, SourceOrder, Window, places
from lamda.dialog.examples import form_of
from lamda.training.manifest import STATE, complete, problem_of, read_state
from lamda.training.metrics import read_metrics
from lamda.training.run_directory import RunDirectory
from lamda.training.window_log import read_windows


@dataclass(frozen=True)
class Part:
    """A part of a dialogue's example: a control symbol with the text after it, or text where targets begin or end."""

    symbol: str | None
    text: str
    is_target: bool


@dataclass(frozen=True)
class Piece:
    """A stretch of a row: tokens `first` to `last` of the document at a file's line (counted from 1).

    parts: of an example of a dialogue, in order; empty for text.
    """

    file: str
    line: int
    epoch: int
    domain: str
    first: int
    last: int
    text: str
    parts: tuple[Part, ...] = ()


def main(argv: list[str]) -> int:
    """`RUN --step S [--row R] [--json]`; raises UserError."""
    parser = argparse.ArgumentParser(prog="lamda where", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--step", type=int, required=True, help="a finished step, the first is 1")
    parser.add_argument("--row", type=int, help="one row of the step, the first is 0; default: all")
    parser.add_argument("--json", action="store_true", help="a JSON object a row")
    options = parser.parse_args(argv)
    for row, pieces in where(RunDirectory(options.run), step=options.step, row=options.row):
        if options.json:
            print(json.dumps({"step": options.step, "row": row, "pieces": [asdict(piece) for piece in pieces]}))
        else:
            print(f"step {options.step}, row {row}")
            for piece in pieces:
                place = f"{piece.file}, line {piece.line}, tokens {piece.first} to {piece.last}"
                print(f"--- {place} ({piece.domain}, epoch {piece.epoch})")
                print("\n".join(map(_line, piece.parts)) if piece.parts else piece.text)
    return 0


def where(directory: RunDirectory, *, step: int, row: int | None) -> Iterator[tuple[int, list[Piece]]]:
    """The rows of a step (or one of them), each with the pieces that it is made of.

    Raises UserError for a step that the run does not have, or text that is not the run's any more.
    """
    if not directory.config.is_file():
        raise UserError(
            f"{directory.path}: no run is here (no config.yaml); `lamda runs DIR` lists the runs below a folder"
        )
    config = load_config(["--config", str(directory.config)])
    sound = (path for path in complete(directory.checkpoints) if problem_of(path, only={STATE}) is None)
    states = [read_state(path) for path in sound]
    corpus = open_corpus(config.data, form=form_of(config))
    tokenizer = Tokenizer.load(directory.tokenizer)
    if states and (differing := differences(states[-1].fingerprint, fingerprint(corpus, config, tokenizer))):
        raise UserError(
            f"{directory.path}: the text or its settings are not those of the run any more: {', '.join(differing)}"
        )
    known = states[-1].skipped if states else ()
    samples, digest = _samples_of(directory, step, {*known, *directory.skipped()}, batch=config.train.global_batch_size)
    if row is not None and not 0 <= row < len(samples):
        raise UserError(f"--row {row}: step {step} has rows 0 to {len(samples) - 1}")
    sources, numbers = corpus.mixture.rows(samples)
    windows = _Windows(directory, corpus, tokenizer, packing_of(config))

    found, digests = [], []
    for place in range(len(samples)):
        lane, block, block_row = windows.row(int(sources[place]), int(numbers[place]), seed=config.run.seed)
        if row in (None, place):
            found.append((place, _pieces(block, block_row, lane, tokenizer)))
        digests.append(row_digest(block.ids[block_row]))
    if batch_digest(np.stack(digests)) != digest:
        raise UserError(
            f"{directory.path}: the rows that step {step} should have read are not those of its batch_digest in "
            f"{directory.metrics}: the text, skipped.json or the batch size of that step is another"
        )
    yield from found


class _Windows:
    """Finds rows by the windows that a run has kept, or makes those that it has not."""

    def __init__(self, directory: RunDirectory, corpus: Corpus, tokenizer: Tokenizer, packing: Packing) -> None:
        self._kept = read_windows(directory.order)
        self._corpus, self._tokenizer, self._packing = corpus, tokenizer, packing
        self._blocks: dict[tuple[int, int], RowBlock] = {}

    def row(self, source: int, number: int, *, seed: int) -> tuple[Lane, RowBlock, int]:
        """The lane of a source's row, its rows of the window, and which of them it is."""
        window = self._window_of(source, number)
        of_lane, of_row = places(window, seed=seed, source=source, in_order=self._corpus.is_in_order)
        place, row = int(of_lane[number - window.base]), int(of_row[number - window.base])
        lane = self._corpus.sources[source][place]
        if (key := (lane.index, window.number)) not in self._blocks:
            part = window.part(place, lane.length)
            self._blocks[key] = LaneReader(lane, self._tokenizer, self._packing).read(part).block
        return lane, self._blocks[key], row

    def _window_of(self, source: int, number: int) -> Window:
        before = [order for order in self._kept.get(source, ()) if order.windows[0].base <= number]
        order, shape = before[-1] if before else SourceOrder(), self._corpus.shapes[source]
        readers = [LaneReader(lane, self._tokenizer, self._packing) for lane in self._corpus.sources[source]]
        while number >= order.end:  # not kept: read as training has
            plan, said = order.plan(shape), []
            for place, (reader, length) in enumerate(zip(readers, shape.lengths, strict=True)):
                rows = reader.read(plan.part(place, length))
                said.append(Announcement(len(rows.block.ids), rows.tokens, rows.after))
            order = order.add(plan, said, shape).without(number)
            if order.windows[-1].ends_an_empty_epoch:
                raise UserError(f"source {self._corpus.sources[source][0].source.name!r} holds no document any more")
        return order.at(number)


def _samples_of(
    directory: RunDirectory, step: int, skipped: Iterable[tuple[int, int]], *, batch: int
) -> tuple[np.ndarray, str]:
    """The samples of a step, in global order, and their digest. batch: of a step whose row before is not there."""
    rows = {row["step"]: row for row in read_metrics(directory.metrics)}
    if step not in rows:
        raise UserError(
            f"--step {step}: {directory.metrics} has steps {min(rows, default=0)} to {max(rows, default=0)}"
        )
    after, windows = rows[step]["samples"], tuple(skipped)
    before = rows[step - 1]["samples"] if step - 1 in rows else 0 if step == 1 else after - batch
    consumed = next_samples(0, before, windows)[1] if before else 0
    return next_samples(consumed, after - before, windows)[0], rows[step]["batch_digest"]


def _pieces(block: RowBlock, row: int, lane: Lane, tokenizer: Tokenizer) -> list[Piece]:
    pieces = []
    for span in block.spans[(block.spans["row"] == row) & (block.spans["document"] >= 0)]:
        document = block.documents[span["document"]]
        place = slice(span["start"], span["start"] + span["length"])
        ids = block.ids[row, place]
        mask = None if block.loss_mask is None else block.loss_mask[row, place]
        share = lane.shares[document.file]
        pieces.append(
            Piece(
                file=share.file.url,
                line=share.line_in_file(document.line) + 1,
                epoch=document.epoch,
                domain=document.domain,
                first=int(span["token"]),
                last=int(span["token"] + span["length"] - 1),
                text=tokenizer.decode(ids),
                parts=() if lane.form is RAW_TEXT or mask is None else tuple(_parts(ids, mask, tokenizer)),
            )
        )
    return pieces


def _parts(ids: np.ndarray, is_target: np.ndarray, tokenizer: Tokenizer) -> Iterator[Part]:
    """Ids in parts that begin with each control symbol, and where targets begin or end."""
    names = {id: name for name, id in tokenizer.symbols.items()}
    starts = [n for n, id in enumerate(ids) if n == 0 or int(id) in names or is_target[n] != is_target[n - 1]]
    for start, stop in pairwise([*starts, len(ids)]):
        symbol = names.get(int(ids[start]))
        yield Part(symbol, tokenizer.decode(ids[start:stop]), bool(is_target[start]))


def _line(part: Part) -> str:
    """A part for a person: `*` before what is a target, the symbol, the text with its further lines indented."""
    text = part.text.replace("\n", "\n" + " " * 18)
    return f"{'*' if part.is_target else ' '} {part.symbol or '':15} {text}".rstrip()
