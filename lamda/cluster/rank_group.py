"""A command on all ranks together, watched from outside: it ends on all of them when one dies or time is up.

Alone, this process starts every rank on this machine. Under a launcher each process starts its own rank, and the
processes agree over gloo on the hosts, which still works where the ranks' own network hangs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from lamda import distributed
from lamda.cluster.processes import EMPTY, Launch
from lamda.cluster.restarts import exit_text
from lamda.distributed import World

T = TypeVar("T")

POLL_SECONDS = 0.1
SETTLE_SECONDS = 5.0
"""Time for the other ranks to end by themselves, and to say why, after one has failed."""
LOG_LINES = 15


@dataclass(frozen=True)
class Ended:
    """How a command ended. codes: exit code by rank, None where it had to be killed. logs: output by rank.

    well: exit codes that are no failure.
    """

    codes: Mapping[int, int | None]
    logs: Mapping[int, Path]
    seconds: float
    well: Collection[int] = (0,)

    @property
    def failed(self) -> dict[int, int]:
        """The exit codes of the ranks that have failed."""
        return {rank: code for rank, code in self.codes.items() if code is not None and code not in self.well}

    @property
    def was_killed(self) -> bool:
        """Whether a signal has ended a rank."""
        return any(code < 0 for code in self.failed.values())

    def failure(self) -> str:
        """What failed, with the end of that rank's log; empty if nothing did."""
        if failed := self.failed:
            # First a rank that a signal has killed, then one that says why: the others may only have lost it.
            rank, code = min(failed.items(), key=lambda each: (each[1] >= 0, not _text(self.logs[each[0]]), each[0]))
            return f"rank {rank}: {exit_text(code)}{_end_of(self.logs[rank])}"
        slow = [rank for rank, code in self.codes.items() if code is None]
        return f"no end after {self.seconds:.0f} s{_end_of(self.logs[slow[0]])}" if slow else ""


class RankGroup:
    """The ranks of a launcher that this process belongs to, or `size` ranks on this machine."""

    def __init__(self, world: World, *, size: int) -> None:
        self._launched = world.launched
        if self._launched:
            distributed.start_hosts(world, threads=1)
        alone = [
            World(rank=n, local_rank=n, world_size=size, local_world_size=size, launched=True) for n in range(size)
        ]
        self._mine = [world] if self._launched else alone
        self.is_main_process = world.is_main_process

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._mine[0].world_size

    def broadcast(self, value: T) -> T:
        """The main process's value on all of them."""
        return distributed.broadcast(value) if self._launched else value

    def gather(self, value: T) -> list[T]:
        """The values of all processes."""
        return distributed.gather(value) if self._launched else [value]

    def run(
        self,
        arguments: Sequence[str],
        *,
        name: str,
        run: Path,
        limit_seconds: float,
        variables: Mapping[str, str] = EMPTY,
        well: Collection[int] = (0,),
    ) -> Ended:
        """Run `python ARGUMENTS` on all ranks until all have ended, one has failed, or time is up; kill what is left.

        name: of the files for its output, beside the run directory `run`. well: exit codes that are no failure.
        """
        alone = "" if self._launched else f"127.0.0.1:{distributed.free_port()}"
        address = alone or self.broadcast(distributed.free_address())
        logs = {rank: run.with_name(f"{name}-rank-{rank}.log") for rank in range(self.size)}
        launches: dict[int, Launch] = {}
        try:
            for world in self._mine:
                launches[world.rank] = Launch(
                    [sys.executable, *arguments],
                    run=run,
                    log=logs[world.rank],
                    variables={**distributed.rank_variables(world, address), **variables},
                )
            return self._watch(launches, limit_seconds, ended=partial(Ended, logs=logs, well=well))
        finally:
            for launch in launches.values():
                launch.kill()

    def stop(self) -> None:
        """Leave together: a launcher kills the other ranks when the first one exits with a code other than 0."""
        if self._launched:
            distributed.barrier()
            distributed.stop()

    def _watch(self, launches: Mapping[int, Launch], limit_seconds: float, ended: Callable[..., Ended]) -> Ended:
        began = time.monotonic()
        deadline, has_failed = began + limit_seconds, False
        while True:
            mine = {rank: launch.poll() for rank, launch in launches.items()}
            everyone = self.gather((mine, time.monotonic() > deadline))
            codes = {rank: code for theirs, _ in everyone for rank, code in theirs.items()}
            is_late = any(late for _, late in everyone)
            now = ended(codes=codes, seconds=time.monotonic() - began)
            if is_late or now.was_killed or None not in codes.values():
                return now
            if now.failed and not has_failed:
                has_failed, deadline = True, min(deadline, time.monotonic() + SETTLE_SECONDS)
            time.sleep(POLL_SECONDS)


def _text(log: Path) -> str:
    return log.read_text("utf-8", errors="replace").strip() if log.is_file() else ""


def _end_of(log: Path) -> str:
    return "\n".join([f"; the end of {log}:", *_text(log).splitlines()[-LOG_LINES:]])
