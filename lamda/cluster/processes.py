"""A command that trains, and all that it starts: found, asked to stop and ended, wherever its launcher puts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lamda.config.errors import UserError
from lamda.storage.lock import Owner
from lamda.storage.run_directory import RunDirectory

MARK = "LAMDA_LAUNCH"
"""Environment variable that a launch's processes inherit, with a value of its own."""
KILL_SECONDS = 60
POLL_SECONDS = 0.05
SLACK_SECONDS = 1.0
"""Precision of comparing the times of files and of processes."""


class Launch:
    """A command in a session of its own, started at once. Raises UserError where it cannot be.

    run: the run directory, whose lock and heartbeats name the ranks. log: takes what the command prints.
    """

    def __init__(self, command: Sequence[str], *, run: Path, log: Path | None = None) -> None:
        identity = uuid.uuid4().hex
        self._mark = f"{MARK}={identity}".encode()
        self._run = run
        self._began = time.time()
        stream = log.open("ab") if log else None
        try:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, MARK: identity},
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from error
        finally:
            if stream:
                stream.close()

    def poll(self) -> int | None:
        """The command's exit code (negative: a signal), None while it runs; its ranks may run on without it."""
        return self._process.poll()

    def ask(self, number: int) -> None:
        """Pass a signal on: to the ranks, or where none is known yet to the command's process group.

        DeepSpeed's launcher, were it signalled, would kill ranks that take more than 30 s to save. So it is
        not where rank 0 is on another machine, which sees RUN/STOP.
        """
        ranks = self._ranks()
        for pid in ranks:
            _send(pid, number)
        if not ranks and RunDirectory(self._run).writer_elsewhere() is None:
            self._send_group(number)

    def living(self) -> set[int]:
        """Processes on this machine that the command started and that have not ended."""
        return {*self._marked(), *self._ranks()}

    def kill(self) -> None:
        """SIGKILL to everything of `living`, until nothing is. Raises UserError where that fails."""
        deadline = time.monotonic() + KILL_SECONDS
        self._send_group(signal.SIGKILL)
        while left := self.living():
            if time.monotonic() > deadline:
                raise UserError(
                    f"processes {sorted(left)} do not end although they were killed; the machine is not well"
                )
            for pid in left:
                _send(pid, signal.SIGKILL)
            self.poll()
            time.sleep(POLL_SECONDS)
        self._process.wait()

    def _send_group(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _marked(self) -> Iterator[int]:
        """Descendants that kept their environment; also those whose launcher has died."""
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is another user's
                if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)

    def _ranks(self) -> set[int]:
        """Ranks by their own word, however they were started.

        A number in a file may by now be another process's, or the file another run's: it counts if that
        process began after this launch and before the file was last touched.
        """
        found = set()
        for file in (*self._run.glob("lock*.json"), *self._run.glob("heartbeats/rank-*.json")):
            try:
                owner, touched = Owner.read(file), file.stat().st_mtime
            except OSError:
                continue
            if owner.host == socket.gethostname():
                began = _beginning(owner.pid)
                if began and self._began - SLACK_SECONDS <= began <= touched + SLACK_SECONDS:
                    found.add(owner.pid)
        return found


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _beginning(pid: int) -> float | None:
    """When a process began, in seconds of the epoch; None where it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    if state in (b"Z", b"X"):
        return None
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + int(fields[18]) / os.sysconf("SC_CLK_TCK")
