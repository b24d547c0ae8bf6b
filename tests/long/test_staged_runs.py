"""A run of three stages under DeepSpeed, killed on changing numbers of ranks, ends with the weights of an unbroken one.

Batch and row length grow, so the micro-batches of a step and their shapes change.
"""

import random

import pytest
import yaml

from lamda.storage.metrics import read_metrics
from tests.conftest import make_text, write_shard
from tests.faults.harness import Place

EXACT = ("step", "stage", "loss", "lr", "batch_digest", "tokens", "samples", "epoch/files")


@pytest.fixture
def place(tmp_path, tokenizer_path):
    place = Place.make(tmp_path, tokenizer_path)
    write_shard(tmp_path / "other.jsonl", [make_text(400 + n, 90) for n in range(40)])
    config = yaml.safe_load((tmp_path / "run.yaml").read_text())
    config["train"].update(steps=12, micro_batch_size=4)
    files = [f"{tmp_path}/train/*", f"{tmp_path}/other.jsonl"]
    config["stages"] = [
        {"name": "main", "until": "4 steps"},
        {"name": "large", "until": "8 steps", "data": {"files": files}, "train": {"global_batch_size": 24, "lr": 5e-3}},
        {"name": "long", "data": {"sequence_length": 64}, "train": {"micro_batch_size": 2}},
    ]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return place


def end(place, run):
    rows = [[row.get(name) for name in EXACT] for row in read_metrics(place.folder / run / "metrics.jsonl")]
    return rows, (place.folder / run / "checkpoints/step-00000012/model.safetensors").read_bytes()


def test_kills_on_one_and_two_ranks_in_any_stage_change_no_bit(place):
    draw = random.Random(3)
    place.finish("straight", ranks=1)
    faults = (
        f"forward:kill:*:{draw.randint(2, 4)}",
        "save.done:kill:*:4",
        f"loss:kill:*:{draw.randint(6, 8)}",
        f"update:kill:*:{draw.randint(9, 12)}",
    )
    for number, fault in enumerate(faults):
        assert any(place.run("killed", fault=fault, ranks=1 + number % 2)), fault
    place.finish("killed", ranks=2)
    assert end(place, "killed") == end(place, "straight")
