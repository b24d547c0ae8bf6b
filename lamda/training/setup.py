"""A run from start to end: open everything, train, show the results. The task and the framework are arguments."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lamda import distributed
from lamda.best_effort import BestEffort
from lamda.config.errors import RunError, UserError
from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.config.stages import Stage, plan_stages, stage_lines, with_rows_of
from lamda.console import computing
from lamda.data.split import open_text
from lamda.distributed import FailedElsewhereError, ReportedElsewhereError, World
from lamda.durable import replace_file
from lamda.engines.protocol import Engine, Framework
from lamda.storage import commit
from lamda.storage.lock import LostLockError, RunLock
from lamda.storage.mirror import Mirror
from lamda.storage.mirror_thread import MirrorThread
from lamda.storage.reading import UnreadableError, reading
from lamda.storage.run_directory import RunDirectory
from lamda.storage.run_log import run_log
from lamda.storage.state import RunState
from lamda.training.changes import report_start
from lamda.training.fault_injection import STEP_POINTS
from lamda.training.inputs import Inputs, check_other_files, validation, with_initial_weights
from lamda.training.loggers import RunLogger, TrainingProgress
from lamda.training.lr_schedule import final_step, remarks
from lamda.training.provenance import describe_start
from lamda.training.results import show_results
from lamda.training.resume import backend_change, find_resume_point, settings_of
from lamda.training.saver import Saver
from lamda.training.stages import StagedInputs
from lamda.training.stop_requests import STOP_EXIT, Attempt, Signals, StopRequests
from lamda.training.task import Benchmarks, Evaluation, Evaluator, OpenBenchmarks, Task
from lamda.training.trainer import Trainer
from lamda.training.watchdog import Guard, Watchdog, clear_heartbeats

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 20.0  # of a step without progress after a signal: a rank is dead, and a launcher kills after 30

TEXT_PHASES = ("corpus", "tokenizer", "text", "fetch", "evaluate", "finish")
"""Phases in which the main thread may wait for text, and so for a server."""


class _Opened(NamedTuple):
    """What a run trains with. checkpoint: the one that it resumes from, if it does. record: of this start."""

    engine: Engine
    checkpoint: Path | None
    state: RunState
    inputs: StagedInputs
    benchmarks: Benchmarks | None
    record: dict[str, Any]


@dataclass
class TrainingJob:
    """One start of a run: `run` opens everything, trains and shows the results.

    open_benchmarks: loads the tasks of `eval.tasks`. signals: entered; until training begins they end the process.
    """

    config: Config
    world: World
    task: Task
    framework: Framework
    open_benchmarks: OpenBenchmarks
    signals: Signals
    stages: tuple[Stage, ...] = field(init=False)
    directory: RunDirectory = field(init=False)
    lock: RunLock = field(init=False)
    attempt: Attempt = field(init=False)
    logger: RunLogger | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Raises UserError where the initial weights do not fit."""
        self.config = with_initial_weights(self.config)
        self.stages = plan_stages(self.config)
        self.directory = RunDirectory(Path(self.config.run.dir))

    def run(self) -> int:
        """Start or resume the run, and train until it is finished or asked to stop.

        Returns the exit code: 0 finished, 75 stopped with everything saved. Raises UserError and RunError.
        """
        directory, world = self.directory, self.world
        with ExitStack() as stack:
            stack.callback(distributed.stop)
            device = self.framework.start(self.config, world)
            if distributed.on_main(world, directory.create) and world.is_main_process:
                stack.push(directory.remove_if_rejected)
            stack.enter_context(run_log(directory.log, is_main=world.is_main_process))
            self.lock = directory.lock()
            distributed.on_main(world, lambda: stack.enter_context(self.lock) and None)
            distributed.on_main(world, lambda: clear_heartbeats(directory.heartbeats))
            self.attempt = Attempt(directory, world)
            self.signals.exit_on_signal(report=self.attempt.leave_by_signal)
            return self._train_with_status(device)

    def _train_with_status(self, device: torch.device) -> int:
        """Train, and record in status.json how it ended. Returns the exit code."""
        attempt, rank = self.attempt, self.world.rank
        try:
            attempt.begin()
            code = self._train(device)
            distributed.barrier()  # a launcher whose first rank has exited kills the others, which may still upload
            return code
        except (LostLockError, ReportedElsewhereError, FailedElsewhereError):
            raise  # another process, or rank 0, writes status.json
        except (UserError, UnreadableError) as error:
            if self.world.is_main_process and not attempt.is_training:
                attempt.reject(str(error))
            else:
                attempt.end("failed", reason=f"rank {rank}: {error}")
            raise
        except BaseException as error:
            other = None if isinstance(error, RunError) else attempt.exit_code()
            if other is not None and other in (0, STOP_EXIT):
                log.info("rank %d: another rank has ended the run", rank)
                return other
            attempt.end("failed", reason=f"rank {rank}: {type(error).__name__}: {error}")
            raise

    def _train(self, device: torch.device) -> int:
        config, directory, world = self.config, self.directory, self.world
        hang_timeout, margin = config.run.hang_timeout_seconds, config.run.stop_margin_seconds
        with ExitStack() as stack:
            watchdog = Watchdog(directory.heartbeats, world=world, seconds=hang_timeout, report=self._report_hang)
            stack.enter_context(watchdog)
            requests = StopRequests(directory.stop, world=world, margin=margin, signals=self.signals)
            requests.clear()
            # A GPU's collectives spin while they wait, so CPU time shows no progress there.
            with computing(watchdog.progress) if device.type == "cpu" else nullcontext():
                opened = self._open(device, watchdog)
            if opened is not None and world.is_main_process:
                self._note_start(opened)
            mirror = self._start_mirror(stack)
            if opened is None:
                watchdog.close()  # the last copies have a time limit of their own
                return 0
            steps = final_step(self.stages, opened.state)
            self.attempt.train(step=opened.state.step, steps=steps)
            self.signals.call_on_signal(lambda number: self._hurry(number, watchdog))
            logger = self._open_logger(opened, stack, steps=steps)
            stack.callback(watchdog.close)  # W&B's last uploads have a time limit of their own
            stack.callback(logger.profile.write)
            trainer = self._make_trainer(opened, logger, Guard(requests, watchdog, world=world), mirror)
            trainer.fit()
            return self._finish(trainer)

    def _open(self, device: torch.device, watchdog: Watchdog) -> _Opened | None:
        """Everything that training needs; None where the run is finished."""
        config, directory, world, progress = self.config, self.directory, self.world, watchdog.progress
        watchdog.mark("resume", step=0)
        distributed.on_main(world, lambda: commit.sweep(directory.checkpoints))
        origin = find_resume_point(config, directory, world, framework=self.framework.name, progress=progress)
        if origin.state.step >= final_step(self.stages, origin.state) and self._was_finished(origin.state.step):
            self.signals.exit_on_signal(exit_code=0)
            return None
        watchdog.mark("benchmarks", step=0)
        benchmarks = self.open_benchmarks(config, world)
        inputs = StagedInputs(self.stages, lambda stage: self._open_text(stage, watchdog, origin.state))
        form, on_wait = self.task.form(config), lambda: watchdog.progress_during(TEXT_PHASES)
        current = inputs.of(origin.state.stage)
        sources = validation(config, current.corpus)
        distributed.on_main(world, lambda: check_other_files(config, sources, form, on_wait=on_wait))
        state = origin.check_data(current.fingerprint, accepted=config.data.accept_changed or ())
        for stage in self.stages[state.stage :]:
            inputs.of(stage.number)  # now, not after weeks, something may be missing
        watchdog.mark("engine", step=0)
        domains = len(current.domains) + 1
        engine = self.framework.engine(config, world=world, device=device, domains=domains, progress=progress)
        watchdog.mark("load", step=0)
        if origin.path is not None:
            with reading(origin.path):
                engine.load_checkpoint(origin.path)
        elif config.model.weights is not None:
            engine.load_weights(Path(config.model.weights))
        else:
            engine.initialize_weights()
        watchdog.mark("start", step=0)
        record = describe_start(config, world, framework=self.framework.name)
        if origin.path is not None and world.is_main_process:
            report_start(record, origin.path, step=state.step + 1)
        return _Opened(engine, origin.path, state, inputs, benchmarks, record)

    def _note_start(self, opened: _Opened) -> None:
        """Record this start in the run directory, and its configuration."""
        with BestEffort(f"{self.directory.config} cannot be written"):
            replace_file(self.directory.config, to_yaml(self.config))
        checkpoint = None if opened.checkpoint is None else str(opened.checkpoint)
        self.directory.note_start({"step": opened.state.step, "checkpoint": checkpoint, **opened.record})

    def _open_text(self, stage: Stage, watchdog: Watchdog, resumed: RunState) -> Inputs:
        form = self.task.form(stage.config)
        return Inputs.open(
            stage.config,
            self.directory,
            self.world,
            form=form,
            open_text=lambda: open_text(
                stage.config,
                form=form,
                saved=resumed.fingerprint,
                first=self.stages[0].config,
                is_current=stage.number == resumed.stage,
                on_wait=lambda: watchdog.progress_during(TEXT_PHASES),
                progress=watchdog.progress,
            ),
            on_phase=lambda phase: watchdog.mark(phase, step=0),
            progress=watchdog.progress,
            on_wait=lambda: watchdog.progress_during(TEXT_PHASES),
        )

    def _was_finished(self, step: int) -> bool:
        """Whether the run had finished at this step before; then this is reported again."""

        def report_again() -> bool:
            previous = self.attempt.previous_status
            if previous.get("status") != "finished" or previous.get("step") != step:
                return False
            print(f"{self.directory.path}: finished, {step} steps; raise train.steps to continue")
            self.directory.restore_status(previous)
            return True

        return distributed.on_main(self.world, report_again)

    def _open_logger(self, opened: _Opened, stack: ExitStack, *, steps: int) -> RunLogger:
        """The logger, entered into `stack`; says how the run begins, and warns of unusual learning rates."""
        config, state, is_main = self.config, opened.state, self.world.is_main_process
        progress = stack.enter_context(TrainingProgress(done=state.step, steps=steps, visible=is_main))
        if opened.checkpoint is not None:
            progress.say(f"continuing from {opened.checkpoint}")
        for line in stage_lines(self.stages) if len(self.stages) > 1 else ():
            progress.say(line)
        if attention := opened.engine.manifest_entries().get("attention"):
            progress.say(f"attention: {attention} (model.attention {config.model.attention})")
        if opened.engine.is_compiled:
            progress.say("the first step compiles the model, a minute or so")
        self.logger = stack.enter_context(RunLogger(config, self.directory, state, progress, enabled=is_main))
        before = None if opened.checkpoint is None else settings_of(opened.checkpoint)
        warnings = [*remarks(self.stages, state, before=None if before is None else plan_stages(before))]
        if opened.checkpoint is not None:
            warnings += backend_change(opened.checkpoint, before, attention=attention)
        for warning in warnings if is_main else ():
            log.warning("%s", warning)
        return self.logger

    def _start_mirror(self, stack: ExitStack) -> MirrorThread | None:
        """Begin to copy checkpoints to `checkpoint.mirror`, on rank 0; the end of `stack` waits for the newest."""
        address, directory = self.config.checkpoint.mirror, self.directory
        if address is None or not self.world.is_main_process:
            return None
        mirror = MirrorThread(Mirror(address, directory.path), directory, keep=self.config.checkpoint, lock=self.lock)
        stack.callback(lambda: directory.amend_status(mirror=mirror.state))
        return stack.enter_context(mirror)

    def _make_trainer(self, opened: _Opened, logger: RunLogger, guard: Guard, mirror: MirrorThread | None) -> Trainer:
        directory, watchdog = self.directory, guard.watchdog
        tokenizer = opened.inputs.of(opened.state.stage).tokenizer
        state = replace(opened.state, wandb_id=logger.wandb_id)
        sources = validation(self.config, opened.inputs.of(opened.state.stage).corpus)

        def open_held_out(config: Config) -> Evaluation | None:
            config = with_rows_of(self.config, config)
            return self.task.open_evaluation(
                config, tokenizer, sources, on_wait=lambda: watchdog.progress_during(TEXT_PHASES)
            )

        evaluator = Evaluator(
            opened.engine,
            self.task,
            tokenizer,
            open_held_out,
            opened.benchmarks,
            logger,
            guard,
            batch_size=self.config.train.global_batch_size,
        )
        saver = Saver(
            directory.checkpoints,
            engine=opened.engine,
            tokenizer=directory.tokenizer,
            start=opened.record,
            require_lock=self.lock.require,
            sync_rows=directory.sync_metrics,
            note=directory.note_checkpoint,
            is_used=(lambda path: False) if mirror is None else mirror.is_copying,
            progress=watchdog.progress,
        )
        return Trainer(directory, opened.engine, opened.inputs, evaluator, saver, logger, guard, state)

    def _finish(self, trainer: Trainer) -> int:
        steps = {"step": trainer.state.step, "steps": final_step(self.stages, trainer.state)}
        stopped = trainer.stopped or show_results(trainer)
        if stopped is not None:
            rest = " and shows the results" if trainer.is_over else ""
            trainer.logger.progress.say(
                f"stopped after step {trainer.state.step} ({stopped}); all is saved, the same command continues{rest}"
            )
        trainer.guard.requests.clear()
        if self.world.is_main_process and stopped is None:
            self.attempt.end("finished", **steps)
        elif self.world.is_main_process:
            self.attempt.end("preempted", **steps, reason=stopped)
        code = 0 if stopped is None else STOP_EXIT
        self.signals.exit_on_signal(exit_code=code)
        return code

    def _hurry(self, number: signal.Signals, watchdog: Watchdog) -> None:
        watchdog.hurry(STOP_TIMEOUT_SECONDS, during=STEP_POINTS)
        if number == signal.SIGINT and self.world.is_main_process:
            with suppress(OSError):  # not `print`: the signal may interrupt one
                os.write(2, b"\nstopping after this step, with a checkpoint; press Ctrl-C again to exit immediately\n")

    def _report_hang(self, verdict: str) -> None:
        log.error("the run hangs and ends: %s; stacks are in %s", verdict, self.directory.path / "hang")
        self.attempt.end("failed", reason=verdict)
        if self.logger is not None:
            self.logger.hang(verdict)
