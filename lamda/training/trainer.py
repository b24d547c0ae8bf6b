"""The training loop: fetch, step, log, evaluate, save; and go back, or leave, where that is called for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lamda.config.errors import DataError, DataUnavailableError, RunError
from lamda.config.schema import Config
from lamda.data.loader import Loader, Step
from lamda.data.quarantine import Quarantined, QuarantineFile
from lamda.data.tokenizer import Tokenizer
from lamda.distributed import World, broadcast, gather, on_main
from lamda.engines.protocol import Engine, Scorer
from lamda.storage import commit
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training import fault_injection, rollback
from lamda.training.anomalies import Health
from lamda.training.loggers import SilentReport
from lamda.training.lr_schedule import next_learning_rate, total_steps
from lamda.training.profile import Profile
from lamda.training.rollback import Setback
from lamda.training.row import FinishedStep
from lamda.training.saver import Saved, Saver
from lamda.training.stop_requests import StopRequests
from lamda.training.task import FULL, Benchmarks, Evaluation, Scores, TaskError
from lamda.training.watchdog import Watchdog


class EvaluationLeftError(Exception):
    """The ranks have agreed to stop, in the middle of an evaluation; all of them are in step."""


@dataclass
class Run:
    """A run in progress: its parts, and the state that the next checkpoint saves.

    stopped: why the run left before its end. scores, task_figures: of the last evaluations (the figures on rank 0).
    """

    config: Config
    world: World
    directory: RunDirectory
    engine: Engine
    open_loader: Callable[[RunState], Loader]
    held_out: Evaluation | None
    benchmarks: Benchmarks | None
    tokenizer: Tokenizer
    domains: tuple[str, ...]
    saver: Saver
    requests: StopRequests
    watchdog: Watchdog
    report: SilentReport
    state: RunState
    profile: Profile
    scores: Scores | None = None
    task_figures: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    _health: Health = field(init=False)
    _stop_is_agreed: bool = False
    _left_evaluation: bool = False
    _stalled: float = 0.0
    _quarantine: QuarantineFile = field(init=False)
    _rows_scored: dict[int | None, int] = field(default_factory=dict)

    def train(self) -> None:
        """Go on to the last step, or to where the run was asked to stop; either way a checkpoint holds it all.

        Raises RunError where that cannot be.
        """
        self._health = self._history()
        self._quarantine = QuarantineFile(self.directory.quarantine)
        self._make_up()
        while not self.is_over and self.stopped is None:
            with self.open_loader(self.state) as loader:
                setback = self._go_on(loader)
            if setback is not None:
                self._go_back(setback)

    def agreed_stop(self) -> str | None:
        """Why a rank was asked to stop, the same on every rank, which all call it; None where none was."""
        return next(filter(None, gather(self.requests.reason())), None)

    @property
    def is_over(self) -> bool:
        """Whether the last step is done."""
        return self.state.step >= total_steps(self.config, self.state)

    def begin_finish(self) -> None:
        """The last step is saved, and what came out is shown."""
        self._at("finish", step=self.state.step)

    def recorded_figures(self) -> dict[str, float]:
        """Of the evaluations at the last step, as its row has them: where a start before this one has made them."""
        rows = read_metrics(self.directory.metrics)[-1:] if self.world.is_main else []
        return {
            name: value for row in rows for name, value in row.items() if name.startswith("eval/") and value is not None
        }

    def score_held_out(self) -> dict[str, float]:
        """`eval/...` of the same `eval.batches` batches each time; at the last step `eval/full/...` of all the text."""
        began = time.monotonic()
        self.scores = self.evaluate(self.config.eval.batches)
        figures = self.scores.metrics()
        if self.is_over:
            self._announce_full(time.monotonic() - began)
            self.scores = self.evaluate(self.config.eval.full_batches)
            figures |= {FULL + name.removeprefix("eval/"): value for name, value in self.scores.metrics().items()}
        return figures

    def _announce_full(self, seconds: float) -> None:
        """Say how long all the held-out text may take. seconds: that its first batches took."""
        limit, known = self._rows_of(self.config.eval.full_batches), self._rows_scored
        first = known[self._rows_of(self.config.eval.batches)]
        pace = seconds / max(1, first)
        if limit is not None:
            much = f"at most {limit:,} rows of the held-out text, {timedelta(seconds=round(limit * pace))} at the most"
        else:
            much = f"all of the held-out text, {timedelta(seconds=round(1000 * pace))} for each 1,000 rows"
        self.report.say(f"evaluating {much} (eval.full_batches bounds it)")

    def _rows_of(self, batches: int | None) -> int | None:
        return None if batches is None else batches * self.config.train.global_batch_size

    def evaluate(self, batches: int | None) -> Scores:
        """Score the held-out text, its first batches or (None) all of it."""
        rows = self._rows_of(batches)
        total, done = self._rows_scored.get(rows) or self.held_out.rows(rows), 0

        def scored(own: int) -> None:
            nonlocal done
            done += own * self.world.size
            advance(own * self.world.size)

        with self.report.long_job("evaluating", total=total, unit="rows") as advance, self.engine.evaluating():
            scores = self.held_out.score(
                _Watched(self.engine, at=self._at_batch),
                device=self.engine.device,
                micro_batch=self.config.train.micro_batch_size,
                rank=self.world.rank,
                world=self.world.size,
                rows=rows,
                total=self._total,
                scored=scored,
            )
        self._rows_scored[rows] = done
        return scores

    def score_tasks(self) -> dict[str, float]:
        """The figures of `eval.tasks`, on rank 0; none where a task fails, which is told."""
        try:
            with self.engine.evaluating():
                return self.benchmarks.score(self.engine, self.tokenizer, mark=self._at_batch, shows=self._shows)
        except TaskError as error:
            self.report.warn("evaluation failed", f"step {self.state.step}: eval.tasks: {error}; training goes on")
            return {}

    def _go_on(self, loader: Loader) -> Setback | None:
        """Train until the end, a stop, or a setback. A step's figures are read while the next one is computed."""
        pending: FinishedStep | None = None
        for batch, waited, began in self._batches(loader):
            current = self._step(batch, waited=waited, began=began)
            if pending is not None and (setback := self._close(pending)):
                return setback
            pending = current
            self._compare()
            pending.more |= self._evaluated()
            if self._checkpoint_is_due or self._stop_is_agreed:
                if setback := self._close(pending):
                    return setback
                pending = None
                self._save(loader, wait=self.is_over or self._stop_is_agreed)
            if self._stop_is_agreed and (not self.is_over or self._left_evaluation):
                self.stopped = self.agreed_stop() or "asked to stop"
                return None
        return None

    def _evaluated(self) -> dict[str, float]:
        """The figures that are due at this step; none where the run is asked to stop meanwhile."""
        figures: dict[str, float] = {}
        try:
            if self._evaluation_is_due:
                figures |= self.score_held_out()
            if self._tasks_are_due:
                self.task_figures = self.score_tasks()
                figures |= self.task_figures
        except EvaluationLeftError:
            self._stop_is_agreed = self._left_evaluation = True
            self.scores, self.task_figures = None, {}
            self.report.say(f"step {self.state.step}: the evaluation was left; the same command makes up for it")
            return {}
        return figures

    def _make_up(self) -> None:
        """Evaluate the step that the run begins with, where it was left by a stop and its row has no figures."""
        if not (self._evaluation_is_due or self._tasks_are_due):
            return
        rows = on_main(self.world, lambda: read_metrics(self.directory.metrics)[-1:])
        if not rows or rows[0]["step"] != self.state.step or any(name.startswith("eval/") for name in rows[0]):
            return
        if figures := self._evaluated():
            self.report.amend(self.state.step, figures)
        if self._left_evaluation:
            self.stopped = self.agreed_stop() or "asked to stop"

    def _step(self, batch: Step, *, waited: float, began: float) -> FinishedStep:
        config = self.config
        self.profile.begin(self.state.step + 1)
        rate = next_learning_rate(config, self.state)
        signals = (int(self.requests.reason() is not None), self.saver.settled)
        result = self.engine.step(batch, learning_rate=rate, signals=signals, at=self._at)
        self.state = self.state.after(
            consumed=batch.consumed, rows=config.train.global_batch_size, updated=result.updated
        )
        self.profile.end(self.state.step)
        stalled, self._stalled = self._stalled, 0.0
        return FinishedStep(
            self.state,
            result,
            rate=rate,
            waited=waited,
            stalled=stalled,
            seconds=time.monotonic() - began,
            epochs=batch.epochs,
        )

    def _close(self, finished: FinishedStep) -> Setback | None:
        """Read a step's figures, tell them, and do what the ranks have agreed on with them."""
        self.state = self.state.with_targets(finished.targets())
        finished.state = replace(finished.state, tokens=self.state.tokens)
        row = finished.row(self.config, self.domains, peak_flops=self.engine.peak_flops, devices=self.engine.devices)
        self.report.row(row)
        self._at("report", step=finished.state.step)
        stops, settled = finished.signals()
        self._stop_is_agreed |= stops > 0
        self._tell(self.saver.advance(settled))
        refused = not finished.result.updated
        if refused and not self._health.last_was_refused:
            self.report.warn(
                "step refused", f"step {row['step']}: its loss or gradient is not finite; the weights stay as they are"
            )
        trouble = self._health.judge(row["loss"], refused=refused)
        if trouble is None:
            return None
        if (obstacle := self._obstacle()) is None:
            return Setback(trouble.text, step=row["step"], first=row["step"] - trouble.steps + 1)
        if trouble.is_fatal:
            raise RunError(f"step {row['step']}: {trouble.text}, and the run cannot go back: {obstacle}")
        self.report.warn("loss spike", f"step {row['step']}: {trouble.text}; the run goes on, for {obstacle}")
        return None

    def _save(self, loader: Loader, *, wait: bool) -> None:
        """Save this step in the background, or now. Raises RunError where a save that is waited for fails."""
        began = time.monotonic()
        self._at("save", step=self.state.step)
        quarantined = gather(loader.quarantined())
        if self.world.is_main:
            self._keep_quarantined(chain.from_iterable(quarantined))
        self._tell(self.saver.finish())
        ended = self.saver.begin(replace(self.state, order=loader.order())) or (self.saver.finish() if wait else None)
        self._stalled += time.monotonic() - began
        self._tell(ended)
        if wait and ended.problem is not None:
            raise RunError(f"the last checkpoint could not be written: {ended.problem}. {self._kept()}")

    def _go_back(self, setback: Setback) -> None:
        """Return to a sound checkpoint; the samples from there to here are never used again."""
        path = rollback.find_sound(self.directory, first=setback.first, world=self.world)
        there, here = commit.read_state(path), self.state
        window = (there.consumed, here.consumed)
        on_main(self.world, lambda: self.directory.note_skipped(window, step=setback.step, reason=setback.reason))
        on_main(self.world, lambda: rollback.set_spoilt_aside(self.directory))
        self.engine.load(path)
        self.state = replace(
            there, skipped=(*here.skipped, window), rollbacks=here.rollbacks + 1, wandb_id=here.wandb_id
        )
        self.report.rewind(there.step)
        self.report.warn(
            "went back",
            f"step {setback.step}: {setback.reason}; back to {path.name}, without samples {window[0]} to "
            f"{window[1] - 1} (time {self.state.rollbacks} of {self.config.train.max_rollbacks})",
        )
        self._health = self._history()

    def _obstacle(self) -> str | None:
        """Why the run cannot go back, if it cannot."""
        if self.state.rollbacks >= self.config.train.max_rollbacks:
            return f"train.max_rollbacks is {self.config.train.max_rollbacks}"
        self._tell(self.saver.finish())
        there = on_main(self.world, lambda: bool(commit.complete(self.directory.checkpoints)))
        return None if there else "there is no checkpoint yet"

    def _history(self) -> Health:
        """The run's health by the rows so far, the same on every rank."""
        rows = read_metrics(self.directory.metrics) if self.world.is_main else []
        return Health(self.config.train, broadcast([(row["loss"], row["skipped_steps"]) for row in rows]))

    def _compare(self) -> None:
        every = self.config.run.weight_check_every
        if every is not None and self.state.step % every == 0 and (odd := self.engine.odd_ranks()):
            raise RunError(
                f"step {self.state.step}: the weights of rank {', '.join(map(str, odd))} of {self.world.size} are not "
                f"what the optimiser computed: memory or a device is faulty. {self._kept()}"
            )

    def _tell(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.problem is None:
            self.report.saved(saved.path)
        else:
            self.report.warn(
                "checkpoint failed",
                f"checkpoint of step {saved.step}: {saved.problem}; training goes on, and the next save tries again. "
                f"{self._kept()}",
            )

    def _kept(self) -> str:
        """What the same command would continue from, in a sentence; it is for rank 0."""
        found = commit.complete(self.directory.checkpoints) if self.world.is_main else []
        if not found:
            return "No checkpoint is complete yet: the same command would begin with step 1"
        return f"{found[-1].name} is complete: the same command would continue from it"

    def _keep_quarantined(self, found: Iterable[Quarantined]) -> None:
        if new := self._quarantine.add(found):
            bad = new[0].bad
            self.report.warn(
                "lines quarantined",
                f"step {self.state.step}: {len(new)} more lines hold no document, {bad.place} "
                f"({bad.reason}) among them; see {self.directory.quarantine}",
            )

    def _at_batch(self) -> None:
        """Before each batch of an evaluation, of which all ranks have equally many. Raises EvaluationLeftError."""
        self._at("evaluate", step=self.state.step)
        if self._total(np.array([float(self.requests.reason() is not None)]))[0]:
            raise EvaluationLeftError

    def _at(self, point: str, tensor: torch.Tensor | None = None, *, step: int | None = None) -> None:
        """Every moment of a step passes here: the watchdog sees progress, a test puts its faults."""
        step = step or self.state.step + 1
        self.watchdog.mark(point, step=step)
        fault_injection.reach(point, rank=self.world.rank, step=step, tensor=tensor)

    def _shows(self, what: str, total: int) -> AbstractContextManager[Callable[[float], None]]:
        return self.report.long_job(f"eval.tasks, {what}", total=total, unit="requests")

    def _batches(self, loader: Loader) -> Iterator[tuple[Step, float, float]]:
        """Batches with the seconds that they were waited for, and when the waiting began."""
        batches = iter(loader)
        while not self.is_over:
            self._at("fetch")
            began = time.monotonic()
            try:
                batch = next(batches)
            except DataError as error:
                # The text could be read when the run began: another try may find it whole again.
                raise DataUnavailableError(f"step {self.state.step + 1}: {error}") from error
            yield batch, time.monotonic() - began, began

    @property
    def _evaluation_is_due(self) -> bool:
        every = self.config.eval.every
        return self.held_out is not None and self._is_at(every)

    @property
    def _tasks_are_due(self) -> bool:
        every = self.config.eval.tasks_every
        return self.benchmarks is not None and self._is_at(every)

    def _is_at(self, every: int | None) -> bool:
        """Whether the last step is done, or one that `every` divides."""
        step = self.state.step
        return self.is_over or (every is not None and step > 0 and step % every == 0)

    @property
    def _checkpoint_is_due(self) -> bool:
        return self.is_over or self.state.step % self.config.checkpoint.every == 0

    def _total(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        tensor = torch.from_numpy(sums).to(self.engine.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()


@dataclass(frozen=True)
class _Watched:
    """A model under evaluation; `at` is called before each of its batches."""

    model: Scorer
    at: Callable[[], None]

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        self.at()
        return self.model.logits(inputs_BL)

    def nats(
        self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor, documents_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.at()
        return self.model.nats(inputs_BL, targets_BL, documents_BL)
