"""What a person sees at the terminal: output that survives a closed console, progress of long jobs, and tables.

Progress goes to standard error, so that standard output stays what a script reads. A terminal closes, the reader of a
pipe leaves or stops reading, the disk of a log file is full, an encoding lacks a character: none of these ends a run.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

from rich import box, filesize
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SHOWN = "lamda.console"  # logger of what the console shows, for a log file, which keeps what the console loses
WRITE_TIMEOUT_SECONDS = 10.0  # how long a console that takes no text, such as a paused terminal, may block the work
COUNT_TIMEOUT_SECONDS = 5.0  # for the thread that counts the total of a finished job, which a network may block
LINE_SECONDS = 10.0  # between two lines of progress where standard error is no terminal
BUSY_SHARE = 0.1  # processor seconds per second from which a process counts as computing; watching uses less

STYLES = {
    "running": "green", "starting": "green", "finished": "blue", "preempted": "yellow",
    "failed": "red", "died": "red", "damaged": "red",
}  # fmt: skip
NONE = "-"
LONG = 1e15  # from here on a figure is written with an exponent

_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # lines, tabs, and the joiners that emoji and Persian need
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories that a terminal obeys: escapes, direction overrides, ...

log = logging.getLogger(SHOWN)


def visible(text: str) -> str:
    """The text with control characters written out: ESC becomes \\x1b."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in _KEPT and unicodedata.category(character) in _HIDDEN
        else character
        for character in text
    )


def one_line(text: str) -> str:
    """The text as `visible` shows it, line breaks and tabs written out as well."""
    return visible(text).replace("\n", r"\n").replace("\t", r"\t")


def end_with_output() -> None:
    """Prepare a command whose result is its output: a failed write ends it, and `output_problem` has the reason.

    Characters that the encoding lacks are replaced; standard error raises nothing.
    """
    sys.stdout = _console(sys.stdout, "standard output", outlives=False)
    sys.stderr = _console(sys.stderr, "standard error", outlives=True)


def outlive() -> None:
    """Prepare a long-running process: text that its console does not take is lost, and the log warns."""
    sys.stdout = _console(sys.stdout, "standard output", outlives=True)
    sys.stderr = _console(sys.stderr, "standard error", outlives=True)


def output_problem() -> OSError | None:
    """Why standard output could not be written, or None; after a failure, further output is dropped."""
    file = _file_of(sys.stdout)
    return file.problem if isinstance(file, _ConsoleFile) else None


def _console(stream: TextIO | None, name: str, *, outlives: bool) -> TextIO:
    """The stream on a `_ConsoleFile`; a stream of another kind, such as a test's, unchanged."""
    if stream is None:  # closed before the process began
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - it stays open
    file = _file_of(stream)
    if type(stream) is not io.TextIOWrapper or not isinstance(file, io.FileIO):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_ConsoleFile(file.fileno(), name=name, outlives=outlives)),
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "backslashreplace" else "replace",
        line_buffering=True,
    )


def _file_of(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)  # PYTHONUNBUFFERED removes the buffer in between


class _ConsoleFile(io.FileIO):
    """The file of a console. With `outlives`, failed writes are dropped; otherwise the first one raises OSError."""

    def __init__(self, descriptor: int, *, name: str, outlives: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.problem: OSError | None = None
        self._name, self._outlives = name, outlives
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, data: ReadableBuffer) -> int:
        """Write all of the data, or drop it."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._write_some(left) :]
        except OSError as error:
            is_new, self.problem = self.problem is None, error
            if not self._outlives:
                self._outlives = True
                raise
            if is_new:
                self._warn(error)
        else:
            self.problem = None
        return size

    def _write_some(self, data: memoryview) -> int:
        """Write the beginning. Raises OSError, TimeoutError where the console does not take it in time."""
        seconds = WRITE_TIMEOUT_SECONDS if self.problem is None else 0.0
        if self._outlives and not self._poll.poll(1000 * seconds):
            raise TimeoutError(f"it has taken no text for {WRITE_TIMEOUT_SECONDS:g} s")
        return os.write(self.fileno(), data[: select.PIPE_BUF])  # PIPE_BUF bytes never block after `poll`

    def _warn(self, error: OSError) -> None:
        # Not `BestEffort`: its warning would go to the console too, in the middle of this write.
        if log.hasHandlers():
            log.warning("%s is lost (%s); this log has what it would show", self._name, error.strerror or error)


class Progress:
    """A bar with the time left at a terminal; elsewhere a line every ten seconds, none for a short job.

    total: in units of `advance`, or an iterable of that length: a thread counts it while the job runs, and no time is
    shown until it has. unit: name of what is counted.
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

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._counting:
            self._counting.join(COUNT_TIMEOUT_SECONDS)
        if self._bar:
            self._bar.stop()

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more as done."""
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
        """Count until the job ends; errors are left for the job itself to raise."""
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
    """Show the elapsed time of a long job without measurable progress."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Bar(TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as bar:
            bar.add_task(name, total=None)
            yield
        return
    began = time.monotonic()

    def show_time() -> None:
        so_far = timedelta(seconds=round(time.monotonic() - began))
        print(f"{name}: {so_far} so far", file=sys.stderr, flush=True)

    with _every(LINE_SECONDS, show_time):
        yield


@contextmanager
def computing(progress: Callable[[], object]) -> Iterator[None]:
    """Call `progress` about every second while the process computes.

    For a library's long silent call: one that waits for a disk, a network or a lock uses no processor time.
    """
    used = time.process_time()

    def look() -> None:
        nonlocal used
        before, used = used, time.process_time()
        if used - before >= BUSY_SHARE:
            progress()

    with _every(1.0, look):
        yield


@contextmanager
def _every(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Call `action` every `seconds` seconds, from a thread."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> None:
    """Print a table; columns in `left` hold text, the others right-aligned figures."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    console = Console()
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for place, name in enumerate(header):
            table.add_column(name, justify="left" if place in left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=STYLES.get(cell.split(",")[0], "")) for cell in row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        sized = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if place in left else cell.rjust(width) for place, (cell, width) in sized]
        print("  ".join(cells).rstrip())


def duration(seconds: float | None) -> str:
    """`41s`, `12m05s`, `3h20m`, `5d07h`: two units at most."""
    if seconds is None:
        return NONE
    whole = max(0, round(seconds))
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part_size:02}{part}"
    return f"{whole}s"


def size_of(count: float) -> str:
    """Bytes in decimal units: `28.4 GB`."""
    return filesize.decimal(round(count))


def of_total(step: int | None, steps: int | None) -> str:
    """`200/1000`, `200` where the total is unknown, `-` where the step is."""
    return NONE if step is None else str(step) if steps is None else f"{step}/{steps}"


def figure(row: dict[str, object] | None, name: str, form: str) -> str:
    """A metrics column in a format; `nan` where the value was not finite, `-` where it is missing."""
    if row is None or name not in row:
        return NONE
    value = row[name]
    if isinstance(value, int | float) and abs(value) >= LONG:
        form = ".3g"
    return "nan" if value is None else format(value, form)
