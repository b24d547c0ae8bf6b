"""What a run trains for, and how it is evaluated. This is pre-training; `lamda.dialog.finetuning` is the other task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, Unpack

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lamda.best_effort import BestEffort
from lamda.config.schema import Config
from lamda.data.card import Source
from lamda.data.compression import compressed_bits_per_byte
from lamda.data.documents import Form
from lamda.data.held_out import HeldOut
from lamda.data.lanes import RAW_TEXT
from lamda.data.tokenizer import Tokenizer
from lamda.distributed import World, on_main
from lamda.engines.protocol import Engine, Scorer
from lamda.inference.sampling import Sampling
from lamda.training.evaluation import HeldOutText, ScoreOptions, held_out_bytes, table
from lamda.training.loggers import RunLogger
from lamda.training.watchdog import Guard

FULL = "eval/full/"  # prefix of the last step's metrics on all the held-out text; other `eval/...` are on some rows

COMPARED_BYTES = 32_000_000  # held-out text up to this size is also compressed, to compare its bits per byte

Mark = Callable[[], None]  # reports progress to the watchdog

ShowProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(name of a job, its size) -> context with a callback that takes the number of items just finished."""


class Scores(Protocol):
    """The result of an evaluation."""

    def metrics(self) -> dict[str, float]:
        """`eval/...`, as in metrics.jsonl."""

    def report(self) -> dict[str, Any]:
        """All figures."""


class Evaluation(Protocol):
    """Held-out data of a run."""

    def rows(self, limit: int | None) -> Iterable[object]:
        """As many objects as `score` will report to `on_progress`, over all ranks."""

    def score(self, model: Scorer, **options: Unpack[ScoreOptions]) -> Scores:
        """Score the model; every rank calls it. See `lamda.training.evaluation.evaluate`."""


class Task(Protocol):
    """Everything in which pre-training and fine-tuning differ."""

    def form(self, config: Config) -> Form:
        """The kind of records in the corpus."""

    def open_evaluation(
        self,
        config: Config,
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        *,
        on_wait: Callable[[], object] = lambda: None,
    ) -> Evaluation | None:
        """The held-out data in `sources`, if there are any. on_wait: called while a server is waited for."""

    def summary(self, scores: Scores) -> Iterator[str]:
        """The last evaluation as lines for a person."""

    def attachments(self, config: Config, scores: Scores) -> dict[str, str]:
        """Small files that the last checkpoint gets, by name, from the evaluation of its model."""

    def sample(self, engine: Engine, tokenizer: Tokenizer) -> str:
        """Text that the trained model generates; every rank calls it."""


class BenchmarkError(Exception):
    """A task of `eval.tasks` failed, with all ranks still in step: the run can continue without its metrics."""


class Benchmarks(Protocol):
    """The tasks of `eval.tasks`, loaded."""

    def score(
        self, engine: Engine, tokenizer: Tokenizer, *, mark: Mark, show_progress: ShowProgress
    ) -> dict[str, float]:
        """`eval/<task>/<metric>` as in metrics.jsonl, on rank 0, which raises BenchmarkError. Every rank calls it."""


OpenBenchmarks = Callable[[Config, World], Benchmarks | None]
"""Loads the tasks of `eval.tasks`, if there are any; every rank calls it, at the start. Raises UserError."""


class EvaluationInterruptedError(Exception):
    """The ranks have agreed to stop during an evaluation; all of them are in step."""


@dataclass
class Evaluator:
    """Evaluates a run.

    open_held_out: the held-out data in rows of a configuration, if there is any. batch_size: rows of an evaluation /
    `eval.batches`. scores, task_metrics: of the last evaluation (the metrics on rank 0).
    """

    engine: Engine
    task: Task
    tokenizer: Tokenizer
    open_held_out: Callable[[Config], Evaluation | None]
    benchmarks: Benchmarks | None
    logger: RunLogger
    guard: Guard
    batch_size: int
    held_out: Evaluation | None = field(init=False)
    scores: Scores | None = None
    task_metrics: dict[str, float] = field(default_factory=dict)
    _step: int = 0
    _rows_scored: dict[int | None, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.enter_stage(self.engine.config)

    def enter_stage(self, config: Config) -> None:
        """Continue with the rows of a stage, which may have another length."""
        self.held_out = self.open_held_out(config)
        self._rows_scored.clear()

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether `evaluate` has anything to do after this step."""
        return self._held_out_is_due(step, is_last=is_last) or self._tasks_are_due(step, is_last=is_last)

    def evaluate(self, step: int, *, is_last: bool) -> dict[str, float]:
        """The metrics that are due after `step`. Raises EvaluationInterruptedError on all ranks."""
        self._step = step
        metrics: dict[str, float] = {}
        try:
            if self._held_out_is_due(step, is_last=is_last):
                metrics |= self._score_held_out(is_last=is_last)
            if self._tasks_are_due(step, is_last=is_last):
                self.task_metrics = self._score_tasks()
                metrics |= self.task_metrics
        except EvaluationInterruptedError:
            self.scores, self.task_metrics = None, {}
            raise
        return metrics

    def attachments(self) -> dict[str, str]:
        """The task's files for the checkpoint of the model that was evaluated last."""
        return {} if self.scores is None else self.task.attachments(self.engine.config, self.scores)

    def _held_out_is_due(self, step: int, *, is_last: bool) -> bool:
        return self.held_out is not None and (is_last or _is_multiple(step, self.engine.config.eval.every))

    def _tasks_are_due(self, step: int, *, is_last: bool) -> bool:
        return self.benchmarks is not None and (is_last or _is_multiple(step, self.engine.config.eval.tasks_every))

    def _score_held_out(self, *, is_last: bool) -> dict[str, float]:
        """`eval/...` of the same `eval.batches` batches each time; at the last step also `eval/full/...` of all."""
        settings = self.engine.config.eval
        began = time.monotonic()
        self.scores = self._score(settings.batches)
        metrics = self.scores.metrics()
        if is_last:
            self._announce_full(time.monotonic() - began)
            self.scores = self._score(settings.full_batches)
            metrics |= {FULL + name.removeprefix("eval/"): value for name, value in self.scores.metrics().items()}
        return metrics

    def _announce_full(self, seconds: float) -> None:
        """Report how long scoring all the held-out text may take. seconds: time that the first batches took."""
        settings = self.engine.config.eval
        limit, first = self._num_rows(settings.full_batches), self._rows_scored[self._num_rows(settings.batches)]
        pace = seconds / max(1, first)
        if limit is not None:
            amount = f"at most {limit:,} rows of the held-out text, in at most {timedelta(seconds=round(limit * pace))}"
        else:
            amount = f"all of the held-out text, {timedelta(seconds=round(1000 * pace))} for each 1,000 rows"
        self.logger.progress.say(f"evaluating {amount} (eval.full_batches limits it)")

    def _num_rows(self, batches: int | None) -> int | None:
        return None if batches is None else batches * self.batch_size

    def _score(self, batches: int | None) -> Scores:
        """Score the held-out text, its first batches or (None) all of it."""
        assert self.held_out is not None
        world, rows = self.engine.world, self._num_rows(batches)
        total, done = self._rows_scored.get(rows) or self.held_out.rows(rows), 0

        def on_progress(local: int) -> None:
            nonlocal done
            done += local * world.world_size
            advance(local * world.world_size)

        with self.logger.progress.long_job("evaluating", total=total, unit="rows") as advance, self.engine.eval_mode():
            scores = self.held_out.score(
                _InterruptibleScorer(self.engine, on_batch=self._on_batch),
                device=self.engine.device,
                micro_batch=self.engine.config.train.micro_batch_size,
                rank=world.rank,
                world_size=world.world_size,
                rows=rows,
                total=self._all_reduce,
                on_progress=on_progress,
            )
        self._rows_scored[rows] = done
        return scores

    def _score_tasks(self) -> dict[str, float]:
        """The metrics of `eval.tasks`, on rank 0; none where a task fails, which is reported."""
        assert self.benchmarks is not None
        try:
            with self.engine.eval_mode():
                return self.benchmarks.score(
                    self.engine, self.tokenizer, mark=self._on_batch, show_progress=self._show_progress
                )
        except BenchmarkError as error:
            self.logger.warn("evaluation failed", f"step {self._step}: eval.tasks: {error}; training continues")
            return {}

    def _show_progress(self, name: str, total: int) -> AbstractContextManager[Callable[[float], None]]:
        return self.logger.progress.long_job(f"eval.tasks, {name}", total=total, unit="requests")

    def _on_batch(self) -> None:
        """Called before each batch, equally often on all ranks. Raises EvaluationInterruptedError."""
        self.guard.mark("evaluate", step=self._step)
        if self._all_reduce(np.array([float(self.guard.requests.reason() is not None)]))[0]:
            raise EvaluationInterruptedError

    def _all_reduce(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        tensor = torch.from_numpy(sums).to(self.engine.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


@dataclass(frozen=True)
class _InterruptibleScorer:
    """A model under evaluation; `on_batch` is called before each batch."""

    model: Scorer
    on_batch: Callable[[], None]

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        self.on_batch()
        return self.model.logits(inputs_BL)

    def nll(
        self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, documents_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.on_batch()
        return self.model.nll(inputs_BL, targets_BL, documents_BL)


class Pretraining:
    """Raw text, its held-out bits per byte, and a continuation of it."""

    def __init__(self) -> None:
        self._evaluation: HeldOutText | None = None
        self._evaluates_all = False

    def form(self, config: Config) -> Form:
        """Raw text."""
        return RAW_TEXT

    def open_evaluation(
        self,
        config: Config,
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        *,
        on_wait: Callable[[], object] = lambda: None,
    ) -> HeldOutText | None:
        """The validation text, if there is any."""
        if sources:
            length, is_masked = config.data.sequence_length, config.data.separates_documents
            text = HeldOut(tuple(sources), tokenizer, length, document_mask=is_masked, on_wait=on_wait)
            self._evaluation, self._evaluates_all = HeldOutText(text), config.eval.full_batches is None
        return self._evaluation

    def summary(self, scores: Scores) -> Iterator[str]:
        """The table of losses, and the bits per byte of compressors on the same text."""
        yield from table(scores.report())
        if self._evaluation is None or not self._evaluates_all:
            return
        if text := held_out_bytes(self._evaluation.text, limit=COMPARED_BYTES):
            others = ", ".join(f"{name} {bits:.4f}" for name, bits in compressed_bits_per_byte(text).items())
            yield f"bits per byte on the same text: {others}"

    def attachments(self, config: Config, scores: Scores) -> dict[str, str]:
        """None."""
        return {}

    def sample(self, engine: Engine, tokenizer: Tokenizer) -> str:
        """A continuation of the first held-out words, or of an empty document."""
        prompt = on_main(engine.world, self._prompt)
        ids = [tokenizer.end_of_document, *tokenizer.encode(prompt)]
        return f"{prompt}⟫{tokenizer.decode(continuation(engine, ids, stop_ids=(tokenizer.end_of_document,)))}\n"

    def _prompt(self) -> str:
        with BestEffort("no held-out text to continue", then="an empty document is continued", errors=Exception):
            if self._evaluation is not None:
                beginning = next(iter(self._evaluation.text.documents())).text[:200]
                return "".join(beginning.splitlines(keepends=True)[:-1]) or beginning
        return ""


def continuation(engine: Engine, ids: Sequence[int], *, stop_ids: Sequence[int]) -> list[int]:
    """100 tokens after `ids`, sampled with the run's seed; every rank calls it."""
    seed = engine.config.run.seed
    sampling = Sampling(max_new_tokens=100, temperature=0.8, seed=seed, stop_ids=frozenset(stop_ids))
    return engine.generate(ids, sampling)
