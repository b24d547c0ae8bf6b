"""The training loop: fetch, step, log, evaluate, save; and roll back or stop where necessary."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import torch

from lamda.config.errors import DataError, DataUnavailableError, RunError
from lamda.config.schema import Config
from lamda.config.stages import Stage
from lamda.data.loader import Loader
from lamda.data.quarantine import Quarantined, QuarantineFile
from lamda.data.windows import SourceOrder
from lamda.distributed import World, broadcast, gather, on_main
from lamda.engines.protocol import Engine
from lamda.storage import manifest
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.stage_log import note_stage
from lamda.storage.state import RunState
from lamda.storage.window_log import WindowLog
from lamda.training.anomalies import AnomalyDetector, RollbackError, find_sound, set_aside_rolled_back
from lamda.training.loggers import FetchedBatch, FinishedStep, RunLogger
from lamda.training.lr_schedule import final_step, rate_in
from lamda.training.saver import Saver, SaveResult
from lamda.training.stages import StagedInputs
from lamda.training.task import EvaluationInterruptedError, Evaluator
from lamda.training.watchdog import Guard


class RankCounters(NamedTuple):
    """Counters that each rank sends with each step; the engine sums them over the ranks.

    stop_requests: 1 if the rank was asked to stop. completed_parts: parts of the save in progress that it has written.
    """

    stop_requests: int
    completed_parts: int


@dataclass
class Trainer:
    """A run in progress. state: what the next checkpoint saves. stopped: why the run stopped early, if it did."""

    directory: RunDirectory
    engine: Engine
    inputs: StagedInputs
    evaluator: Evaluator
    saver: Saver
    logger: RunLogger
    guard: Guard
    state: RunState
    stopped: str | None = None
    world: World = field(init=False)
    _anomalies: AnomalyDetector = field(init=False)
    _quarantine: QuarantineFile = field(init=False)
    _windows: WindowLog = field(init=False)
    _stop_is_agreed: bool = False
    _evaluation_was_interrupted: bool = False
    _save_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.world = self.engine.world
        self._quarantine = QuarantineFile(self.directory.quarantine)
        self._windows = WindowLog(self.directory.order)
        if self.world.is_main_process:
            self._windows.begin(self.state.order, self.state.start)

    @property
    def config(self) -> Config:
        """The configuration of the stage."""
        return self.engine.config

    @property
    def stage(self) -> Stage:
        """The stage of the last step, or of the next one once `enter_stage` is called."""
        return self.inputs.stages[self.state.stage - 1]

    @property
    def is_over(self) -> bool:
        """Whether the last step is done."""
        return self.state.step >= final_step(self.inputs.stages, self.state)

    @property
    def is_stage_over(self) -> bool:
        """Whether the last step of the stage, or of the run, is done."""
        return self.is_over or (self.stage.number < len(self.inputs.stages) and self.state.step >= self.stage.last)

    @property
    def is_save_due(self) -> bool:
        """Whether this step is saved."""
        return self.is_stage_over or self._stop_is_agreed or self.state.step % self.config.checkpoint.every == 0

    @property
    def is_check_due(self) -> bool:
        """Whether the weights are checked after this step."""
        every = self.config.run.weight_check_every
        return every is not None and self.state.step % every == 0

    def fit(self) -> None:
        """Train to the last step or a stop; a checkpoint then holds everything. Raises RunError if it cannot."""
        self.use_stage()
        self.evaluate_if_missed()
        while not self.is_over and self.stopped is None:
            self.enter_stage()
            try:
                with self.inputs.of(self.state.stage).loader(self.state, on_window=self._keep_window) as loader:
                    self.train(loader)
                    self.state = replace(self.state, order=loader.order())
            except RollbackError as error:
                self.rollback(error)

    def enter_stage(self) -> None:
        """Go on to the stage of the next step, if it is another one."""
        before, self.state = self.state, self.inputs.enter(self.state)
        if self.state.stage != before.stage:
            self.logger.progress.say(f"stage {self.stage.name} begins after step {self.state.step}")
            if self.world.is_main_process:
                note_stage(self.directory.stages, self.state)
            self.use_stage()

    def use_stage(self) -> None:
        """Compute with the configuration of the state's stage."""
        config = self.stage.config
        if config != self.engine.config:
            self.engine.enter_stage(config, domains=len(self.inputs.of(self.state.stage).domains) + 1)
            self.evaluator.enter_stage(config)
        self._anomalies = self.loss_history()

    def train(self, loader: Loader) -> None:
        """Train, reading a step's metrics while the device computes the next one. Raises RollbackError."""
        previous: FinishedStep | None = None
        for batch in self.batches(loader):
            if previous is not None:
                previous.end(batch.began)
            step = self.train_step(batch)
            self.log_step(previous)
            if self.is_save_due or self.is_check_due or self.evaluator.is_due(self.state.step, is_last=self.is_over):
                step.end_when_done()
            self.check_weights()
            step.extra |= self.evaluate()
            previous = self.maybe_save(step, loader)
            self.maybe_stop()

    def batches(self, loader: Loader) -> Iterator[FetchedBatch]:
        """The batches of the remaining steps. Raises DataUnavailableError."""
        batches = iter(loader)
        while not self.is_stage_over and self.stopped is None:
            self._mark("fetch")
            began = time.monotonic()
            try:
                batch = next(batches)
            except DataError as error:
                # The text was readable when the run began: another attempt may succeed.
                raise DataUnavailableError(f"step {self.state.step + 1}: {error}") from error
            yield FetchedBatch(batch, time.monotonic() - began, began)

    def train_step(self, batch: FetchedBatch) -> FinishedStep:
        """One optimizer step; the device may still be computing it."""
        self.logger.profile.begin(self.state.step + 1)
        lr = rate_in(self.stage, self.state)
        counters = RankCounters(
            stop_requests=int(self.guard.requests.reason() is not None), completed_parts=self.saver.completed_parts
        )
        pending = self.engine.train_step(batch.step, lr=lr, counters=counters, on_phase=self._mark)
        rows = self.config.train.global_batch_size
        self.state = self.state.after(consumed=batch.step.consumed, rows=rows, updated=not pending.skipped)
        self.logger.profile.end(self.state.step)
        save_seconds, self._save_seconds = self._save_seconds, 0.0
        return FinishedStep(
            self.state,
            pending,
            lr=lr,
            began=batch.began,
            data_wait_seconds=batch.wait_seconds,
            save_seconds=save_seconds,
            epochs=batch.step.epochs,
            stage=self.stage.name,
        )

    def log_step(self, step: FinishedStep | None) -> None:
        """Read and log a step's metrics; act on stop requests, finished saves and anomalies, the same on all ranks.

        Raises RollbackError and RunError.
        """
        if step is None:
            return
        self.state = self.state.with_targets(step.num_tokens)
        step.state = replace(step.state, tokens=self.state.tokens)
        number, skipped = step.state.step, step.pending.skipped
        self.logger.log(step.metrics(self.engine, self.inputs.of(self.state.stage).domains))
        self._mark("report", step=number)
        totals = RankCounters(*map(int, step.measured.counters))
        self._stop_is_agreed |= totals.stop_requests > 0
        self.report_save(self.saver.advance(totals.completed_parts))
        if skipped and not self._anomalies.last_was_skipped:
            self.logger.warn(
                "step skipped", f"step {number} skipped: its loss or gradient is not finite; weights unchanged"
            )
        anomaly = self._anomalies.check(step.measured.loss(), skipped=skipped)
        if anomaly is None:
            return
        if (blocker := self.rollback_blocker()) is None:
            raise RollbackError(anomaly.text, step=number, first=number - anomaly.steps + 1)
        if anomaly.must_roll_back:
            raise RunError(f"step {number}: {anomaly.text}, and the run cannot roll back: {blocker}")
        self.logger.warn("loss spike", f"step {number}: {anomaly.text}; training continues, because {blocker}")

    def evaluate(self) -> dict[str, float]:
        """The evaluation metrics that are due at this step; none if the ranks agree to stop during it."""
        try:
            return self.evaluator.evaluate(self.state.step, is_last=self.is_over)
        except EvaluationInterruptedError:
            self._stop_is_agreed = self._evaluation_was_interrupted = True
            self.logger.progress.say(
                f"step {self.state.step}: evaluation interrupted; rerun the same command to complete it"
            )
            return {}

    def evaluate_if_missed(self) -> None:
        """Evaluate the step that the run begins with, if a stop interrupted its evaluation."""
        if not self.evaluator.is_due(self.state.step, is_last=self.is_over):
            return
        rows = on_main(self.world, lambda: read_metrics(self.directory.metrics)[-1:])
        if not rows or rows[0]["step"] != self.state.step or any(name.startswith("eval/") for name in rows[0]):
            return
        if metrics := self.evaluate():
            self.logger.amend(self.state.step, metrics)
        if self._evaluation_was_interrupted:
            self.stop()

    def maybe_save(self, step: FinishedStep, loader: Loader) -> FinishedStep | None:
        """Log and save this step if a checkpoint is due or the run stops; otherwise return it, to be logged later."""
        if not self.is_save_due:
            return step
        self.log_step(step)
        self.save(loader, wait=self.is_over or self._stop_is_agreed)
        return None

    def save(self, loader: Loader, *, wait: bool) -> None:
        """Save this step, in the background unless `wait`. Raises RunError if a save with `wait` fails."""
        began = time.monotonic()
        self._mark("save", step=self.state.step)
        quarantined = gather(loader.quarantined())
        if self.world.is_main_process:
            self.report_bad_lines(chain.from_iterable(quarantined))
        self.report_save(self.saver.finish())
        attachments = self.evaluator.attachments() if self.is_over and self.world.is_main_process else {}
        result = self.saver.begin(replace(self.state, order=loader.order()), attachments)
        if result is None and wait:
            result = self.saver.finish()
        self._save_seconds += time.monotonic() - began
        self.report_save(result)
        if wait and result is not None and result.problem is not None:
            raise RunError(f"the last checkpoint could not be written: {result.problem}. {self._resume_point()}")

    def maybe_stop(self) -> None:
        """Stop if the ranks have agreed to, unless the run is finished anyway."""
        if self._stop_is_agreed and (not self.is_over or self._evaluation_was_interrupted):
            self.stop()

    def stop(self) -> None:
        """End the loop after this step."""
        self.stopped = self.guard.agreed_stop_reason() or "asked to stop"

    def rollback(self, error: RollbackError) -> None:
        """Return to a sound checkpoint; the samples since then are never used again."""
        path = find_sound(self.directory, first=error.first, world=self.world)
        target, current = manifest.read_state(path), self.state
        skipped_range, later = self.inputs.rolled_back(target, current)
        on_main(
            self.world,
            lambda: self.directory.note_skipped(skipped_range, step=error.step, reason=error.reason, parked=later),
        )
        on_main(self.world, lambda: set_aside_rolled_back(self.directory))
        self.engine.load_checkpoint(path)
        skipped, rollbacks = (*current.skipped, skipped_range), current.rollbacks + 1
        self.state = replace(target, skipped=skipped, rollbacks=rollbacks, wandb_id=current.wandb_id).with_parked(later)
        self.logger.rewind(target.step)
        self.logger.warn(
            "rolled back",
            f"step {error.step}: {error.reason}; back to {path.name}, without samples {skipped_range[0]} to "
            f"{skipped_range[1] - 1} "
            f"(time {rollbacks} of {self.config.train.max_rollbacks})",
        )
        self.use_stage()

    def rollback_blocker(self) -> str | None:
        """Why the run cannot roll back, if it cannot."""
        if self.state.rollbacks >= self.config.train.max_rollbacks:
            return f"train.max_rollbacks is {self.config.train.max_rollbacks}"
        self.report_save(self.saver.finish())
        has_checkpoint = on_main(self.world, lambda: bool(manifest.complete(self.directory.checkpoints)))
        return None if has_checkpoint else "there is no checkpoint yet"

    def loss_history(self) -> AnomalyDetector:
        """The anomaly detector after all steps, with the losses of this stage; the same on every rank."""
        rows, first = read_metrics(self.directory.metrics) if self.world.is_main_process else [], self.stage.first
        history = [(row["loss"] if row["step"] > first else None, row["skipped_steps"]) for row in rows]
        return AnomalyDetector(self.config.train, broadcast(history))

    def check_weights(self) -> None:
        """Raise RunError if the weights of a rank are corrupted, where `run.weight_check_every` asks for a check."""
        if self.is_check_due and (ranks := self.engine.corrupted_ranks()):
            listed = ", ".join(map(str, ranks))
            raise RunError(
                f"step {self.state.step}: the weights of rank {listed} of {self.world.world_size} do not match the "
                f"optimizer's weights: suspect faulty memory or a faulty device. {self._resume_point()}"
            )

    def report_save(self, result: SaveResult | None) -> None:
        """Report the result of a save, if there is one."""
        if result is None:
            return
        if result.problem is None:
            self.logger.checkpoint(result.path)
        else:
            self.logger.warn(
                "checkpoint failed",
                f"checkpoint of step {result.step}: {result.problem}; training goes on, and the next save tries again. "
                f"{self._resume_point()}",
            )

    def report_bad_lines(self, lines: Iterable[Quarantined]) -> None:
        """Write new bad lines to the quarantine file and report them."""
        if new := self._quarantine.add(lines):
            bad = new[0].bad
            self.logger.warn(
                "lines quarantined",
                f"step {self.state.step}: {len(new)} more lines hold no document, {bad.place} "
                f"({bad.reason}) among them; see {self.directory.quarantine}",
            )

    def _resume_point(self) -> str:
        """The checkpoint that a restart would resume from, as a sentence, on rank 0."""
        checkpoints = manifest.complete(self.directory.checkpoints) if self.world.is_main_process else []
        if not checkpoints:
            return "No checkpoint is complete yet: the same command would begin with step 1"
        return f"{checkpoints[-1].name} is complete: the same command would resume from it"

    def _keep_window(self, source: int, order: SourceOrder) -> None:
        if self.world.is_main_process:
            self._windows.add(self.state.start.number(source), order)

    def _mark(self, phase: str, tensor: torch.Tensor | None = None, *, step: int | None = None) -> None:
        self.guard.mark(phase, step=step or self.state.step + 1, tensor=tensor)
