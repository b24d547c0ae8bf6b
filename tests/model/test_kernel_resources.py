"""The Triton kernels, compiled ahead of time for GPUs that are not here, with the tiles that each would use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from tests.model.conftest import needs_kernels

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 89, 90, 100, 120)
KERNELS = {"forward", "backward_queries", "backward_keys", "band_tiles"}
RECORD = json.loads((ROOT / "benchmarks/kernels.json").read_text("utf-8"))["kernels"]


def run_kernel_resources(*arguments: str) -> subprocess.CompletedProcess[str]:
    """By Triton and its assembler; not through the interpreter, and not from a cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = ROOT / "tests/long/kernel_resources.py"
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600
    )


@needs_kernels
def test_every_kernel_is_within_the_limits_of_every_gpu(tmp_path):
    """Shared memory, registers and spills, in the variant of the code that needs most in 16 bits."""
    done = run_kernel_resources("--quick", "--json", str(tmp_path / "kernels.json"), "--sm", *map(str, ARCHITECTURES))
    rows = json.loads((tmp_path / "kernels.json").read_text("utf-8"))["kernels"]
    assert done.returncode == 0, [row for row in rows if row["problems"]]
    assert {(row["sm"], row["kernel"]) for row in rows} == {*product(ARCHITECTURES, KERNELS)}
    assert {_launch(row) for row in rows} == {_launch(row) for row in RECORD if row["dtype"] == "bf16"}


def test_the_record_is_complete_and_within_the_limits():
    assert {(row["sm"], row["kernel"]) for row in RECORD} == {*product(ARCHITECTURES, KERNELS)}
    assert not any(row["problems"] for row in RECORD)


def _launch(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["sm"], row["kernel"], *row["tile"], row["warps"], row["stages"]
