"""What a checkpoint costs: how long training stands still, how long the rest takes, and the steps beside it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamda.config.schema import Config
from lamda.proof.devices import require_deepspeed, timed
from lamda.proof.findings import Findings, LeftOutError
from lamda.proof.models import choose_config, open_engine
from lamda.proof.sizes import Sizes
from lamda.proof.step import describe, random_batches
from lamda.storage.commit import sync_and_describe

SPACE = 1.2
"""Times its size that a checkpoint needs on the disk here."""


def measure(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Record the stall of two checkpoints, and write the second beside training steps."""
    findings.attempt("checkpoint", lambda: _measure(choose_config(sizes, sizes.lengths[0]), findings, folder))


def _measure(config: Config, findings: Findings, folder: Path) -> dict[str, Any]:
    require_deepspeed()
    findings.record("setting", describe(config))
    engine, batches = open_engine(config), random_batches(config)
    size, free = engine.checkpoint_bytes(), shutil.disk_usage(folder).free
    findings.record("bytes", size)
    if free < SPACE * size:
        raise LeftOutError(f"{folder}: a checkpoint of {size / 1e9:.0f} GB does not fit into {free / 1e9:.0f} GB")

    def step() -> float:
        return timed(lambda: engine.train_step(next(batches), lr=1e-4).wait())[0]

    step()
    alone = [step() for _ in range(3)]
    target = folder / "checkpoint"
    target.mkdir(exist_ok=True)
    try:
        stalls = []
        for _ in range(2):
            seconds, write = timed(lambda: engine.snapshot(target))
            stalls.append(seconds)
            findings.record("stall_seconds", stalls)
        return _write(write, step) | {"step_seconds_alone": alone}
    finally:
        shutil.rmtree(target)


def _write(write: Callable[[], list[Path]], step: Callable[[], float]) -> dict[str, Any]:
    """Seconds of writing and of syncing and hashing in a thread, and of the steps beside it."""
    found: dict[str, Any] = {}

    def work() -> None:
        began = time.perf_counter()
        files = write()
        found["write_seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        for file in files:
            sync_and_describe(file)
        found["sync_and_hash_seconds"] = time.perf_counter() - began

    thread, beside = threading.Thread(target=work), []
    thread.start()
    while thread.is_alive():
        beside.append(step())
    thread.join()
    return found | {"step_seconds_beside": beside}
