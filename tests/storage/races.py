"""Races of several processes for one run directory, and how many of them ever wrote at the same time."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

from lamda.config.errors import UserError
from lamda.storage import lock
from lamda.storage.lock import RunLock

RACERS = 4
KINDS = ("flock", "process", "beat")
"""What shows that another process lives: its flock; its number, where flock is not supported; its beat alone."""


def race(folder: Path, *, kind: str, rounds: int) -> list[int]:
    """Let RACERS processes start at once, `rounds` times; how many of each round came to be the writer.

    Every second round finds the file of a dead writer. Raises AssertionError where two ever wrote at the same time.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(RACERS)
    results = context.Queue()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    racers = [
        context.Process(target=_racer, args=(folder, kind, rounds, number, dead.pid, barrier, results))
        for number in range(RACERS)
    ]
    for racer in racers:
        racer.start()
    outcomes: list[Sequence[str]] = [results.get(timeout=300) for _ in racers]
    for racer in racers:
        racer.join(60)
    for number, each in enumerate(zip(*outcomes, strict=True)):
        assert "double" not in each, f"round {number}: two writers at the same time"
    return [each.count("owner") for each in zip(*outcomes, strict=True)]


def _racer(folder: Path, kind: str, rounds: int, number: int, dead: int, barrier: Barrier, results) -> None:
    draw = random.Random(number)
    host = socket.gethostname()
    if kind != "flock":
        fcntl.flock = _unsupported
    if kind == "beat":
        socket.gethostname = lambda: f"{host}-{number}"
        lock.WATCH_SECONDS = 0.2
    found = []
    for round_number in range(rounds):
        run = folder / str(round_number)
        if number == 0:
            run.mkdir()
            if round_number % 2:
                _leave_dead(run, host, dead)
        barrier.wait(60)
        time.sleep(draw.random() * 0.003)
        try:
            with RunLock(run) as held:
                found.append(_write_alone(run / "witness", draw.random() * 0.01) if held.is_mine() else "lost")
        except UserError:
            found.append("refused")
        barrier.wait(60)
        if number == 0:
            assert [path.name for path in run.iterdir()] in ([], ["lock-dead.json"])
            shutil.rmtree(run)
    results.put(found)


def _write_alone(witness: Path, seconds: float) -> str:
    try:
        os.close(os.open(witness, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return "double"
    time.sleep(seconds)
    witness.unlink()
    return "owner"


def _leave_dead(run: Path, host: str, process: int) -> None:
    path = run / "lock-dead.json"
    content = {"id": "dead", "host": host, "pid": process, "boot": None, "has_flock": True}
    path.write_text(json.dumps(content) + '\n{"holds": true}\n')
    os.utime(path, (time.time() - lock.STALE_SECONDS - 60,) * 2)


def _unsupported(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "no locks available")
