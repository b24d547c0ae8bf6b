"""Runs of `scripts/pretrain_flax.py` beside runs of `scripts/pretrain.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lamda.storage import manifest
from lamda.storage.metrics import read_metrics
from tests.faults.harness import Place
from tests.launch import ENVIRONMENT, ROOT

KILLED_AT = 6
LAST = "checkpoints/step-00000010"


def start(place: Place, *arguments: str, fault: str = "") -> subprocess.Popen[str]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(place.folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    variables = {**cache, "LAMDA_ALLOW_FAULTS": "1", "LAMDA_FAULT": fault}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **variables},
        stdout=(place.folder / "out.log").open("a"),
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Place:
    """Runs of 10 steps in fp32: `torch`; `straight` in JAX; `killed` in JAX, in the save after step 6, and gone on."""
    place = Place.make(tmp_path_factory.mktemp("flax"), tokenizer_path)

    def arguments(run: str, *more: str) -> list[str]:
        own = ["--config", f"{place.folder}/run.yaml", "--run.dir", f"{place.folder}/{run}"]
        return [*own, "--deepspeed.config", "deepspeed/fp32.json", "--eval.every", "5", *more]

    torch = start(place, "scripts/pretrain.py", *arguments("torch"))
    killed = start(place, "scripts/pretrain_flax.py", *arguments("killed"), fault=f"save.written:kill:0:{KILLED_AT}")
    assert (torch.wait(1200), killed.wait(1200)) == (0, -9), (place.folder / "out.log").read_text()
    assert len(rows_of(place, "killed")) < 10
    refused = arguments("straight", "--train.lora_rank", "4", "--model.weights", "x.safetensors")
    batches = [arguments("killed"), arguments("straight"), refused]
    done = start(place, "tests/devices/run_worker.py", json.dumps(batches))
    assert done.wait(1200) == 0, (place.folder / "out.log").read_text()
    assert json.loads((place.folder / "out.log").read_text().splitlines()[-1]) == [0, 0, 2]
    return place


def rows_of(place: Place, run: str) -> list[dict[str, Any]]:
    return read_metrics(place.folder / run / "metrics.jsonl")


def test_a_run_sees_the_batches_of_the_pytorch_run_and_follows_its_losses(place):
    jax, torch = rows_of(place, "straight"), rows_of(place, "torch")
    assert [row["batch_digest"] for row in jax] == [row["batch_digest"] for row in torch]
    for name in ("loss", "grad_norm", "lr", "tokens"):
        expected = [row[name] for row in torch]
        np.testing.assert_allclose([row[name] for row in jax], expected, rtol=0, atol=1e-4, err_msg=name)
    assert torch[0]["loss"] - torch[-1]["loss"] > 0.5
    assert set(jax[-1]) == set(torch[-1])
    for name in ("eval/loss", "eval/bits_per_byte"):
        assert jax[-1][name] == pytest.approx(torch[-1][name], abs=1e-4)


def test_killed_in_a_save_it_continues_to_the_same_bits(place):
    for name in ("loss", "grad_norm", "batch_digest"):
        assert [row[name] for row in rows_of(place, "killed")] == [row[name] for row in rows_of(place, "straight")]
    weights = [(place.folder / run / LAST / "model.safetensors").read_bytes() for run in ("killed", "straight")]
    assert weights[0] == weights[1]


def test_its_checkpoint_is_whole_and_has_the_pytorch_runs_names(place):
    there = place.folder / "straight" / LAST
    assert manifest.problem_of(there) is None
    message = manifest.read(there)
    assert manifest.framework_of(message) == "flax"
    assert message["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert any(name.startswith("state/") for name in message["files"])
    shapes = [
        {name: array.shape for name, array in load_file(place.folder / run / LAST / "model.safetensors").items()}
        for run in ("straight", "torch")
    ]
    assert shapes[0] == shapes[1]
