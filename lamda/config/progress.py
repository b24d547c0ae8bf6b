"""How far a long job is, on standard error, so that standard output stays what a script reads."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 10.0


class Progress:
    """A bar with the time that is left at a terminal; elsewhere a line every ten seconds, none for a short job.

    total: how many there will be, in units of what `advance` is told; unit: what they are called.
    """

    def __init__(self, name: str, *, total: float, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done, self._began = 0.0, time.monotonic()
        self._last_line = self._began
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            figures = TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]}")
            columns = (TextColumn("{task.description}"), BarColumn(), figures, TimeRemainingColumn())
            self._bar = Bar(*columns, console=console, transient=True)
            self._task = self._bar.add_task(name, total=total, unit=unit)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, amount: float = 1) -> None:
        """So many more are done."""
        self._done += amount
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = (self._total - self._done) * (now - self._began) / self._done
            share = f"{self._done:,.0f} of {self._total:,.0f} {self._unit}, {self._done / self._total:.0%}"
            print(f"{self._name}: {share}, ETA {timedelta(seconds=max(0, round(left)))}", file=sys.stderr, flush=True)
