"""How far a long job is, on standard error, so that standard output stays what a script reads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 10.0
PATIENCE = 5.0
"""Seconds that a job which has ended waits for its counting: a network may keep it."""

COMPUTING = 0.1
"""Seconds of processor a second from which on a process computes; the threads that only watch take less."""


class Progress:
    """A bar with the time that is left at a terminal; elsewhere a line every ten seconds, none for a short job.

    total: how many there will be, in units of what `advance` is told, or things as many: they are counted in a
    thread while the job goes on, and until then no time is told. unit: what they are called.
    """

    def __init__(self, name: str, *, total: float | Iterable[object], unit: str) -> None:
        self._name, self._unit = name, unit
        self._total = total if isinstance(total, int | float) else None
        self._done, self._began = 0.0, time.monotonic()
        self._last_line = self._began
        self._ended = threading.Event()
        self._counting = (
            None if isinstance(total, int | float) else threading.Thread(target=self._count, args=[total], daemon=True)
        )
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task(name, total=self._total, figures=self._figures())

    def __enter__(self) -> Progress:
        if self._counting:
            self._counting.start()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._counting:
            self._counting.join(PATIENCE)
        if self._bar:
            self._bar.stop()

    def advance(self, amount: float = 1) -> None:
        """So many more are done."""
        self._done += amount
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._done, total=self._total, figures=self._figures())
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print(f"{self._name}: {self._figures()}{self._time_left(now)}", file=sys.stderr, flush=True)

    def _figures(self) -> str:
        if self._total is None:
            return f"{self._done:,.0f} {self._unit}"
        return f"{min(self._done, self._total):,.0f} of {self._total:,.0f} {self._unit}"

    def _time_left(self, now: float) -> str:
        if self._total is None:
            return ""
        left = (self._total - self._done) * (now - self._began) / self._done
        share = min(1.0, self._done / self._total)
        return f", {share:.0%}, ETA {timedelta(seconds=max(0, round(left)))}"

    def _count(self, things: Iterable[object]) -> None:
        """Their number, unless the job ends before; what is wrong with them the job itself will meet."""
        try:
            number = 0
            for _ in things:
                if self._ended.is_set():
                    return
                number += 1
        except Exception:
            return
        self._total = number


@contextmanager
def waiting(name: str) -> Iterator[None]:
    """A long job that cannot tell how far it is: how long it has taken so far."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Bar(TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as bar:
            bar.add_task(name, total=None)
            yield
        return
    ended = threading.Event()
    telling = threading.Thread(target=_tell_time, args=[name, ended])
    telling.start()
    try:
        yield
    finally:
        ended.set()
        telling.join()


def _tell_time(name: str, ended: threading.Event) -> None:
    began = time.monotonic()
    while not ended.wait(LINE_SECONDS):
        so_far = timedelta(seconds=round(time.monotonic() - began))
        print(f"{name}: {so_far} so far", file=sys.stderr, flush=True)


@contextmanager
def computing(progress: Callable[[], object], *, seconds: float = 1.0) -> Iterator[None]:
    """Calls `progress` about once in so many seconds while the process computes.

    For a library's long call that says nothing: one that waits for a disk, a network or a lock takes no processor.
    """
    ended = threading.Event()
    watching = threading.Thread(target=_watch_processor, args=[progress, seconds, ended], daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def _watch_processor(progress: Callable[[], object], seconds: float, ended: threading.Event) -> None:
    used = time.process_time()
    while not ended.wait(seconds):
        before, used = used, time.process_time()
        if used - before >= COMPUTING * seconds:
            progress()
