"""What docs/parallelism.md says of DeepSpeed's AutoTP and Ulysses; where this fails, the page is out of date."""

import json

import pytest

from tests.launch import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    trials = []
    for way in ("Ulysses", "AutoTP"):
        folder = str(tmp_path_factory.mktemp("saved"))
        main, _ = run_ranks(["-m", "tests.long.parallelism_worker", folder, way], world_size=2)
        trials += [json.loads(line) for line in main.stdout.splitlines() if line.startswith('{"trial"')]
    print(*trials, sep="\n")
    return {trial["trial"]: trial for trial in trials}


@pytest.mark.parametrize("stage", [1, 2])
def test_ulysses_with_an_attention_of_its_own_is_exact(found, stage):
    trial = found[f"Ulysses, stage {stage}"]
    assert trial["loss"] < 1e-6
    assert trial["norm"] == pytest.approx(1, abs=1e-6)
    assert trial["bias"] == 0
    assert trial["resumes"]


def test_at_stage_3_ulysses_halves_the_gradients(found):
    assert found["Ulysses, stage 3"]["norm"] == pytest.approx(0.5, abs=1e-3)


def test_ulysses_does_not_know_the_model_and_its_keys_alone_train_another_one(found):
    assert found["Ulysses, registered"]["error"].endswith("object has no attribute 'get_text_config'")
    assert found["Ulysses, keys alone"]["loss"] > 0.01


def test_auto_tp_does_not_split_the_bias(found):
    assert "Not able to determine model policy automatically" in found["AutoTP, alone"]["error"]
    assert "size of tensor a (2) must match the size of tensor b (4)" in found["AutoTP, layers named"]["error"]
    by_hand = found["AutoTP, local heads"]
    assert by_hand["loss"] < 1e-6
    assert by_hand["bias"] > 0.001
    assert by_hand["norm"] < 1 - 1e-5
    assert by_hand["query"] == [16, 32]
