"""A run from start to end: prepare, train, evaluate, show; what it trains for is handed in."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lamda import distributed
from lamda.best_effort import BestEffort
from lamda.config.errors import RunError, UserError
from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.console import computing
from lamda.distributed import FailedElsewhereError, ReportedElsewhereError, World
from lamda.durable import replace_file
from lamda.engines.protocol import Engine, Framework
from lamda.storage import commit
from lamda.storage.lock import LostLockError, RunLock
from lamda.storage.reading import UnreadableError, reading
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.attempt import Attempt
from lamda.training.fault_injection import STEP_POINTS
from lamda.training.inputs import Text
from lamda.training.loggers import MainReport, SilentReport
from lamda.training.lr_schedule import remarks, total_steps
from lamda.training.profile import Profile
from lamda.training.progress import TrainingProgress
from lamda.training.resume import choose_start, settings_of
from lamda.training.run_log import run_log
from lamda.training.saver import Saver
from lamda.training.start import with_start
from lamda.training.stop_requests import STOP_EXIT, Signals, StopRequests
from lamda.training.task import Benchmarks, OpenBenchmarks, Task
from lamda.training.trainer import Run
from lamda.training.watchdog import Watchdog, clear_heartbeats
from lamda.training.window_log import WindowLog

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

STOP_PATIENCE = 20.0
"""Seconds without progress of a step after a signal: then another rank is dead, and a launcher kills after 30."""

TEXT_PHASES = ("corpus", "tokenizer", "text", "fetch", "evaluate", "finish")
"""Phases in which the main thread may wait for text, and so for a server."""


def train(
    config: Config,
    world: World,
    task: Task,
    framework: Framework,
    open_benchmarks: OpenBenchmarks,
    signals: Signals,
) -> int:
    """Train `config` for `task` to its end, or until asked to stop, from wherever the run directory stands.

    open_benchmarks: loads the tasks of `eval.tasks`. signals: entered, and ending the process so far.
    Returns the exit code: 0 finished, 75 stopped with everything saved. Raises UserError and RunError.
    """
    config, directory = with_start(config), RunDirectory(Path(config.run.dir))
    with ExitStack() as stack:
        stack.callback(distributed.stop)
        device = framework.start(config, world)
        if distributed.on_main(world, directory.create) and world.is_main:
            stack.push(directory.forget_refused)
        stack.enter_context(run_log(directory.log, is_main=world.is_main))
        lock = directory.lock()
        distributed.on_main(world, lambda: stack.enter_context(lock) and None)
        distributed.on_main(world, lambda: clear_heartbeats(directory.heartbeats))
        attempt = Attempt(directory, world)
        signals.leave_at_once(report=attempt.leave_by_signal())
        try:
            attempt.begin()
            start = _Start(config, world, task, framework, open_benchmarks, signals, directory, lock, attempt)
            code = start.run(device)
            distributed.barrier()  # a launcher whose first rank has left kills the others, who may have rows to send
            return code
        except (LostLockError, ReportedElsewhereError, FailedElsewhereError):
            raise  # status.json is another process's by now, or rank 0 writes it
        except (UserError, UnreadableError) as error:
            if world.is_main and not attempt.is_training:
                attempt.refuse(str(error))
            else:
                attempt.end("failed", reason=f"rank {world.rank}: {error}")
            raise
        except BaseException as error:
            if not isinstance(error, RunError) and (code := attempt.exit_code()) in (0, STOP_EXIT):
                log.info("rank %d: another rank has ended the run", world.rank)
                return code
            attempt.end("failed", reason=f"rank {world.rank}: {type(error).__name__}: {error}")
            raise


@dataclass
class _Start:
    """A start of a run whose directory is this process's own: everything is opened, then it trains."""

    config: Config
    world: World
    task: Task
    framework: Framework
    open_benchmarks: OpenBenchmarks
    signals: Signals
    directory: RunDirectory
    lock: RunLock
    attempt: Attempt
    report: SilentReport = field(default_factory=SilentReport)

    def run(self, device: torch.device) -> int:
        """The exit code. Raises UserError and RunError."""
        config, directory, world = self.config, self.directory, self.world
        with Watchdog(
            directory.heartbeats, world=world, seconds=config.run.hang_timeout_seconds, tell=self._tell_hang
        ) as dog:
            requests = StopRequests(
                directory.stop, world=world, margin=config.run.stop_margin_seconds, signals=self.signals
            )
            requests.discard_old()

            def at(phase: str) -> None:
                dog.mark(phase, step=0)

            # A GPU's collectives spin while they wait: there a busy processor is no sign of progress.
            with computing(dog.progress) if device.type == "cpu" else nullcontext():
                at("resume")
                distributed.on_main(world, lambda: commit.sweep(directory.checkpoints))
                start = choose_start(config, directory, world, framework=self.framework.name, progress=dog.progress)
                if start.state.step >= total_steps(config, start.state) and self._was_finished(start.state.step):
                    self.signals.leave_at_once(exit_code=0)
                    return 0
                at("benchmarks")
                benchmarks = self.open_benchmarks(config, world)
                text = Text.open(
                    config,
                    directory,
                    world,
                    form=self.task.form(config),
                    at=at,
                    progress=dog.progress,
                    on_wait=lambda: dog.progress_during(TEXT_PHASES),
                )
                state = start.check_data(text.fingerprint, accepted=config.data.accept_changed or ())
                at("engine")
                engine = self.framework.engine(
                    config, world=world, device=device, domains=len(text.domains) + 1, progress=dog.progress
                )
                at("load")
                if start.path is not None:
                    with reading(start.path):
                        engine.load(start.path)
                elif config.model.weights is not None:
                    engine.load_weights(Path(config.model.weights))
                at("start")
            return self._train(engine, start.path, state, text, benchmarks, dog, requests)

    def _was_finished(self, step: int) -> bool:
        """Whether the run had come to its end, and said so; that is said again."""

        def say_again() -> bool:
            found = self.attempt.found
            if found.get("status") != "finished" or found.get("step") != step:
                return False
            print(f"{self.directory.path}: finished, {step} steps; raise train.steps to go on")
            self.directory.restore_status(found)
            return True

        return distributed.on_main(self.world, say_again)

    def _train(
        self,
        engine: Engine,
        checkpoint_path: Path | None,
        state: RunState,
        text: Text,
        benchmarks: Benchmarks | None,
        watchdog: Watchdog,
        requests: StopRequests,
    ) -> int:
        config, world, directory = self.config, self.world, self.directory
        if world.is_main:
            with BestEffort(f"{directory.config} cannot be written"):
                replace_file(directory.config, to_yaml(config))
        steps = total_steps(config, state)
        self.attempt.train(step=state.step, steps=steps)
        self.signals.note(lambda number: self._hurry(number, watchdog))
        with ExitStack() as stack:
            progress = stack.enter_context(TrainingProgress(done=state.step, steps=steps, visible=world.is_main))
            if checkpoint_path is not None:
                progress.say(f"going on from {checkpoint_path}")
            if engine.is_compiled:
                progress.say("the first step compiles the model, a minute or so")
            if world.is_main:
                self.report = stack.enter_context(MainReport(config, directory, state, progress))
            before = None if checkpoint_path is None else settings_of(checkpoint_path)
            for remark in remarks(config, state, before=before) if world.is_main else ():
                log.warning("%s", remark)
            stack.callback(watchdog.close)  # what W&B is still to get has a time limit of its own
            windows = WindowLog(directory.order)
            if world.is_main:
                windows.begin(state.order)
            run = Run(
                config=config,
                world=world,
                directory=directory,
                engine=engine,
                open_loader=lambda state: text.loader(
                    config, world, state, on_window=windows.add if world.is_main else lambda source, order: None
                ),
                held_out=self.task.held_out(
                    config, text.tokenizer, on_wait=lambda: watchdog.progress_during(TEXT_PHASES)
                ),
                benchmarks=benchmarks,
                tokenizer=text.tokenizer,
                domains=text.domains,
                saver=Saver(
                    directory.checkpoints,
                    engine=engine,
                    tokenizer=directory.tokenizer,
                    require_lock=self.lock.require,
                    sync_rows=directory.sync_metrics,
                    note=directory.note_checkpoint,
                    progress=watchdog.progress,
                ),
                requests=requests,
                watchdog=watchdog,
                report=self.report,
                state=replace(state, wandb_id=self.report.wandb_id),
                profile=stack.enter_context(
                    Profile(config.train.profile if world.is_main else None, directory.profile)
                ),
            )
            run.train()
            return self._leave(run, progress)

    def _leave(self, run: Run, progress: TrainingProgress) -> int:
        """Show what came out, tell how the run ended, and return its exit code."""
        steps = {"step": run.state.step, "steps": total_steps(run.config, run.state)}
        stopped = run.stopped or _finish(run, self.task, progress)
        if stopped is not None:
            rest = "; what is left to show is made then" if run.is_over else ""
            progress.say(
                f"stopped after step {run.state.step}, all of it saved: {stopped}; the same command goes on{rest}"
            )
        run.requests.obeyed()
        if run.world.is_main and stopped is None:
            self.attempt.end("finished", **steps)
        elif run.world.is_main:
            self.attempt.end("preempted", **steps, reason=stopped)
        code = 0 if stopped is None else STOP_EXIT
        self.signals.leave_at_once(exit_code=code)
        return code

    def _hurry(self, number: signal.Signals, watchdog: Watchdog) -> None:
        watchdog.hurry(STOP_PATIENCE, during=STEP_POINTS)
        if number == signal.SIGINT and self.world.is_main:
            with suppress(OSError):  # not `print`: a signal may come in the middle of one
                os.write(2, b"\nstopping after this step, with a checkpoint; press Ctrl-C again to leave at once\n")

    def _tell_hang(self, verdict: str) -> None:
        log.error("the run hangs and ends: %s; stacks are in %s", verdict, self.directory.path / "hang")
        self.attempt.end("failed", reason=verdict)
        self.report.hang(verdict)


def _finish(run: Run, task: Task, progress: TrainingProgress) -> str | None:
    """Show the last evaluation, a sample, and where everything is; why it was left before, if it was asked to stop."""
    run.begin_finish()
    then = "the run is complete without it"
    with BestEffort("the last table cannot be made", errors=Exception, then=then):
        for line in task.told(run) if run.scores is not None else ():
            progress.say(line)
        for name, value in (run.recorded_figures() if run.scores is None else run.task_figures).items():
            progress.say(f"{name} {value:.4f}")
    if (reason := run.agreed_stop()) is not None:
        return reason
    sample = task.sample(run, run.tokenizer)  # work of all ranks: where one fails alone, the others would wait for it
    if run.world.is_main:
        progress.say(f"a continuation, as it came:\n{sample}")
        file = run.directory.samples / f"step-{run.state.step:08d}.txt"
        with BestEffort(f"{file} cannot be written", then=then):
            file.parent.mkdir(exist_ok=True)
            replace_file(file, sample)
        progress.say(
            f"everything is in {run.directory.path}; to go on, run the same command with a larger train.steps or "
            f"train.tokens{_HIGHER_AGAIN.get(run.config.train.schedule, '')}"
        )
    return None


_HIGHER_AGAIN = dict.fromkeys(("cosine", "wsd"), " (the learning rate then rises again: docs/faq.md)")
