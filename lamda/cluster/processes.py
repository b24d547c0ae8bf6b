"""A training command and all of its processes: find, signal and kill them, whatever their launcher does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import MappingProxyType

from lamda.config.errors import UserError
from lamda.storage.lock import Owner
from lamda.storage.run_directory import RunDirectory

MARK = "LAMDA_LAUNCH"
"""Environment variable with a unique value that the processes of a launch inherit."""
EMPTY: Mapping[str, str] = MappingProxyType({})
KILL_SECONDS = 60
POLL_SECONDS = 0.05
SLACK_SECONDS = 1.0
"""Precision when comparing times of files and processes."""


class Launch:
    """Starts a command in its own session. Raises UserError if it cannot start.

    run: the run directory, whose lock and heartbeats name the ranks. log: file for the command's output. variables:
    added to the environment.
    """

    def __init__(
        self, command: Sequence[str], *, run: Path, log: Path | None = None, variables: Mapping[str, str] = EMPTY
    ) -> None:
        identity = uuid.uuid4().hex
        self._mark = f"{MARK}={identity}".encode()
        self._run = run
        self._began = time.time()
        environment = {**os.environ, **variables, MARK: identity}
        with log.open("ab") if log else nullcontext() as out:
            try:
                self._process = subprocess.Popen(
                    command, env=environment, stdout=out, stderr=out, start_new_session=True
                )
            except OSError as error:
                raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from error

    def poll(self) -> int | None:
        """The command's exit code (negative: a signal), None while it runs; its ranks may outlive it."""
        return self._process.poll()

    def exit_code(self) -> int:
        """The exit code of a command that has ended."""
        return self._process.wait()

    def forward(self, number: int) -> None:
        """Forward a signal to the ranks, or to the command's process group if no rank is known yet.

        DeepSpeed's launcher kills ranks that take more than 30 s to save after it gets a signal. So it gets none if
        rank 0 is on another machine, which sees RUN/STOP.
        """
        ranks = self._ranks()
        for pid in ranks:
            _send(pid, number)
        if not ranks and RunDirectory(self._run).writer_elsewhere() is None:
            self._send_group(number)

    def living(self) -> set[int]:
        """Living processes on this machine that the command started."""
        return {*self._marked(), *self._ranks()}

    def kill(self) -> None:
        """Send SIGKILL to all `living` processes until none is left. Raises UserError if that fails."""
        deadline = time.monotonic() + KILL_SECONDS
        self._send_group(signal.SIGKILL)
        while left := self.living():
            if time.monotonic() > deadline:
                raise UserError(f"processes {sorted(left)} survive SIGKILL; check the machine")
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
        """Descendants that kept their environment, including those whose launcher has died."""
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended, or owned by another user
                if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)

    def _ranks(self) -> set[int]:
        """Ranks by their own files, however they were started.

        The PID in a file may have been reused, or the file may be from another run: it counts if that process
        started after this launch and before the file was last touched.
        """
        found = set()
        for file in (*self._run.glob("lock*.json"), *self._run.glob("heartbeats/rank-*.json")):
            try:
                owner, touched = Owner.read(file), file.stat().st_mtime
            except OSError:
                continue
            if owner.host == socket.gethostname():
                began = _started_at(owner.pid)
                if began and self._began - SLACK_SECONDS <= began <= touched + SLACK_SECONDS:
                    found.add(owner.pid)
        return found


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _started_at(pid: int) -> float | None:
    """When a process started, in seconds since the epoch; None if it has ended.

    psutil rounds the boot time to seconds, which is too coarse here.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    if state in (b"Z", b"X"):
        return None
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + int(fields[18]) / os.sysconf("SC_CLK_TCK")
