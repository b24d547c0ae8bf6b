"""How a run stops: requests (a signal, RUN/STOP, a time limit, a launcher that is gone), exit codes, status.json.

During training a request is only recorded here. The ranks agree on it with the next step's metrics, so that all of them
save and exit after the same step, whichever rank was asked. Before training there is nothing to save, and afterwards
everything is saved: then a signal ends the process immediately.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

from lamda.best_effort import BestEffort
from lamda.distributed import Launcher, World, on_main
from lamda.storage.run_directory import STARTING, RunDirectory

STOP_EXIT = 75  # exit code of a run that stopped on request and can be continued (EX_TEMPFAIL)
BY_FILE = "STOP was there"  # reason of a stop requested by `touch RUN/STOP`
INTERRUPT_EXIT = 130  # exit code of a run that Ctrl-C ended before its first step, or for the second time
ENDS = {"finished": 0, "preempted": STOP_EXIT, "failed": 1}  # how a start can end, and its exit code
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def heeded_signals() -> tuple[signal.Signals, ...]:
    """`SIGNALS`, without the SIGHUP of a process that `nohup` started: it must outlive its terminal."""
    return tuple(number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN)


@contextmanager
def handling_signals(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Every signal that asks to stop calls `handle`, for commands that have started a run."""
    before = {number: signal.signal(number, handle) for number in heeded_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """Receives the signals that ask to stop, while it is entered. requested: name of the one received since `note`."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._react: Callable[[signal.Signals], None] = lambda number: _leave(number, exit_code=None)

    def __enter__(self) -> Signals:
        self._heard, self._woken = socket.socketpair()
        self._woken.setblocking(False)  # noqa: FBT003 - the name is the library's
        self._before = {number: signal.signal(number, self._handle) for number in heeded_signals()}
        self._wakeup_before = signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._woken.close()

    def exit_on_signal(
        self, *, exit_code: int | None = None, report: Callable[[str], None] = lambda name: None
    ) -> None:
        """From now on a signal ends the process: there is nothing (left) to save.

        exit_code: by default that of a stop or, for Ctrl-C, of an interrupt. report: called first, with its name.
        """
        self._react = lambda number: _leave(number, exit_code=exit_code, report=report)

    def call_on_signal(self, react: Callable[[signal.Signals], None]) -> None:
        """From now on a signal is recorded. react: called from another thread, even while the main thread waits."""
        self._react = react

    def _listen(self) -> None:
        """Python's own handlers run only once the main thread returns from a collective; this thread does not wait."""
        with self._heard:
            while numbers := self._heard.recv(1):
                if numbers[0] in self._before:
                    self._react(signal.Signals(numbers[0]))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


def _leave(number: signal.Signals, *, exit_code: int | None, report: Callable[[str], None] = lambda name: None) -> None:
    if exit_code is None:
        exit_code = INTERRUPT_EXIT if number == signal.SIGINT else STOP_EXIT
    try:
        report(number.name)
    finally:
        os._exit(exit_code)


class StopRequests:
    """Why this rank would stop. margin: seconds before the scheduler's time limit at which to stop."""

    def __init__(self, file: Path, *, world: World, margin: float, signals: Signals) -> None:
        self._file, self._world, self._margin, self._signals = file, world, margin, signals
        self._launcher = Launcher.of(world)
        self._looking = BestEffort(f"{file} cannot be checked")

    def clear(self) -> None:
        """Delete RUN/STOP, which was meant for a run that has ended, or which this run has obeyed."""
        if self._world.is_main_process:
            with self._looking:
                self._file.unlink(missing_ok=True)

    def reason(self) -> str | None:
        """Why the run should stop, as far as this rank knows."""
        if self._signals.requested is not None:
            return self._signals.requested
        if self._world.is_main_process:
            with self._looking:
                if self._file.exists():
                    return BY_FILE
        if self._world.ends_at is not None and time.time() > self._world.ends_at - self._margin:
            return "the scheduler's time limit is near"
        if self._launcher.is_gone():
            return "the launcher is gone"
        return None


class Attempt:
    """One start of a run in status.json. Any rank may record how it ended; the first record counts.

    previous_status: the content of status.json before this start. is_training: whether training has begun.
    """

    def __init__(self, directory: RunDirectory, world: World) -> None:
        self.is_training = False
        self._directory, self._world = directory, world
        self.previous_status: dict[str, Any]
        self._began, self.previous_status = on_main(world, lambda: (time.time(), directory.read_status()))

    def begin(self) -> None:
        """Record that the run is starting, unless a rank has already ended it. Every rank calls it."""

        def write() -> None:
            if self.exit_code() is None:
                self._directory.write_status("running", phase=STARTING)

        on_main(self._world, write)

    def train(self, *, step: int, steps: int) -> None:
        """Record that training begins after `step`."""
        self.is_training = True
        if self._world.is_main_process:
            self._directory.write_status("running", step=step, steps=steps)

    def end(self, status: Literal["finished", "preempted", "failed"], **details: Any) -> None:
        """Record how it ended, unless a rank has already done so."""
        if self.exit_code() is None:
            self._directory.write_status(status, **details)

    def reject(self, reason: str) -> None:
        """A rejected start changes nothing: restore the previous status."""
        if self._world.is_main_process:
            if self.previous_status:
                self._directory.restore_status(self.previous_status)
            else:
                self._directory.write_status("failed", reason=reason)

    def exit_code(self) -> int | None:
        """The exit code of the end that some rank has recorded; None where none has."""
        status = self._directory.read_status()
        return ENDS.get(status.get("status", "")) if status.get("time", 0.0) >= self._began else None

    def leave_by_signal(self, name: str) -> None:
        """Record that a signal ended the start."""
        self.end("preempted", reason=f"{name} before the first step: nothing has changed")
