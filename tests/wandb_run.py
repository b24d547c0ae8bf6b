"""What training does with the mirror, without the training; also as a process, to be killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import wandb

from lamda.config import Config
from lamda.storage.metrics import MetricsFile, read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.training.wandb_logger import WandbMirror
from tests.launch import ROOT

CHECKPOINT_EVERY = 7
PATIENCE = 60


class Run:
    """A run from `step` on; a context, as training is one."""

    def __init__(
        self, folder: Path, *, mode: str = "online", step: int = 0, run_id: str | None = None, **ours: str
    ) -> None:
        config = Config(train={"steps": 9}, wandb={"mode": mode, "project": "p", "name": "n", **ours})
        directory = RunDirectory(folder)
        self.step = step
        self.file = MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=step)
        self.mirror = WandbMirror(config, folder=folder, run_id=run_id, step=step)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.mirror.finish()
        self.file.__exit__(None, None, None)

    def train(self, until: int) -> None:
        """Finish the steps up to `until`."""
        while self.step < until:
            self.step += 1
            self.file.write(row(self.step))
            self.mirror.log(row(self.step))


def row(step: int) -> dict[str, Any]:
    """A step's metrics, which the step alone decides."""
    return {"step": step, "loss": 1 / step, "tokens": 100 * step, "mfu": None, "grad_norm": float("nan")}


@contextmanager
def forgotten() -> Iterator[None]:
    """Nothing that the library keeps in this process, and tells those it starts, comes from before or stays after."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)


def environment(home: Path) -> dict[str, str]:
    """Nothing of this machine's W&B, no server, quick uploads, no system metrics."""
    return {
        "HOME": str(home),
        "NETRC": str(home / "netrc"),
        "WANDB_CONFIG_DIR": str(home / "config"),
        "WANDB_CACHE_DIR": str(home / "cache"),
        "WANDB_DATA_DIR": str(home / "data"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
        "WANDB__FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "1",
        "WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS": "1",
        "WANDB__DISABLE_STATS": "true",
    }


def kill_and_resume(
    folder: Path,
    *,
    mode: str,
    kills: int,
    arrived: Callable[[], int],
    before_kill: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - it has no state
    seed: int = 17,
) -> int:
    """SIGKILL a run again and again, at random moments after W&B got rows of it; then let it end.

    arrived: how much W&B has got so far. before_kill: what happens around each of these moments. Returns
    the run's last step.
    """
    draw = random.Random(seed)
    for _ in range(kills):
        before = arrived()
        with _start(folder, mode, steps=100_000) as process:
            end = time.monotonic() + PATIENCE
            while arrived() <= before:
                assert process.poll() is None
                if time.monotonic() > end:
                    process.kill()
                    raise TimeoutError(f"W&B got no row in {PATIENCE} s")
                time.sleep(0.02)
            with before_kill:
                time.sleep(draw.random() / 2)
                process.kill()
        assert process.returncode == -signal.SIGKILL
    last = len(read_metrics(folder / "metrics.jsonl")) + 10
    with _start(folder, mode, steps=last) as process:
        pass
    assert process.returncode == 0
    return last


def _start(folder: Path, mode: str, *, steps: int) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "tests.wandb_run", str(folder), mode, str(steps)]
    return subprocess.Popen(arguments, cwd=ROOT, env=os.environ)


def _resume(folder: Path, mode: str, steps: int) -> None:
    """Go on from the last checkpoint."""
    done = len(read_metrics(folder / "metrics.jsonl"))
    with Run(folder, mode=mode, step=done // CHECKPOINT_EVERY * CHECKPOINT_EVERY) as run:
        while run.step < steps:
            run.train(run.step + 1)
            time.sleep(0.02)


if __name__ == "__main__":
    _resume(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
