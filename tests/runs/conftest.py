"""Runs and checkpoints as a training leaves them, without a training."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.storage.metrics import MetricsFile
from lamda.storage.run_directory import RunDirectory

HOST = socket.gethostname()


@pytest.fixture(scope="session")
def dead_process() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make_run(path: Path, *, losses: Iterable[float] = (), **columns: Any) -> RunDirectory:
    """A run with a row a loss; `columns` are the same in each."""
    directory = RunDirectory(path)
    directory.create()
    with MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=0) as file:
        for step, loss in enumerate(losses, start=1):
            file.write({"step": step, "loss": loss, **columns})
    return directory


def leave_status(directory: RunDirectory, status: str, *, age: float = 0.0, **details: Any) -> None:
    """status.json as it was written `age` seconds ago by this process."""
    content = {"status": status, "time": time.time() - age, "host": HOST, "pid": os.getpid(), **details}
    (directory.path / "status.json").write_text(json.dumps(content))


def leave_lock(directory: RunDirectory, *, process: int, host: str = HOST, age: float = 0.0) -> None:
    """A lock whose heart beat last `age` seconds ago."""
    path = directory.path / "lock.json"
    path.write_text(json.dumps({"host": host, "pid": process}))
    os.utime(path, (time.time() - age,) * 2)


def save_checkpoint(
    run: Path,
    step: int,
    weights: Mapping[str, torch.Tensor],
    *,
    config: Config | None = None,
    optimizer: bytes = b"moments",
    ranks: int = 1,
    **state: Any,
) -> Path:
    """A complete checkpoint: every file with its size and sha256 in a manifest that ends with its own hash."""
    path = run / "checkpoints" / f"step-{step:08}"
    path.mkdir(parents=True)
    save_file(dict(weights), path / "model.safetensors")
    for rank in range(ranks):
        (path / f"optimizer-{rank:05}-of-{ranks:05}.safetensors").write_bytes(optimizer)
    content = {"step": step, "updates": step, "samples": 8 * step, "tokens": 512 * step, "skipped": [], **state}
    (path / "run_state.json").write_text(json.dumps(content))
    (path / "config.yaml").write_text(to_yaml(config or Config(train={"steps": 100})))
    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
    }
    manifest = {"step": step, "ranks": ranks, "zero_stage": 1, "model": {}, "files": files}
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}, indent=1))
    (run / "checkpoints" / "LATEST").write_text(path.name)
    return path


@pytest.fixture
def weights() -> Callable[[int], dict[str, torch.Tensor]]:
    """Draws a few tensors by plain name from a seed."""

    def draw(seed: int) -> dict[str, torch.Tensor]:
        source = torch.Generator().manual_seed(seed)
        shapes = {"embedding.weight": (7, 5), **{f"layers.{i}.scale": (5,) for i in (0, 1, 2, 10)}}
        return {name: torch.randn(shape, generator=source).bfloat16() for name, shape in shapes.items()}

    return draw
