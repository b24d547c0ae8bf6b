"""The speed benchmark: its arithmetic is the model's, and all of it runs on a small shape."""

import json
import sys

import pytest

from benchmarks.train import PARTS
from lamda.config import ModelConfig
from lamda.model.counts import flops_per_token
from lamda.proof.gemm import shapes
from tests.conftest import make_text, write_shard
from tests.launch import run_ranks

MODEL = {"vocab_size": 400, "d_model": 32, "n_layers": 3, "n_heads": 2, "d_head": 16, "d_ff": 64}


def test_the_matrix_products_are_all_of_a_models_matrix_flops():
    model = ModelConfig(**MODEL)
    of_products = sum(3 * 2 * each.inputs * each.outputs * each.count for each in shapes(model))
    assert of_products == flops_per_token(model, 0)


def test_a_step_is_measured_beside_the_matrix_rate_and_a_plain_loop(tmp_path, tokenizer_path):
    write_shard(tmp_path / "text.jsonl", [make_text(number, 400) for number in range(40)])
    flags = {
        "data.corpus": "standard_library", "data.files": tmp_path / "text.jsonl", "tokenizer.path": tokenizer_path,
        "data.eval_files": tmp_path / "text.jsonl", "data.sequence_length": 32,
        "train.steps": 9, "train.global_batch_size": 4, "train.micro_batch_size": 2, "train.compile": "never",
        **{f"model.{key}": value for key, value in MODEL.items()},
    }  # fmt: skip
    words = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    own = ["--steps", "3", "--gemm-seconds", "0.3", "--plain", "--json", str(tmp_path / "train.json")]
    (done,) = run_ranks(["scripts/benchmark.py", "train", *own, *words], world_size=1)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["tokens_per_second"] == pytest.approx(4 * 32 / report["step_seconds"])
    flops = report["tokens_per_second"] * flops_per_token(ModelConfig(**MODEL), 32)
    assert report["model_flops_per_second"] == pytest.approx(flops)
    for name in ("share_of_matrix_rate", "engine_to_plain"):
        assert len(report[name]["rounds"]) == 3
        assert min(report[name]["rounds"]) <= report[name]["median"] <= max(report[name]["rounds"])
    assert report["matrix_rate"]["seconds"] >= 0.3
    assert set(report["parts"]) == set(PARTS)
    assert all(seconds >= 0 for seconds in report["parts"].values())
    assert report["mfu"] is None, "no MFU without a data sheet"
    assert "| share of the matrix rate |" in done.stdout
    assert report["versions"]["python"] == sys.version.split()[0]
