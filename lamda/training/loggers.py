"""Where a run tells what it does: metrics.jsonl, the mirror in W&B, the log and the person who watches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

from lamda.config.schema import Config
from lamda.storage.metrics import MetricsFile, read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.progress import TrainingProgress
from lamda.training.row import Row
from lamda.training.wandb_logger import HANG_SECONDS, WandbMirror
from lamda.training.watchdog import HANG_EXIT

log = logging.getLogger(__name__)


class SilentReport:
    """The ranks that do not speak."""

    wandb_id: str | None = None

    def row(self, row: Row) -> None:
        """A finished step's metrics."""

    def amend(self, step: int, figures: Row) -> None:
        """Figures that the row of the last step did not have yet."""

    def say(self, text: str) -> None:
        """A line for the person who watches."""

    def warn(self, title: str, text: str) -> None:
        """Something that a person should look at."""

    def hang(self, verdict: str) -> None:
        """The run hangs, and its process ends right after this."""

    def saved(self, path: Path) -> None:
        """A checkpoint is complete."""

    def long_job(
        self, name: str, *, total: float | Iterable[object], unit: str
    ) -> AbstractContextManager[Callable[[float], None]]:
        """A job between two steps; gives what is told how many more are done. See `TrainingProgress.long_job`."""
        del name, total, unit
        return nullcontext(lambda more: None)

    def rewind(self, step: int) -> None:
        """The rows after `step` are void."""


class MainReport(SilentReport):
    """Rank 0, which speaks for all. Use it as a context."""

    def __init__(self, config: Config, directory: RunDirectory, state: RunState, progress: TrainingProgress) -> None:
        self._progress = progress
        self._file = MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=state.step)
        self._mirror = WandbMirror(config, folder=directory.path, run_id=state.wandb_id, step=state.step)
        self.wandb_id = self._mirror.run_id
        losses = [row["eval/loss"] for row in read_metrics(directory.metrics) if row.get("eval/loss") is not None]
        self._best = min(losses, default=math.inf)
        self._is_best = False

    def __enter__(self) -> MainReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, value, trace)
        if isinstance(value, Exception):
            self._mirror.alert("run failed", f"{type(value).__name__}: {value}")
        self._mirror.finish(exit_code=int(value is not None))

    def row(self, row: Row) -> None:  # noqa: D102 - the methods mean what they mean above
        self._file.write(row)
        self._mirror.log(row)
        self._progress.show(row)
        self._judge(row)

    def amend(self, step: int, figures: Row) -> None:  # noqa: D102
        self._file.amend(step, figures)
        self._mirror.amend(figures)
        self._judge(figures)

    def say(self, text: str) -> None:  # noqa: D102
        self._progress.say(text)

    def warn(self, title: str, text: str) -> None:  # noqa: D102
        log.warning("%s", text)
        self._mirror.alert(title, text)

    def hang(self, verdict: str) -> None:  # noqa: D102
        self._mirror.alert("run hangs", verdict)
        self._mirror.finish(exit_code=HANG_EXIT, seconds=HANG_SECONDS)

    def saved(self, path: Path) -> None:  # noqa: D102
        self._progress.say(f"saved {path}")
        self._mirror.checkpoint(path, best=self._is_best)
        self._is_best = False

    def long_job(  # noqa: D102
        self, name: str, *, total: float | Iterable[object], unit: str
    ) -> AbstractContextManager[Callable[[float], None]]:
        return self._progress.long_job(name, total=total, unit=unit)

    def rewind(self, step: int) -> None:  # noqa: D102
        self._file.rewind(step)

    def _judge(self, row: Row) -> None:
        """Whether it is the best so far."""
        if (loss := row.get("eval/loss")) is not None:
            self._is_best = loss < self._best
            self._best = min(self._best, loss)
