"""A watchdog that ends a run which hangs, and names the rank, the step and the phase that did not answer.

Every rank writes a heartbeat file into the run directory. A rank whose main thread makes no progress
looks at all of them twice: those whose heart stopped in between are silent (stopped, dead, or caught in
C code with the interpreter's lock); where all hearts beat, the ranks that are furthest behind are named.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from lamda.distributed import World

HANG_EXIT = 76
"""Exit code of a run that the watchdog ended."""
LONGEST_BEAT = 30.0
STACKS = signal.SIGUSR2
"""Asks a process for its stacks; answered even while it holds the interpreter's lock."""
OTHERS_SECONDS = 2.0
"""How long the rank that speaks waits for the others' stacks."""


@dataclass(frozen=True)
class Heartbeat:
    """A rank's sign of life: `beat` grows with time, `marks` with the main thread's progress."""

    rank: int
    host: str
    pid: int
    beat: int
    marks: int
    phase: str
    step: int

    @property
    def where(self) -> str:
        """The main thread's place at the time of the beat."""
        return f"step {self.step}, phase {self.phase}"

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class Watchdog:
    """Watches this rank's main thread while it is entered.

    folder: of the heartbeats; stacks go to `hang` beside it. seconds: the longest time without a mark.
    tell: called with the verdict, on the lowest rank that lives, before the process ends.
    """

    def __init__(self, folder: Path, *, world: World, seconds: float, tell: Callable[[str], None]) -> None:
        self._folder, self._world, self._seconds, self._tell = folder, world, seconds, tell
        self._marks, self._phase, self._step = 0, "start", 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._beats = 0

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks.parent.mkdir(exist_ok=True)
        self._file = self._stacks.open("w", encoding="utf-8")
        faulthandler.register(STACKS, file=self._file, all_threads=True, chain=False)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(STACKS)
        self._file.close()
        for file in (self._path(self._world.rank), *([] if self._stacks.stat().st_size else [self._stacks])):
            file.unlink(missing_ok=True)

    def mark(self, phase: str, *, step: int) -> None:
        """The main thread is at `phase` of `step`."""
        self._phase, self._step = phase, step
        self._marks += 1

    def hurry(self, seconds: float) -> None:
        """Be patient no longer than `seconds` from now on."""
        self._seconds = min(self._seconds, seconds)

    @property
    def _stacks(self) -> Path:
        return self._folder.parent / "hang" / f"rank-{self._world.rank:05d}.txt"

    @property
    def _interval(self) -> float:
        return min(self._seconds / 5, LONGEST_BEAT)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        marks, since = self._marks, time.monotonic()
        beaten = since
        while not self._ended.wait(min(self._interval, 1.0)):
            now = time.monotonic()
            if now - beaten >= self._interval:
                self._beat()
                beaten = now
            if self._marks != marks:
                marks, since = self._marks, now
            elif now - since >= self._seconds:
                self._judge(marks)
                marks, since = self._marks, time.monotonic()

    def _judge(self, marks: int) -> None:
        """Look at all ranks twice; end the process unless the main thread has moved on in between."""
        before = self._look()
        for _ in range(3):
            if self._ended.wait(self._interval / 2):
                return
            self._beat()
        if self._marks != marks:
            return
        now = self._look()
        silent = [heart for rank, heart in now.items() if rank in before and heart.beat == before[rank].beat]
        text = verdict(list(now.values()), silent, seconds=self._seconds)
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        here = [heart for heart in silent if heart.host == socket.gethostname() and heart.rank != self._world.rank]
        living = [rank for rank in now if rank not in {heart.rank for heart in silent}]
        if self._world.rank == min(living, default=self._world.rank):
            for heart in here:
                self._question(heart)
            time.sleep(OTHERS_SECONDS)
            self._tell(text)
            for heart in here:
                with suppress(ProcessLookupError):
                    os.kill(heart.pid, signal.SIGKILL)
        else:
            time.sleep(2 * OTHERS_SECONDS)
        os._exit(HANG_EXIT)

    def _beat(self) -> None:
        self._beats += 1
        beat = Heartbeat(
            self._world.rank, socket.gethostname(), os.getpid(), self._beats, self._marks, self._phase, self._step
        )
        temporary = self._path(self._world.rank).with_suffix(".tmp")
        # A file system that fails once must not end the watch.
        with suppress(OSError):
            temporary.write_text(json.dumps(asdict(beat)), "utf-8")
            temporary.replace(self._path(self._world.rank))

    def _look(self) -> dict[int, Heartbeat]:
        found = {}
        for rank in range(self._world.size):
            with suppress(OSError, ValueError):
                found[rank] = Heartbeat(**json.loads(self._path(rank).read_text("utf-8")))
        return found

    def _question(self, heart: Heartbeat) -> None:
        """Ask a silent process of this host for its stacks; where nothing comes, write what the kernel knows."""
        file = self._folder.parent / "hang" / f"rank-{heart.rank:05d}.txt"
        before = file.stat().st_size if file.exists() else 0
        with suppress(ProcessLookupError):
            os.kill(heart.pid, STACKS)
        time.sleep(1.0)
        if not file.exists() or file.stat().st_size == before:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(f"{heart} does not answer. {kernel_state(heart.pid)}\n")


def verdict(hearts: Sequence[Heartbeat], silent: Sequence[Heartbeat], *, seconds: float) -> str:
    """Who did not answer, and where; where all live, who is furthest behind."""
    if silent:
        told = [f"{heart} has not answered for {seconds:g} s, last seen in {heart.where}" for heart in silent]
        waiting = {heart.where for heart in hearts if heart not in silent}
        return "; ".join([*told, *(f"the others wait in {where}" for where in sorted(waiting))])
    least = min(heart.marks for heart in hearts)
    behind = [heart for heart in hearts if heart.marks == least]
    if len(behind) == len(hearts) > 1:
        return f"all {len(hearts)} ranks have waited for {seconds:g} s in {behind[0].where}"
    return "; ".join(f"{heart} has made no progress for {seconds:g} s in {heart.where}" for heart in behind)


def kernel_state(pid: int) -> str:
    """What /proc tells of a process: its state, and where in the kernel it waits."""
    try:
        fields: Mapping[str, str] = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
        )
    except OSError:
        return "The process is gone."
    told = [f"State:{fields['State']}".replace("\t", " ")]
    for name in ("wchan", "syscall", "stack"):
        with suppress(OSError):
            told.append(f"{name}: {Path(f'/proc/{pid}/{name}').read_text('utf-8').strip()}")
    return "\n".join(told)
