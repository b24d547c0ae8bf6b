"""A watchdog that ends a run which hangs, and names the rank, the step and the phase that did not answer.

Every rank writes a heartbeat file into the run directory. A rank whose main thread makes no progress
looks at all of them twice: those whose heart stopped in between are silent (stopped, dead, or caught in
C code with the interpreter's lock); where all hearts beat and no rank makes progress, the ranks that are furthest
behind are named. A rank that waits for another one's long work does not end the run while that work progresses.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from lamda.best_effort import BestEffort
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
    """A rank's sign of life: `beat` grows with time, `marks` with the phases that the main thread reaches.

    Marks are comparable between ranks. progress: grows while a phase that takes long makes progress.
    """

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
        """The main thread's place at the time of the beat."""
        return f"step {self.step}, phase {self.phase}"

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class Watchdog:
    """Watches this rank's main thread while it is entered.

    folder: of the heartbeats; stacks go to `hang` beside it. seconds: the longest time without progress.
    tell: called with the verdict, on the lowest rank that lives, before the process ends.
    """

    def __init__(self, folder: Path, *, world: World, seconds: float, tell: Callable[[str], None]) -> None:
        self._folder, self._world, self._seconds, self._tell = folder, world, seconds, tell
        self._marks, self._progress, self._phase, self._step = 0, 0, "start", 0
        self._hurried: Mapping[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._beats = 0
        self._writing = BestEffort(f"heartbeats/ and hang/ in {folder.parent} cannot be written")

    def __enter__(self) -> Watchdog:
        self._file = self._open_stacks()
        faulthandler.register(STACKS, file=self._file, all_threads=True, chain=False)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Watch no longer."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(STACKS)
        with self._writing:
            self._file.close()
            self._path(self._world.rank).unlink(missing_ok=True)
            if not self._stacks.stat().st_size:
                self._stacks.unlink()

    def _open_stacks(self) -> IO[str]:
        with self._writing:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stacks.parent.mkdir(exist_ok=True)
            return self._stacks.open("w", encoding="utf-8")
        return os.fdopen(os.dup(2), "w", encoding="utf-8")  # stacks go to standard error

    def mark(self, phase: str, *, step: int) -> None:
        """The main thread is at `phase` of `step`."""
        self._phase, self._step = phase, step
        self._marks += 1

    def progress(self) -> None:
        """The phase goes on: more bytes are written, hashed or read, another attempt is made. For any thread."""
        self._progress += 1

    def progress_during(self, phases: Collection[str]) -> None:
        """The same, for work that counts only while the main thread may be waiting for it."""
        if self._phase in phases:
            self.progress()

    def hurry(self, seconds: float, *, during: Collection[str]) -> None:
        """Wait no longer than `seconds` in these phases from now on; others keep their time."""
        self._hurried = dict.fromkeys(during, seconds)

    @property
    def _stacks(self) -> Path:
        return self._folder.parent / "hang" / f"rank-{self._world.rank:05d}.txt"

    @property
    def _timeout(self) -> float:
        return min(self._seconds, self._hurried.get(self._phase, self._seconds))

    @property
    def _interval(self) -> float:
        return min(self._timeout / 5, LONGEST_BEAT)

    @property
    def _place(self) -> tuple[int, int]:
        return self._marks, self._progress

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        place, since = self._place, time.monotonic()
        beaten = since
        while not self._ended.wait(min(self._interval, 1.0)):
            now = time.monotonic()
            if now - beaten >= self._interval:
                self._beat()
                beaten = now
            if self._place != place:
                place, since = self._place, now
            elif now - since >= self._timeout:
                self._judge(place)
                place, since = self._place, time.monotonic()

    def _judge(self, place: tuple[int, int]) -> None:
        """Look at all ranks twice; end the process unless this rank or another has made progress in between."""
        before = self._look()
        for _ in range(3):
            if self._ended.wait(self._interval / 2):
                return
            self._beat()
        now = self._look()
        if self._place != place or any(_has_moved(before.get(rank), heart) for rank, heart in now.items()):
            return
        silent = [heart for rank, heart in now.items() if rank in before and heart.beat == before[rank].beat]
        try:
            self._end(list(now.values()), silent)
        finally:
            os._exit(HANG_EXIT)

    def _end(self, hearts: Sequence[Heartbeat], silent: Sequence[Heartbeat]) -> None:
        """Leave stacks and the verdict before the process ends, and kill the silent ones of this host."""
        text = verdict(hearts, silent, seconds=self._timeout)
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        here = [heart for heart in silent if heart.host == socket.gethostname() and heart.rank != self._world.rank]
        living = [heart.rank for heart in hearts if heart not in silent]
        if self._world.rank == min(living, default=self._world.rank):
            for heart in here:
                with self._writing:
                    self._question(heart)
            time.sleep(OTHERS_SECONDS)
            self._tell(text)
            for heart in here:
                with suppress(ProcessLookupError):
                    os.kill(heart.pid, signal.SIGKILL)
        else:
            time.sleep(2 * OTHERS_SECONDS)

    def _heart(self) -> Heartbeat:
        return Heartbeat(
            rank=self._world.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            beat=self._beats,
            marks=self._marks,
            phase=self._phase,
            step=self._step,
            progress=self._progress,
        )

    def _beat(self) -> None:
        self._beats += 1
        temporary = self._path(self._world.rank).with_suffix(".tmp")
        with self._writing:
            temporary.write_text(json.dumps(asdict(self._heart())), "utf-8")
            temporary.replace(self._path(self._world.rank))

    def _look(self) -> dict[int, Heartbeat]:
        found = {}
        for rank in range(self._world.size):
            with suppress(OSError, ValueError):
                found[rank] = Heartbeat(**json.loads(self._path(rank).read_text("utf-8")))
        found[self._world.rank] = self._heart()  # whether or not the disk takes it
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


def clear_heartbeats(folder: Path) -> None:
    """Delete the signs of life of ranks that have ended; none of this run's may beat yet."""
    for file in folder.glob("rank-*.json"):
        with BestEffort(f"{file} cannot be deleted"):
            file.unlink(missing_ok=True)


def _has_moved(before: Heartbeat | None, now: Heartbeat) -> bool:
    return before is not None and (before.marks, before.progress) != (now.marks, now.progress)


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
