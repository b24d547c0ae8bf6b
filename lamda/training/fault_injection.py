"""Fault injection: tests prove that a run survives faults. Inactive unless LAMDA_ALLOW_FAULTS is 1.

    LAMDA_FAULT="point:kind:rank:step"      several, separated by commas; `*` means every rank or step

A point is a place that the code reaches (`POINTS`); a kind is what happens there (`KINDS`).
"""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lamda.config.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

STEP_POINTS = ("fetch", "forward", "loss", "backward", "update", "report")  # moments of a step, reached on every rank
SAVE_POINTS = ("save.begin", "save.copied", "save.written", "save.synced", "save.settled", "save.done")
COMMIT_POINTS = ("commit.manifest", "commit.renamed", "commit.latest", "commit.pruned")  # of a save, on rank 0
WORK_POINTS = ("save", "evaluate", "finish")  # long work between two steps, or after the last one
POINTS = (*STEP_POINTS, *SAVE_POINTS, *COMMIT_POINTS, *WORK_POINTS)

SLOW_SECONDS = 3.0
TRICKLE_SECONDS = 24


class InjectedError(RuntimeError):
    """The exception of the kind `exception`."""


class Fault(NamedTuple):
    """One fault of LAMDA_FAULT; rank and step are None for all."""

    point: str
    kind: str
    rank: int | None
    step: int | None


def maybe_inject(
    point: str, *, rank: int, step: int, tensor: torch.Tensor | None = None, path: Path | None = None
) -> None:
    """Inject the faults requested for this point; some change the tensor or the file. Raises what the kind raises."""
    if os.environ.get("LAMDA_ALLOW_FAULTS") != "1":
        return
    for fault in parse(os.environ.get("LAMDA_FAULT", "")):
        if fault.point == point and fault.rank in (None, rank) and fault.step in (None, step):
            KINDS[fault.kind](tensor, path)


def parse(text: str) -> list[Fault]:
    """The faults in the value of LAMDA_FAULT. Raises UserError."""
    faults = []
    for part in filter(None, text.split(",")):
        try:
            point, kind, rank, step = part.split(":")
            numbers = [None if number == "*" else int(number) for number in (rank, step)]
        except ValueError as error:
            raise UserError(f"LAMDA_FAULT {part!r}: is not point:kind:rank:step") from error
        for value, known in ((point, POINTS), (kind, KINDS)):
            if value not in known:
                raise UserError(f"LAMDA_FAULT {part!r}: there is no {value!r}{nearest(value, known)}")
        faults.append(Fault(point, kind, *numbers))
    return faults


Act = Callable[["torch.Tensor | None", "Path | None"], None]


def _signal(number: signal.Signals) -> Act:
    return lambda tensor, path: os.kill(os.getpid(), number)


def _raise(error: Exception) -> Act:
    def act(tensor: torch.Tensor | None, path: Path | None) -> None:
        raise error

    return act


def _hold_the_gil(tensor: torch.Tensor | None, path: Path | None) -> None:
    re.fullmatch("(a+)+", "a" * 60 + "b")  # takes longer than any test, and no other thread gets a turn


def _nan(tensor: torch.Tensor | None, path: Path | None) -> None:
    assert tensor is not None
    tensor.mul_(float("nan"))


def _flip(tensor: torch.Tensor | None, path: Path | None) -> None:
    """One bit in the middle of a parameter."""
    import torch

    assert tensor is not None
    octets = tensor.detach().view(-1).view(torch.uint8)
    octets[octets.numel() // 2] ^= 1


def _truncate(tensor: torch.Tensor | None, path: Path | None) -> None:
    assert path is not None
    os.truncate(path, path.stat().st_size // 2)


def _trickle(tensor: torch.Tensor | None, path: Path | None) -> None:
    """A disk that takes one piece per second."""
    assert path is not None
    slow = path.with_name("trickle")
    for _ in range(TRICKLE_SECONDS):
        with slow.open("ab") as stream:
            stream.write(bytes(1 << 14))
        time.sleep(1)
    slow.unlink()


def _cut_network(tensor: torch.Tensor | None, path: Path | None) -> None:
    """Shut every connection of this process to another."""
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the listing's own descriptor, a socket that listens or is not connected
            continue


KINDS: dict[str, Act] = {
    "kill": _signal(signal.SIGKILL),
    "term": _signal(signal.SIGTERM),
    "usr1": _signal(signal.SIGUSR1),
    "hup": _signal(signal.SIGHUP),
    "hang": _signal(signal.SIGSTOP),
    "gil": _hold_the_gil,
    "exception": _raise(InjectedError("a fault on purpose")),
    "full": _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "slow": lambda tensor, path: time.sleep(SLOW_SECONDS),
    "trickle": _trickle,
    "nan": _nan,
    "flip": _flip,
    "truncate": _truncate,
    "cut": _cut_network,
}
