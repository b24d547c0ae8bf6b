"""One run of `benchmark.py learning`: a model learns from the project's own rows, in plain PyTorch on one device."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import isfinite, log
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import learning_state
from benchmarks.data_stages import loader_steps
from benchmarks.learning_peers import Learner
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.corpus import Corpus, open_corpus
from lamda.data.held_out import HeldOut
from lamda.data.loader import StepBatch, batch_digest
from lamda.data.tokenizer import Tokenizer
from lamda.data.tokenizer_training import ensure_tokenizer
from lamda.engines.deepspeed.optimizer import without_compile
from lamda.model.loss import token_losses, token_nll
from lamda.training.inputs import validation

Precision = Literal["fp32", "bf16"]

LOSS_EVERY = 10
"""Steps that are averaged for a point of the training loss curve."""

POINTS = 8
"""Evaluations of a run, the last one at its end."""

POINT_ROWS, FINAL_ROWS = 64, 512
"""Held-out rows of an evaluation, and of the final one, which include the former."""

ROWS_AT_ONCE = 8
DIGITS = 6
"""Decimal places in curves."""

TIMED_STEPS = 3
"""Consecutive timed steps of one model."""


@dataclass(frozen=True)
class HeldOutRows:
    """ids: [N, L+1]. loss_mask: [N, L] bool, the targets that count. utf8_bytes: of all targets' text."""

    ids: Tensor
    loss_mask: Tensor
    utf8_bytes: int

    @property
    def digest(self) -> str:
        """16 hex digits that identify these rows."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()[:16]


class Rows:
    """The rows that all models read. Raises UserError if there is no training or held-out text."""

    def __init__(self, config: Config) -> None:
        if config.data.separates_documents:
            raise UserError("data.document_mask and data.packing whole: the peers have no mask of documents")
        self.config, self.corpus = config, open_corpus(config.data)
        self.tokenizer = _tokenizer(config, self.corpus)
        self.held_out = _held_out(config, self.corpus, self.tokenizer)
        self.digest = cache(self._digest)

    def steps(self, seed: int) -> Generator[StepBatch, None, None]:
        """The steps of a run with this seed, endless. Close it to end the loader's threads."""
        return loader_steps(self.config, self.corpus, self.tokenizer, seed=seed)

    def _digest(self, seed: int) -> str:
        """The digest of the rows of the first step with this seed."""
        with closing(self.steps(seed)) as steps:
            step = next(steps)
        return batch_digest(step.digests[np.argsort(step.positions)])


def _tokenizer(config: Config, corpus: Corpus) -> Tokenizer:
    if config.tokenizer.path is not None:
        with tempfile.TemporaryDirectory() as folder:
            return ensure_tokenizer(config, target=Path(folder) / "tokenizer.model", corpus=corpus)
    target = Path(config.run.dir) / "tokenizer.model"
    target.parent.mkdir(parents=True, exist_ok=True)
    return ensure_tokenizer(config, target=target, corpus=corpus)


def _held_out(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> HeldOutRows:
    sources = validation(config, corpus)
    if not sources:
        raise UserError("there is no held-out text: give --data.eval_files, which are not trained on")
    text = HeldOut(sources, tokenizer, config.data.sequence_length)
    rows = list(islice(text.rows([]), FINAL_ROWS))
    if not rows:
        raise UserError("there is no document in the held-out text: look at data.eval_files")
    return HeldOutRows(
        ids=torch.from_numpy(np.stack([row.ids for row in rows]).astype(np.int64)),
        loss_mask=torch.from_numpy(np.stack([row.loss_mask for row in rows])),
        utf8_bytes=int(sum(row.utf8_bytes.sum() for row in rows)),
    )


@dataclass(frozen=True)
class How:
    """Device and precision; bf16 is autocast over fp32 weights."""

    device: torch.device
    precision: Precision = "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        """For a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Batch = Sequence[tuple[Tensor, Tensor]]
"""Micro-batches: ids [b, L+1] and the scored targets [b, L], both on the device."""


def batch_of(step: StepBatch, device: torch.device) -> Batch:
    """A loader's step as tensors."""
    return [
        (torch.from_numpy(part.ids.astype(np.int64)).to(device), torch.from_numpy(part.loss_mask).to(device))
        for part in step.micro_batches
    ]


def train_step(learner: Learner, batch: Batch, how: How, *, step: int, steps: int) -> Tensor:
    """Step `step` (the first is 1) of `steps`; the mean cross-entropy of its scored targets, a scalar."""
    train = learner.recipe.train
    learner.set_rate(step, steps=steps)
    targets = sum(loss_mask_BL.sum() for _, loss_mask_BL in batch)
    total = torch.zeros((), device=how.device)
    for ids_BL, loss_mask_BL in batch:
        with how.autocast():
            logits_BLV = learner.logits(ids_BL[:, :-1])
        nll_BL, log_z_BL = token_losses(logits_BLV, ids_BL[:, 1:])
        loss = (nll_BL * loss_mask_BL).sum() / targets
        (loss + train.z_loss * (log_z_BL.square() * loss_mask_BL).sum() / targets).backward()
        total += loss.detach()
    trained = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
    if train.gradient_clipping:
        torch.nn.utils.clip_grad_norm_(trained, train.gradient_clipping)
    with without_compile(train):
        for optimizer in learner.optimizers:
            optimizer.step()
    for optimizer in learner.optimizers:
        optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def evaluate(learner: Learner, held_out: HeldOutRows, how: How, *, rows: int) -> NDArray[np.float64]:
    """Nats and number of scored targets of each of the first rows, [n, 2]."""
    found = []
    pieces = zip(*(each[:rows].split(ROWS_AT_ONCE) for each in (held_out.ids, held_out.loss_mask)), strict=True)
    for ids_BL, loss_mask_BL in pieces:
        ids_BL, loss_mask_BL = ids_BL.to(how.device), loss_mask_BL.to(how.device)
        with how.autocast():
            logits_BLV = learner.logits(ids_BL[:, :-1])
        nll_BL = token_nll(logits_BLV, ids_BL[:, 1:]).double() * loss_mask_BL
        found.append(torch.stack([nll_BL.sum(1), loss_mask_BL.sum(1).double()], 1).cpu().numpy())
    return np.concatenate(found)


def run(
    learner: Learner,
    rows: Rows,
    how: How,
    *,
    seed: int,
    steps: int,
    state: Path,
    on_progress: Callable[[int, float, float], object],
) -> dict[str, Any]:
    """Train and evaluate. Curves are of [tokens, nats]; a loss that is not finite ends the run without figures.

    state: where an interrupted run continues from; removed at the end. on_progress: called every LOSS_EVERY steps with
    the step, the mean loss since the last time, and all steps' seconds.
    """
    batch_tokens = rows.config.train.global_batch_size * rows.config.data.sequence_length
    evaluated = {round(steps * point / POINTS) for point in range(1, POINTS)} - {0, steps}
    done = learning_state.load(state, learner)
    saved, summed = time.monotonic(), torch.zeros((), device=how.device)
    with closing(rows.steps(seed)) as coming:
        for step, fetched in enumerate(islice(coming, done.step, steps), done.step + 1):
            batch = batch_of(fetched, how.device)
            how.wait()
            began = time.perf_counter()
            summed += train_step(learner, batch, how, step=step, steps=steps)
            how.wait()
            done.seconds += time.perf_counter() - began
            if step in evaluated:
                nats, targets = evaluate(learner, rows.held_out, how, rows=POINT_ROWS).sum(0)
                done.held_out.append([step * batch_tokens, round(float(nats / targets), DIGITS)])
            if step % LOSS_EVERY and step != steps:
                continue
            loss = float(summed) / (step - done.step)
            on_progress(step, loss, done.seconds)
            if not isfinite(loss):
                state.unlink(missing_ok=True)
                return {**_curves(done), "diverged_at": step}
            done.losses.append([step * batch_tokens, round(loss, DIGITS)])
            done.step = step
            summed.zero_()
            if time.monotonic() - saved > learning_state.EVERY:
                learning_state.save(state, learner, done)
                saved = time.monotonic()
    found = {**_curves(done), **_final(learner, rows, how, done.held_out, steps * batch_tokens)}
    state.unlink(missing_ok=True)
    return found


def _curves(done: learning_state.Progress) -> dict[str, Any]:
    return {"losses": done.losses, "held_out": done.held_out, "seconds": done.seconds, "final": None}


def _final(learner: Learner, rows: Rows, how: How, held_out: list[list[float]], tokens: int) -> dict[str, Any]:
    """The last point of the curve, and the figures of all held-out rows."""
    found = evaluate(learner, rows.held_out, how, rows=FINAL_ROWS)
    nats, targets = found[:POINT_ROWS].sum(0)
    all_nats, all_targets = found.sum(0)
    return {
        "held_out": [*held_out, [tokens, round(float(nats / targets), DIGITS)]],
        "final": all_nats / all_targets,
        "bits_per_byte": all_nats / log(2) / rows.held_out.utf8_bytes,
        "targets": int(all_targets),
    }


def time_in_turn(
    learners: Mapping[str, Learner], batches: Sequence[Batch], how: How, *, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds per token of each model: TIMED_STEPS steps of each in turn, `rounds` times after a round that is dropped.

    So whatever else the machine does meets all of them, and the figure of a model is the median of the rounds, and
    of the rounds' ratios to the first model.
    """
    tokens = TIMED_STEPS * sum(loss_mask_BL.numel() for _, loss_mask_BL in batches[0])
    found: dict[str, list[float]] = {name: [] for name in learners}
    for number in range(rounds + 1):
        for name, learner in learners.items():
            how.wait()
            began = time.perf_counter()
            for step in range(TIMED_STEPS):
                train_step(learner, batches[step % len(batches)], how, step=1, steps=1)
            how.wait()
            if number:
                found[name].append((time.perf_counter() - began) / tokens)
    first = next(iter(found.values()))
    return {
        name: {
            "seconds_per_token": median(each),
            "ratio": median(own / other for own, other in zip(each, first, strict=True)),
            "rounds": each,
        }
        for name, each in found.items()
    }
