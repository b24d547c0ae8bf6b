"""What a person sees of a run: a bar at a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from lamda.console import SHOWN, Progress

LINE_SECONDS = 10.0

log = logging.getLogger(SHOWN)


class TrainingProgress:
    """Step, loss, tokens a second and the time that is left."""

    def __init__(self, *, done: int, steps: int, visible: bool) -> None:
        self._first, self._steps, self._visible = done, steps, visible
        self._began = time.monotonic()
        self._last_line = float("-inf")
        self._bar: Bar | None = None
        console = Console()
        if visible and console.is_terminal:
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=done, figures="")

    def __enter__(self) -> TrainingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        """Bring a finished step to the eye."""
        if not self._visible:
            return
        figures = self._figures(row)
        if self._bar:
            self._bar.update(self._task, completed=row["step"], figures=figures)
        if time.monotonic() - self._last_line >= LINE_SECONDS or row["step"] in (self._first + 1, self._steps):
            self._last_line = time.monotonic()
            line = f"step {row['step']}/{self._steps}  {figures}"
            log.info("%s", line)
            if not self._bar:
                self._print(line)

    def say(self, text: str) -> None:
        """A line of its own, above the bar; in the log, too."""
        if not self._visible:
            return
        log.info("%s", text)
        self._print(text)

    def _print(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True, file=sys.stdout)

    @contextmanager
    def long_job(self, name: str, *, total: float | Iterable[object], unit: str) -> Iterator[Callable[[float], None]]:
        """A job between two steps, with its own bar or lines (see `Progress`); gives what is told how many are done."""
        if self._bar:
            self._bar.stop()
        try:
            with Progress(name, total=total, unit=unit) if self._visible else nullcontext() as shown:
                yield shown.advance if shown else lambda more: None
        finally:  # a task of `eval.tasks` may fail, and training goes on
            if self._bar:
                self._bar.start()

    def _figures(self, row: dict[str, Any]) -> str:
        done = row["step"] - self._first
        left = (self._steps - row["step"]) * (time.monotonic() - self._began) / max(1, done)
        mfu = f"  MFU {row['mfu']:.1%}" if row.get("mfu") else ""
        eta = timedelta(seconds=round(left))
        return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s{mfu}  ETA {eta}"
