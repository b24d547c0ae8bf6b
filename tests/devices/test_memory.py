"""What a mesh needs is told without it, and settings change it as they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The reports of `tiny` on 8 devices by train.recompute."""
    folder = tmp_path_factory.mktemp("memory")
    return {how: report(folder / f"{how}.json", how) for how in ("none", "ffn", "block")}


def report(file: Path, recompute: str) -> dict:
    flags = ["--config", "configs/tiny.yaml", "--train.global_batch_size", "8", "--train.micro_batch_size", "2"]
    flags += ["--train.recompute", recompute]
    flags += ["--flax.fsdp", "4", "--flax.tensor", "2", "--train.optimizer", "adamw"]
    subprocess.run(
        [sys.executable, "scripts/benchmark.py", "flax_memory", "--devices", "8", *flags, "--json", str(file)],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, check=True,
    )  # fmt: skip
    return json.loads(file.read_text("utf-8"))


def test_a_device_has_its_share_of_weights_and_moments(needs):
    """12 bytes a parameter over 8 devices; besides them the rows, and the few weights that are not cut."""
    share = 12 * needs["none"]["parameters"] / 8
    assert share < needs["none"]["state_bytes"] < 1.1 * share
    assert needs["none"]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}


def test_what_is_computed_again_is_not_kept(needs):
    none, ffn, block = (needs[how]["step_bytes"] for how in ("none", "ffn", "block"))
    assert none > ffn > block
