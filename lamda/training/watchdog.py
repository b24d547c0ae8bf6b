"""A watchdog that ends a hanging run and names the rank, the step and the phase that did not respond.

Every rank writes a heartbeat file into the run directory. A rank whose main thread makes no progress reads all of them
twice: ranks whose heartbeat did not change are silent (stopped, dead, or in C code that holds the GIL). If all
heartbeats change and no rank makes progress, the ranks that are furthest behind are named. A rank that waits for
another one's long work does not end the run while that work makes progress.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lamda.best_effort import BestEffort
from lamda.distributed import World, gather
from lamda.training import fault_injection
from lamda.training.stop_requests import StopRequests

if TYPE_CHECKING:
    import torch

HANG_EXIT = 76  # exit code of a run that the watchdog ended
LONGEST_BEAT = 30.0
STACKS = signal.SIGUSR2  # asks a process for its stack traces; works even while it holds the GIL
OTHERS_SECONDS = 2.0  # how long the reporting rank waits for the others' stack traces


@dataclass
class Heartbeat:
    """A rank's heartbeat. beat: grows with time. marks: phases reached. progress: grows during a long phase."""

    rank: int
    host: str
    pid: int
    beat: int
    marks: int
    phase: str
    step: int
    progress: int = 0

    @property
    def where(self) -> str:
        """Where the main thread was at the time of the beat, in words."""
        return f"step {self.step}, phase {self.phase}"

    @property
    def position(self) -> tuple[int, int]:
        """Two counters, one of which changes with any progress."""
        return self.marks, self.progress

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class Watchdog:
    """Watches this rank's main thread while it is entered.

    folder: of the heartbeats; stacks go to `hang` beside it. seconds: the longest time without progress.
    report: called with the verdict, on the lowest living rank, before the process ends.
    """

    def __init__(self, folder: Path, *, world: World, seconds: float, report: Callable[[str], None]) -> None:
        self._folder, self._world, self._seconds, self._report = folder, world, seconds, report
        self._heart = Heartbeat(world.rank, socket.gethostname(), os.getpid(), beat=0, marks=0, phase="start", step=0)
        self._timeouts: Mapping[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._writing = BestEffort(f"heartbeats/ and hang/ in {folder.parent} cannot be written")

    def __enter__(self) -> Watchdog:
        self._file = self._open_stacks()
        faulthandler.register(STACKS, file=self._file, all_threads=True, chain=False)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(STACKS)
        with self._writing:
            self._file.close()
            self._path(self._world.rank).unlink(missing_ok=True)
            stacks = self._stacks(self._world.rank)
            if not stacks.stat().st_size:
                stacks.unlink()

    def _open_stacks(self) -> IO[str]:
        with self._writing:
            self._folder.mkdir(parents=True, exist_ok=True)
            stacks = self._stacks(self._world.rank)
            stacks.parent.mkdir(exist_ok=True)
            return stacks.open("w", encoding="utf-8")
        return os.fdopen(os.dup(2), "w", encoding="utf-8")  # stacks go to standard error

    def mark(self, phase: str, *, step: int) -> None:
        """The main thread is at `phase` of `step`."""
        self._heart.phase, self._heart.step = phase, step
        self._heart.marks += 1

    def progress(self) -> None:
        """The phase makes progress: more bytes are written, hashed or read, another attempt is made. For any thread."""
        self._heart.progress += 1

    def progress_during(self, phases: Collection[str]) -> None:
        """The same, for work that counts only while the main thread may be waiting for it."""
        if self._heart.phase in phases:
            self.progress()

    def hurry(self, seconds: float, *, during: Collection[str]) -> None:
        """From now on wait at most `seconds` for other ranks in these phases; a rank alone is slow, not waiting."""
        if self._world.world_size > 1:
            self._timeouts = dict.fromkeys(during, seconds)

    @property
    def _timeout(self) -> float:
        return min(self._seconds, self._timeouts.get(self._heart.phase, self._seconds))

    @property
    def _interval(self) -> float:
        return min(self._timeout / 5, LONGEST_BEAT)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _stacks(self, rank: int) -> Path:
        return self._folder.parent / "hang" / f"rank-{rank:05d}.txt"

    def _watch(self) -> None:
        position, since = self._heart.position, time.monotonic()
        beaten = since
        while not self._ended.wait(min(self._interval, 1.0)):
            now = time.monotonic()
            if now - beaten >= self._interval:
                self._beat()
                beaten = now
            if self._heart.position != position:
                position, since = self._heart.position, now
            elif now - since >= self._timeout:
                self._end_if_hanging(position)
                position, since = self._heart.position, time.monotonic()

    def _end_if_hanging(self, position: tuple[int, int]) -> None:
        """Read all heartbeats twice; end the process unless this rank or another has made progress in between."""
        before = self._read_heartbeats()
        for _ in range(3):
            if self._ended.wait(self._interval / 2):
                return
            self._beat()
        now = self._read_heartbeats()
        has_moved = [now[rank].position != heart.position for rank, heart in before.items() if rank in now]
        if self._heart.position != position or any(has_moved):
            return
        silent = [heart for rank, heart in now.items() if rank in before and heart.beat == before[rank].beat]
        try:
            self._end(list(now.values()), silent)
        finally:
            os._exit(HANG_EXIT)

    def _end(self, hearts: Sequence[Heartbeat], silent: Sequence[Heartbeat]) -> None:
        """Write stack traces and the verdict before the process ends, and kill the silent processes of this host."""
        text = verdict(hearts, silent, seconds=self._timeout)
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        local_silent = [heart for heart in silent if heart.host == self._heart.host and heart.rank != self._world.rank]
        living = [heart.rank for heart in hearts if heart not in silent]
        if self._world.rank == min(living, default=self._world.rank):
            for heart in local_silent:
                with self._writing:
                    self._request_stacks(heart)
            time.sleep(OTHERS_SECONDS)
            self._report(text)
            for heart in local_silent:
                with suppress(ProcessLookupError):
                    os.kill(heart.pid, signal.SIGKILL)
        else:
            time.sleep(2 * OTHERS_SECONDS)

    def _beat(self) -> None:
        self._heart.beat += 1
        temporary = self._path(self._world.rank).with_suffix(".tmp")
        with self._writing:
            temporary.write_text(json.dumps(asdict(self._heart)), "utf-8")
            temporary.replace(self._path(self._world.rank))

    def _read_heartbeats(self) -> dict[int, Heartbeat]:
        hearts = {}
        for rank in range(self._world.world_size):
            with suppress(OSError, ValueError):
                hearts[rank] = Heartbeat(**json.loads(self._path(rank).read_text("utf-8")))
        hearts[self._world.rank] = replace(self._heart)  # even if it could not be written
        return hearts

    def _request_stacks(self, heart: Heartbeat) -> None:
        """Ask a silent process of this host for its stack traces; if nothing comes, write its state in the kernel."""
        file = self._stacks(heart.rank)
        before = file.stat().st_size if file.exists() else 0
        with suppress(ProcessLookupError):
            os.kill(heart.pid, STACKS)
        time.sleep(1.0)
        if not file.exists() or file.stat().st_size == before:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(f"{heart} does not answer. {kernel_state(heart.pid)}\n")


def clear_heartbeats(folder: Path) -> None:
    """Delete the heartbeats of ranks that have ended; called before any rank of this run writes one."""
    for file in folder.glob("rank-*.json"):
        with BestEffort(f"{file} cannot be deleted"):
            file.unlink(missing_ok=True)


def verdict(hearts: Sequence[Heartbeat], silent: Sequence[Heartbeat], *, seconds: float) -> str:
    """Which ranks did not respond, and where; if all responded, which are furthest behind."""
    if silent:
        problems = [f"{heart} has not answered for {seconds:g} s, last seen in {heart.where}" for heart in silent]
        waiting = {heart.where for heart in hearts if heart not in silent}
        return "; ".join([*problems, *(f"the others wait in {where}" for where in sorted(waiting))])
    least = min(heart.marks for heart in hearts)
    behind = [heart for heart in hearts if heart.marks == least]
    if len(behind) == len(hearts) > 1:
        return f"all {len(hearts)} ranks have waited for {seconds:g} s in {behind[0].where}"
    return "; ".join(f"{heart} has made no progress for {seconds:g} s in {heart.where}" for heart in behind)


def kernel_state(pid: int) -> str:
    """The state of a process from /proc, and where in the kernel it waits."""
    try:
        fields: Mapping[str, str] = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
        )
    except OSError:
        return "The process is gone."
    lines = [f"State:{fields['State']}".replace("\t", " ")]
    for name in ("wchan", "syscall", "stack"):
        with suppress(OSError):
            lines.append(f"{name}: {Path(f'/proc/{pid}/{name}').read_text('utf-8').strip()}")
    return "\n".join(lines)


class Guard:
    """What can end a run early: requests to stop, the watchdog and injected faults."""

    def __init__(self, requests: StopRequests, watchdog: Watchdog, *, world: World) -> None:
        self.requests, self.watchdog, self._world = requests, watchdog, world

    def mark(self, phase: str, *, step: int, tensor: torch.Tensor | None = None) -> None:
        """Called at every phase of a step: the watchdog sees progress, a test injects its faults."""
        self.watchdog.mark(phase, step=step)
        fault_injection.maybe_inject(phase, rank=self._world.rank, step=step, tensor=tensor)

    def agreed_stop_reason(self) -> str | None:
        """Why a rank was asked to stop, the same on every rank; all ranks call it."""
        return next(filter(None, gather(self.requests.reason())), None)
