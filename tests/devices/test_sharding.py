"""Whatever mesh the devices make, the same steps come out. CPU devices stand for others, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lamda.config.errors import UserError
from lamda.config.schema import FlaxConfig, ModelConfig
from lamda.engines.flax.sharding import make_mesh
from tests.launch import ENVIRONMENT, ROOT

WORKER = Path(__file__).with_name("mesh_worker.py")
Found = dict[str, dict]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one device and eight of them computed."""
    folder = tmp_path_factory.mktemp("meshes")
    workers = [
        subprocess.Popen([sys.executable, WORKER, count, folder], cwd=ROOT, env={**os.environ, **ENVIRONMENT})
        for count in ("1", "8")
    ]
    assert [worker.wait(1200) for worker in workers] == [0, 0]
    return {key: value for file in folder.glob("*.json") for key, value in json.loads(file.read_text("utf-8")).items()}


@pytest.mark.parametrize("mesh", ["8x1x1", "2x4x1", "2x2x2"])
def test_a_mesh_computes_what_one_device_does(found, mesh):
    one, many = found["1x1x1"], found[mesh]
    for figures in ("losses", "norms", "domains"):
        np.testing.assert_allclose(many[figures], one[figures], rtol=0, atol=1e-5)
    assert many["written"] == one["written"]
    assert set(many["weights"]) == set(one["weights"])
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(many["weights"][name], weight, rtol=0, atol=1e-5, err_msg=name)


def test_the_shards_of_a_fresh_engine_are_those_of_the_drawn_weights(found):
    assert [found[mesh]["wrong at start"] for mesh in ("1x1x1", "8x1x1", "2x4x1", "2x2x2")] == [[]] * 4


def test_a_checkpoint_continues_on_another_mesh(found):
    assert found["moved"] == found["2x2x2"]["weights"]
    np.testing.assert_allclose(found["moved on"]["losses"], found["on"]["losses"], rtol=0, atol=1e-5)


def test_a_device_has_one_layers_weights_and_scores_at_a_time(found):
    """Each matrix comes together in the forward pass and again in the backward pass, the embedding once."""
    layer = {"1,32,32": 2 * 4, "1,64,32": 2 * 2, "1,32,64": 2 * 1}
    assert found["program"] == {"gathered": {**layer, "96,32": 1}, "whole": [], "scores": []}


def test_a_bit_that_turns_over_in_one_devices_copy_is_noticed(found):
    assert found["odd"] == []
    assert found["odd after a flip"] == [0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FlaxConfig(fsdp=3), r"flax.fsdp 3 x flax.tensor 1 is 3, which does not divide the 1 devices"),
        (FlaxConfig(tensor=2), r"flax.tensor 2 is 2, which does not divide"),
    ],
)
def test_a_mesh_that_the_devices_do_not_make_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config, ModelConfig())
