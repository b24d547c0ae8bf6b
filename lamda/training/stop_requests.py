"""Requests to stop: a signal, RUN/STOP, the scheduler's time limit, a launcher that is gone.

While the run trains, a request is only noted here. The ranks agree on it with the next step's figures, so that all of
them save and leave after the same step, whichever of them was asked. Before, there is nothing to save, and
afterwards everything is saved: then a signal ends the process right away.
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
from typing import Any

from lamda.best_effort import BestEffort
from lamda.distributed import Launcher, World

STOP_EXIT = 75
"""Exit code of a run that stopped when asked to and can go on (EX_TEMPFAIL)."""
BY_FILE = "STOP was there"
"""Reason of a stop that somebody asked for by `touch RUN/STOP`."""
INTERRUPT_EXIT = 130
"""Exit code of a run that Ctrl-C ended before its first step, or for the second time."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def heeded_signals() -> tuple[signal.Signals, ...]:
    """`SIGNALS`, without the SIGHUP of a process that `nohup` started: it must outlive its terminal."""
    return tuple(number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN)


@contextmanager
def interrupting_signals() -> Iterator[None]:
    """Every signal that asks to stop is a KeyboardInterrupt: for a command that must end what it has started."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in heeded_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """Hears the signals that ask to stop, from its entering to its end, which are the process's own.

    requested: the name of the signal that came, since `note`.
    """

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

    def leave_at_once(self, *, exit_code: int | None = None, report: Callable[[str], None] = lambda name: None) -> None:
        """From now on a signal ends the process: there is nothing to save, or nothing left to save.

        exit_code: by default that of a stop or, for Ctrl-C, of an interrupt. report: called first with the name.
        """
        self._react = lambda number: _leave(number, exit_code=exit_code, report=report)

    def note(self, react: Callable[[signal.Signals], None]) -> None:
        """From now on a signal is noted. react: called from another thread, even while the main thread waits."""
        self._react = react

    def _listen(self) -> None:
        """The interpreter's own handlers wait until the main thread comes back from a collective; this one does not."""
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
    """Why this rank would stop; RUN/STOP counts while this is entered.

    margin: seconds before the scheduler's limit at which to stop.
    """

    def __init__(self, file: Path, *, world: World, margin: float, signals: Signals) -> None:
        self._file, self._world, self._margin, self._signals = file, world, margin, signals
        self._launcher = Launcher.of(world)
        self._looking = BestEffort(f"{file} cannot be looked for")

    def discard_old(self) -> None:
        """Forget a RUN/STOP that was meant for a run that has ended."""
        if self._world.is_main:
            with self._looking:
                self._file.unlink(missing_ok=True)

    def reason(self) -> str | None:
        """Why the run should stop, as far as this rank knows."""
        if self._signals.requested is not None:
            return self._signals.requested
        if self._world.is_main:
            with self._looking:
                if self._file.exists():
                    return BY_FILE
        if self._world.ends_at is not None and time.time() > self._world.ends_at - self._margin:
            return "the scheduler's time limit is near"
        if self._launcher.is_gone():
            return "the launcher is gone"
        return None

    def obeyed(self) -> None:
        """The run has saved and leaves."""
        if self._world.is_main:
            with self._looking:
                self._file.unlink(missing_ok=True)
