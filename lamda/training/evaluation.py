"""Held-out loss, perplexity and bits per byte, overall and by domain; the command `lamda eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import log, nan
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from lamda.config.errors import UserError
from lamda.console import Progress, visible
from lamda.data.held_out import EvalRow, HeldOut, micro_batches
from lamda.data.lanes import RAW_TEXT
from lamda.data.tokenizer import Tokenizer
from lamda.engines.protocol import Scorer
from lamda.inference.loading import load_model
from lamda.model import LaMDA
from lamda.model.loss import token_nll
from lamda.storage.run_log import each_bad_line_once
from lamda.training.inputs import saved_validation

Nats = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(inputs_BL, targets_BL, documents_BL) -> nll_BL on the model's device."""


Sum = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # adds an array up over all ranks


class ScoreOptions(TypedDict, total=False):
    """Keywords of evaluations; see `evaluate`."""

    device: Required[torch.device]
    micro_batch: Required[int]
    rank: int
    world_size: int
    rows: int | None
    total: Sum
    on_progress: Callable[[int], object]


@dataclass(frozen=True)
class HeldOutText:
    """Validation text as a run's evaluation."""

    text: HeldOut

    def rows(self, limit: int | None) -> Iterator[object]:
        """See `lamda.training.task.Evaluation`."""
        return islice(self.text.rows([]), limit)

    def score(self, model: Scorer, **options: Unpack[ScoreOptions]) -> Scores:
        """See `evaluate`."""
        return evaluate(self.text, model.nll, **options)


@dataclass(frozen=True)
class TorchScorer:
    """A model in memory as a `lamda.engines.protocol.Scorer`."""

    model: LaMDA

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, V]."""
        return self.model(inputs_BL)

    def nll(
        self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, documents_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, L], the cross-entropy of each target."""
        return token_nll(self.model(inputs_BL, documents_BL), targets_BL)


@dataclass(frozen=True)
class Scores:
    """Sums by domain over the rows that were read: nats, number of target tokens, UTF-8 bytes."""

    domains: tuple[str, ...]
    nats: NDArray[np.float64]
    targets: NDArray[np.int64]
    utf8_bytes: NDArray[np.int64]

    def metrics(self) -> dict[str, float]:
        """`eval/loss`, `eval/bits_per_byte`, `eval/loss/<domain>`, as in metrics.jsonl; NaN where nothing is scored."""
        rows = {"eval/loss": self.loss(), "eval/bits_per_byte": self.bits_per_byte()}
        if len(self.domains) > 1:
            rows.update(
                {f"eval/loss/{name}": self._only(i).loss() for i, name in enumerate(self.domains) if self.targets[i]}
            )
        return rows

    def report(self) -> dict[str, Any]:
        """All figures, overall and by domain."""
        domains = {name: self._only(i).report_one() for i, name in enumerate(self.domains) if self.targets[i]}
        return {**self.report_one(), "domains": domains}

    def report_one(self) -> dict[str, float]:
        """Loss, perplexity, bits per byte, tokens and bytes of all domains together."""
        return {
            "loss": self.loss(),
            "perplexity": float(np.exp(self.loss())),
            "bits_per_byte": self.bits_per_byte(),
            "tokens": int(self.targets.sum()),
            "bytes": int(self.utf8_bytes.sum()),
        }

    def loss(self) -> float:
        """Nats per target token."""
        return _ratio(self.nats.sum(), self.targets.sum())

    def bits_per_byte(self) -> float:
        """Total nats, including end symbols, in bits per UTF-8 byte of the text."""
        return _ratio(self.nats.sum() / log(2), self.utf8_bytes.sum())

    def _only(self, index: int) -> Scores:
        part = slice(index, index + 1)
        return Scores(self.domains[part], self.nats[part], self.targets[part], self.utf8_bytes[part])


def _ratio(sum_: float, count: int) -> float:
    return float(sum_ / count) if count else nan


def evaluate(
    held_out: HeldOut,
    nats: Nats,
    *,
    device: torch.device,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    rows: int | None = None,
    total: Sum = lambda sums: sums,
    on_progress: Callable[[int], object] = lambda rows: None,
) -> Scores:
    """Score the first `rows` rows (default: all), shared among the ranks in turn.

    on_progress: called with the number of rows that this rank has just finished. Ranks without rows run an empty
    micro-batch, because the model's collectives (ZeRO-3) need every rank.
    """
    domains: list[str] = []
    stream = islice(held_out.rows(domains), rows)
    sums = np.zeros((3, 0))
    for batch in micro_batches(stream, size=micro_batch, rank=rank, world_size=world_size):
        sums = _padded(sums, len(domains))
        sums += _score(
            batch,
            nats,
            device=device,
            size=micro_batch,
            length=held_out.sequence_length,
            domains=len(domains),
            separated=held_out.document_mask,
        )
        on_progress(len(batch))
    nats_sum, targets, utf8_bytes = total(_padded(sums, len(domains)))
    return Scores(tuple(domains), nats_sum, targets.astype(np.int64), utf8_bytes.astype(np.int64))


def _score(
    batch: Sequence[EvalRow], nats: Nats, *, device: torch.device, size: int, length: int, domains: int, separated: bool
) -> NDArray[np.float64]:
    """[3, domains]: nats, number of target tokens and bytes of a micro-batch, padded with empty rows to `size`."""
    ids = np.zeros((size, length + 1), np.int64)
    documents = np.zeros((size, length), np.int64) if separated else None
    for index, row in enumerate(batch):
        ids[index] = row.ids
        if documents is not None and row.documents is not None:
            documents[index] = row.documents
    tokens = torch.from_numpy(ids).to(device)
    documents_BL = None if documents is None else torch.from_numpy(documents).to(device)
    losses = nats(tokens[:, :-1], tokens[:, 1:], documents_BL).double().cpu().numpy()
    sums = np.zeros((3, domains))
    for index, row in enumerate(batch):
        domains_of_targets = row.domains[row.loss_mask]
        sums[0] += np.bincount(domains_of_targets, weights=losses[index][row.loss_mask], minlength=domains)
        sums[1] += np.bincount(domains_of_targets, minlength=domains)
        sums[2, : len(row.utf8_bytes)] += row.utf8_bytes
    return sums


def _padded(sums: NDArray[np.float64], domains: int) -> NDArray[np.float64]:
    return np.pad(sums, ((0, 0), (0, domains - sums.shape[1])))


def held_out_bytes(held_out: HeldOut, *, limit: int) -> bytes | None:
    """The held-out text as one bytes string, or None where it is longer than `limit`."""
    parts: list[bytes] = []
    length = 0
    for document in held_out.documents():
        parts.append(document.text.encode())
        length += len(parts[-1])
        if length > limit:
            return None
    return b"".join(parts)


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines for a person."""
    yield f"{'':24}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}{'tokens':>13}"
    for name, part in [("all", report), *sorted(report["domains"].items())]:
        yield (
            f"{visible(name)[:24]:24}{part['loss']:9.4f}{part['perplexity']:12.2f}{part['bits_per_byte']:11.4f}{part['tokens']:13,}"
        )


def evaluate_checkpoint(path: Path, *, files: Sequence[str] | None) -> dict[str, Any]:
    """The report of `Scores.report` for a checkpoint, with its path. Raises UserError where there is no text."""
    config, sources = saved_validation(path, files, form_of=lambda config: RAW_TEXT)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TorchScorer(load_model(path, config.model).to(device))
    text = HeldOut(
        sources,
        Tokenizer.load(path / "tokenizer.model"),
        config.data.sequence_length,
        document_mask=config.data.separates_documents,
    )
    held_out = HeldOutText(text)
    with (
        torch.no_grad(),
        each_bad_line_once(),  # the rows are counted first
        Progress("evaluating", total=held_out.rows(None), unit="rows") as shown,
    ):
        scores = held_out.score(
            model, device=device, micro_batch=config.train.micro_batch_size, on_progress=shown.advance
        )
    if not scores.utf8_bytes.sum():
        raise UserError(
            f"there is no text to score: {', '.join(files or ['data.eval_files'])} has only empty documents"
        )
    return {"checkpoint": str(path), **scores.report()}
