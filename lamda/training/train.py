"""A run from start to end: prepare, train, evaluate, show; what it trains for is handed in."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lamda import distributed
from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.distributed import World
from lamda.storage.lock import LostLockError, RunLock
from lamda.training import manifest
from lamda.training.framework import Engine, Framework
from lamda.training.loop import Run
from lamda.training.profile import Profile
from lamda.training.progress import TrainingProgress
from lamda.training.report import MainReport, SilentReport
from lamda.training.resume import choose_start, settings_of
from lamda.training.run_directory import RunDirectory
from lamda.training.run_log import run_log
from lamda.training.saving import Saver
from lamda.training.schedule import remarks, total_steps
from lamda.training.start import with_start
from lamda.training.state import RunState
from lamda.training.stopping import STOP_EXIT, StopRequests
from lamda.training.task import Benchmarks, OpenBenchmarks, Task
from lamda.training.text import Text
from lamda.training.watchdog import Watchdog

log = logging.getLogger(__name__)

STOP_PATIENCE = 20.0
"""Seconds without progress after a signal: then another rank is dead, and a launcher kills after 30."""


def train(config: Config, world: World, task: Task, framework: Framework, open_benchmarks: OpenBenchmarks) -> int:
    """Train `config` for `task` to its end, or until asked to stop, from wherever the run directory stands.

    open_benchmarks: loads the tasks of `eval.tasks`.
    Returns the exit code: 0 finished, 75 stopped with everything saved. Raises UserError and RunError.
    """
    config, directory = with_start(config), RunDirectory(Path(config.run.dir))
    with ExitStack() as stack:
        stack.callback(distributed.stop)
        device = framework.start(config, world)
        distributed.on_main(world, directory.create)
        stack.enter_context(run_log(directory.log, is_main=world.is_main))
        lock = directory.lock()
        distributed.on_main(world, lambda: stack.enter_context(lock) and None)
        distributed.on_main(world, lambda: manifest.sweep(directory.checkpoints))
        start = choose_start(config, directory, world, framework=framework.name)
        if start.state.step >= total_steps(config, start.state):
            if world.is_main:
                print(f"{directory.path}: finished, {start.state.step} steps; raise train.steps to go on")
            return 0
        benchmarks = open_benchmarks(config, world)
        text = Text.open(config, directory, world, form=task.form(config))
        state = start.check_data(text.fingerprint(config))
        began = time.time()
        try:
            engine = framework.engine(config, world=world, device=device, domains=len(text.domains) + 1)
            code = _run(engine, directory, lock, start.path, state, text, task, benchmarks)
            distributed.barrier()  # a launcher whose first rank has left kills the others, who may have rows to send
            return code
        except LostLockError:
            raise  # status.json is another process's by now
        except BaseException as error:
            _tell_failure(directory, f"rank {world.rank}: {type(error).__name__}: {error}", since=began)
            raise


def _tell_failure(directory: RunDirectory, reason: str, *, since: float) -> None:
    """Write why the run failed; any rank may. The first failure stays: the others follow from it."""
    told = directory.read_status()
    if told.get("status") != "failed" or told.get("time", 0.0) < since:
        directory.write_status("failed", reason=reason)


def _run(
    engine: Engine,
    directory: RunDirectory,
    lock: RunLock,
    checkpoint_path: Path | None,
    state: RunState,
    text: Text,
    task: Task,
    benchmarks: Benchmarks | None,
) -> int:
    config, world = engine.config, engine.world
    if checkpoint_path is not None:
        engine.load(checkpoint_path)
    elif config.model.weights is not None:
        engine.load_weights(Path(config.model.weights))
    if world.is_main:
        directory.config.write_text(to_yaml(config), "utf-8")
        directory.write_status("running", step=state.step, steps=total_steps(config, state))
    began = time.time()
    with ExitStack() as stack:
        progress = stack.enter_context(
            TrainingProgress(done=state.step, steps=total_steps(config, state), visible=world.is_main)
        )
        if checkpoint_path is not None:
            progress.say(f"going on from {checkpoint_path}")
        if engine.is_compiled:
            progress.say("the first step compiles the model, a minute or so")
        report = SilentReport()
        if world.is_main:
            report = stack.enter_context(MainReport(config, directory, state, progress))
        before = None if checkpoint_path is None else settings_of(checkpoint_path)
        for remark in remarks(config, state, before=before) if world.is_main else ():
            log.warning("%s", remark)
        watchdog = stack.enter_context(
            Watchdog(
                directory.heartbeats,
                world=world,
                seconds=config.run.hang_seconds,
                tell=lambda verdict: _tell_hang(directory, report, verdict, since=began),
            )
        )
        requests = stack.enter_context(
            StopRequests(
                directory.stop,
                world=world,
                margin=config.run.stop_before_end,
                hurry=lambda: watchdog.hurry(STOP_PATIENCE),
            )
        )
        run = Run(
            config=config,
            world=world,
            directory=directory,
            engine=engine,
            open_loader=lambda state: text.loader(config, world, state),
            held_out=task.held_out(config, text.tokenizer),
            benchmarks=benchmarks,
            tokenizer=text.tokenizer,
            domains=text.domains,
            saver=Saver(
                directory.checkpoints,
                engine=engine,
                tokenizer=directory.tokenizer,
                require_lock=lock.require,
                sync_rows=directory.sync_metrics,
            ),
            requests=requests,
            watchdog=watchdog,
            report=report,
            state=replace(state, wandb_id=report.wandb_id),
            profile=stack.enter_context(Profile(config.train.profile if world.is_main else None, directory.profile)),
        )
        run.train()
        return _leave(run, task, progress)


def _leave(run: Run, task: Task, progress: TrainingProgress) -> int:
    """Show what came out, tell how the run ended, and return its exit code."""
    stopped, steps = run.stopped, {"step": run.state.step, "steps": total_steps(run.config, run.state)}
    if stopped is None:
        _finish(run, task, progress)
    else:
        progress.say(f"stopped after step {run.state.step}, all of it saved: {stopped}; the same command goes on")
    run.requests.obeyed()
    if run.world.is_main and stopped is None:
        run.directory.write_status("finished", **steps)
    elif run.world.is_main:
        run.directory.write_status("preempted", **steps, reason=stopped)
    return 0 if stopped is None else STOP_EXIT


def _tell_hang(directory: RunDirectory, report: SilentReport, verdict: str, *, since: float) -> None:
    log.error("the run hangs and ends: %s; stacks are in %s", verdict, directory.path / "hang")
    _tell_failure(directory, verdict, since=since)
    report.hang(verdict)


def _finish(run: Run, task: Task, progress: TrainingProgress) -> None:
    """Show the last evaluation, a sample, and where everything is."""
    if run.scores is not None:
        for line in task.told(run):
            progress.say(line)
    for name, value in run.task_figures.items():
        progress.say(f"{name} {value:.4f}")
    sample = task.sample(run, run.tokenizer)
    if run.world.is_main:
        run.directory.samples.mkdir(exist_ok=True)
        file = run.directory.samples / f"step-{run.state.step:08d}.txt"
        file.write_text(sample, "utf-8")
        progress.say(f"a continuation, as it came:\n{sample}")
        progress.say(
            f"everything is in {run.directory.path}; to go on, run the same command with a larger train.steps or "
            f"train.tokens{_HIGHER_AGAIN.get(run.config.train.schedule, '')}"
        )


_HIGHER_AGAIN = dict.fromkeys(("cosine", "wsd"), " (the learning rate then rises again: docs/faq.md)")
