"""What a run reports while it trains: metrics.jsonl, W&B, progress for a person, a profile."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from torch.profiler import ProfilerActivity

from lamda.best_effort import BestEffort
from lamda.config.schema import Config
from lamda.console import SHOWN, Progress
from lamda.data.loader import StepBatch
from lamda.engines.protocol import Engine, PendingStep, StepMetrics
from lamda.model.counts import flops_per_token
from lamda.storage.metrics import MetricsFile, read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.wandb_logger import HANG_SECONDS, WandbMirror
from lamda.training.watchdog import HANG_EXIT

LINE_SECONDS = 10.0
OTHER = "other"  # stands for all domains whose names were not known at the start

Metrics = dict[str, Any]  # one step's metrics by name

log = logging.getLogger(__name__)
shown = logging.getLogger(SHOWN)


class RunLogger:
    """Reports a run; enabled on rank 0 only. A context manager. wandb_id: the run's id in W&B."""

    def __init__(
        self, config: Config, directory: RunDirectory, state: RunState, progress: TrainingProgress, *, enabled: bool
    ) -> None:
        self.wandb_id: str | None = None
        self.progress = progress
        self._file: MetricsFile | None = None
        self._wandb: WandbMirror | None = None
        self._best_loss, self._is_best = math.inf, False
        self.profile = Profile(config.train.profile if enabled else None, directory.profile)
        if enabled:
            self._file = MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=state.step)
            self._wandb = WandbMirror(config, folder=directory.path, run_id=state.wandb_id, step=state.step)
            self.wandb_id = self._wandb.run_id
            losses = [row["eval/loss"] for row in read_metrics(directory.metrics) if row.get("eval/loss") is not None]
            self._best_loss = min(losses, default=math.inf)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None or self._wandb is None:
            return
        self._file.__exit__(kind, value, trace)
        if isinstance(value, Exception):
            self._wandb.alert("run failed", f"{type(value).__name__}: {value}")
        self._wandb.finish(exit_code=int(value is not None))

    def log(self, metrics: Metrics) -> None:
        """Report a finished step."""
        if self._file is not None and self._wandb is not None:
            self._file.write(metrics)
            self._wandb.log(metrics)
            self.progress.show(metrics)
            self._note_best(metrics)

    def amend(self, step: int, metrics: Metrics) -> None:
        """Add metrics that the last step did not have yet."""
        if self._file is not None and self._wandb is not None:
            self._file.amend(step, metrics)
            self._wandb.amend(metrics)
            self._note_best(metrics)

    def warn(self, title: str, text: str) -> None:
        """Report something that a person should look at."""
        if self._wandb is not None:
            log.warning("%s", text)
            self._wandb.alert(title, text)

    def hang(self, verdict: str) -> None:
        """The run hangs, and its process is about to end."""
        if self._wandb is not None:
            self._wandb.alert("run hangs", verdict)
            self._wandb.finish(exit_code=HANG_EXIT, seconds=HANG_SECONDS)

    def checkpoint(self, path: Path) -> None:
        """A checkpoint is complete."""
        if self._wandb is not None:
            self.progress.say(f"saved {path}")
            self._wandb.checkpoint(path, best=self._is_best)
            self._is_best = False

    def rewind(self, step: int) -> None:
        """Discard the metrics after `step`."""
        if self._file is not None:
            self._file.rewind(step)

    def _note_best(self, metrics: Metrics) -> None:
        if (loss := metrics.get("eval/loss")) is not None:
            self._is_best = loss < self._best_loss
            self._best_loss = min(self._best_loss, loss)


class FetchedBatch(NamedTuple):
    """A batch of the loader, how long the loop waited for it, and when the wait began (`time.monotonic`)."""

    step: StepBatch
    wait_seconds: float
    began: float


@dataclass
class FinishedStep:
    """A step that the device may still be computing; reading its metrics waits for it.

    state: after the step, its target tokens counted. began: when its batch was fetched (`time.monotonic`).
    data_wait_seconds: waited for data. save_seconds: stalled by saves since the previous step. epochs: finished epochs
    by source. extra: metrics of evaluations after it. stage: its name, if the run has stages.
    """

    state: RunState
    pending: PendingStep
    lr: float
    began: float
    data_wait_seconds: float
    save_seconds: float
    epochs: Mapping[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    _ended: float | None = None

    def end(self, at: float) -> None:
        """The next step has begun `at`; while the device computes, the host is ahead, so that only this is known."""
        self._ended = self._ended or at

    def end_when_done(self) -> None:
        """Wait for the step, which ends now: something else than a step comes next."""
        if self._ended is None:
            _ = self.measured
            self.end(time.monotonic())

    @property
    def seconds(self) -> float:
        """From fetch to fetch, with everything between two steps but evaluations, saves and weight checks."""
        self.end_when_done()
        assert self._ended is not None
        return self._ended - self.began

    @cached_property
    def measured(self) -> StepMetrics:
        """Waits for the step."""
        return self.pending.wait()

    @property
    def num_tokens(self) -> int:
        """Target tokens of this step."""
        return sum(tokens for _, tokens in self.measured.by_domain())

    def metrics(self, engine: Engine, domains: tuple[str, ...]) -> Metrics:
        """This step's row of metrics.jsonl. domains: names in the order of their numbers."""
        config, length = engine.config, engine.config.data.sequence_length
        positions_per_second = config.train.global_batch_size * length / self.seconds
        per_token = flops_per_token(config.model, length, lora_rank=config.train.lora_rank)
        flops = positions_per_second * per_token / engine.num_devices
        return {
            "step": self.state.step,
            "loss": self.measured.loss(),
            "lr": self.lr,
            "grad_norm": self.measured.grad_norm,
            "tokens": self.state.tokens,
            "samples": self.state.samples,
            "tokens_per_second": self.num_tokens / self.seconds,
            "model_flops_per_second": flops,
            "mfu": flops / engine.peak_flops if engine.peak_flops else None,
            "step_seconds": self.seconds,
            "data_wait_seconds": self.data_wait_seconds,
            "save_seconds": self.save_seconds,
            "skipped_steps": self.state.step - self.state.updates,
            "rollbacks": self.state.rollbacks,
            "batch_digest": self.measured.batch_digest,
            **{f"epoch/{name}": epochs for name, epochs in self.epochs.items()},
            **({"stage": self.stage} if self.stage else {}),
            **self._by_domain(domains),
            **self.extra,
        }

    def _by_domain(self, domains: tuple[str, ...]) -> dict[str, float]:
        """`loss/<domain>` and `tokens/<domain>`, where there is more than one domain."""
        if len(domains) < 2:
            return {}
        nats: dict[str, float] = {}
        targets: dict[str, int] = {}
        for name, (loss, count) in zip((*domains, OTHER), self.measured.by_domain(), strict=True):
            if count:  # a domain of the corpus may be called `other` as well
                nats[name], targets[name] = nats.get(name, 0.0) + loss * count, targets.get(name, 0) + count
        losses = {f"loss/{name}": nats[name] / count for name, count in targets.items()}
        return losses | {f"tokens/{name}": count for name, count in targets.items()}


class TrainingProgress:
    """Step, loss, tokens per second and the time left: a bar at a terminal, lines elsewhere."""

    def __init__(self, *, done: int, steps: int, visible: bool) -> None:
        self._first, self._steps, self._visible = done, steps, visible
        self._began = time.monotonic()
        self._last_line = float("-inf")
        self._bar: Bar | None = None
        console = Console()
        if visible and console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task("train", total=steps, completed=done, figures="")

    def __enter__(self) -> TrainingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        """Show a finished step."""
        if not self._visible:
            return
        figures = self._figures(row)
        if self._bar:
            self._bar.update(self._task, completed=row["step"], figures=figures)
        if time.monotonic() - self._last_line >= LINE_SECONDS or row["step"] in (self._first + 1, self._steps):
            self._last_line = time.monotonic()
            line = f"step {row['step']}/{self._steps}  {figures}"
            shown.info("%s", line)
            if not self._bar:
                self._print(line)

    def say(self, text: str) -> None:
        """Print a line above the bar; it goes to the log, too."""
        if not self._visible:
            return
        shown.info("%s", text)
        self._print(text)

    def _print(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True, file=sys.stdout)

    @contextmanager
    def long_job(self, name: str, *, total: float | Iterable[object], unit: str) -> Iterator[Callable[[float], None]]:
        """A job between two steps, with its own bar or lines (see `Progress`); yields a callback for progress."""
        if self._bar:
            self._bar.stop()
        try:
            with Progress(name, total=total, unit=unit) if self._visible else nullcontext() as job:
                yield job.advance if job else lambda more: None
        finally:  # a task of `eval.tasks` may fail, and training continues
            if self._bar:
                self._bar.start()

    def _figures(self, row: dict[str, Any]) -> str:
        done = row["step"] - self._first
        left = (self._steps - row["step"]) * (time.monotonic() - self._began) / max(1, done)
        mfu = f"  MFU {row['mfu']:.1%}" if row.get("mfu") else ""
        eta = timedelta(seconds=round(left))
        return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s{mfu}  ETA {eta}"


class Profile:
    """Traces steps `steps[0]` to `steps[1]` (`train.profile`) for ui.perfetto.dev."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._running: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Called before step `step`."""
        if self._steps is not None and step == self._steps[0]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = torch.profiler.profile(activities=activities)
            self._running.start()

    def end(self, step: int) -> None:
        """Called after step `step`."""
        if self._steps is not None and step == self._steps[1]:
            self.write()

    def write(self) -> None:
        """Write the trace, also of a run that ends before its last step; once."""
        if self._running is None or self._steps is None:
            return
        first, last = self._steps
        running, self._running = self._running, None
        with BestEffort(f"{self._folder}: the trace cannot be written", errors=Exception):
            running.stop()
            self._folder.mkdir(exist_ok=True)
            running.export_chrome_trace(str(self._folder / f"steps-{first}-to-{last}.json.gz"))
