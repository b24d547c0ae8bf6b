"""Start real processes: ranks of a script, or the command that a user types."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "WANDB_MODE": "disabled",
    "PYTHONPATH": str(ROOT),
}
EMPTY: Mapping[str, str] = MappingProxyType({})


def free_port() -> int:
    """A port on loopback that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    arguments: Sequence[str], *, world_size: int, variables: Mapping[str, str] = EMPTY, timeout: float = 900
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS` on `world` ranks, without a launcher; every rank's result."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                **ENVIRONMENT,
                **variables,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    results = []
    try:
        for process in ranks:
            out, err = process.communicate(timeout=timeout)
            results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in ranks:
            process.kill()
    return results


def run_deepspeed(
    arguments: Sequence[str], *, ranks: int, variables: Mapping[str, str] = EMPTY, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus RANKS ARGUMENTS`, as a user types it."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return subprocess.run(
        [str(launcher), "--num_gpus", str(ranks), "--master_port", str(free_port()), *arguments],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **variables, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
