"""Requests to stop: a signal, RUN/STOP, the scheduler's time limit, a launcher that is gone.

A request is only noted here. The ranks agree on it with the next step's figures, so that all of them
save and leave after the same step, whichever of them was asked.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

from lamda.distributed import Launcher, World

STOP_EXIT = 75
"""Exit code of a run that stopped when asked to and can go on (EX_TEMPFAIL)."""
BY_FILE = "STOP was there"
"""Reason of a stop that somebody asked for by `touch RUN/STOP`."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequests:
    """Listens while it is entered; `reason` tells why this rank would stop.

    margin: seconds before the scheduler's limit at which to stop. hurry: called, from another thread, as
    soon as a signal came, even while the main thread waits for other ranks.
    """

    def __init__(self, file: Path, *, world: World, margin: float, hurry: Callable[[], None]) -> None:
        self._file, self._world, self._margin, self._hurry = file, world, margin, hurry
        self._launcher = Launcher.of(world)
        self._signal: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        if self._world.is_main:
            self._file.unlink(missing_ok=True)  # it was meant for a run that has ended
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._heard, self._woken = socket.socketpair()
        self._woken.setblocking(False)  # noqa: FBT003 - the name is the library's
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        self._woken.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> str | None:
        """Why the run should stop, as far as this rank knows."""
        if self._signal is not None:
            return self._signal
        if self._world.is_main and self._file.exists():
            return BY_FILE
        if self._world.ends_at is not None and time.time() > self._world.ends_at - self._margin:
            return "the scheduler's time limit is near"
        if self._launcher.is_gone():
            return "the launcher is gone"
        return None

    def obeyed(self) -> None:
        """The run has saved and leaves."""
        if self._world.is_main:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _listen(self) -> None:
        """The interpreter's own handlers wait until the main thread comes back from a collective; this one does not."""
        while numbers := self._heard.recv(1):
            if numbers[0] in SIGNALS:
                self._hurry()
        self._heard.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT and self._world.is_main:
            os.write(2, b"\nstopping after this step, with a checkpoint; press Ctrl-C again to leave at once\n")
