"""What `lamda plan` promises about a run, against numbers worked out by hand and by others."""

import json
import subprocess
import sys

import pytest

from lamda.cluster.plan import main, plan
from lamda.config import Config
from lamda.config.errors import UserError

# The 137b is the total that Google's own framework states for this shape.
TOTALS = {"2b": 2_179_138_560, "8b": 8_721_174_528, "137b": 137_702_416_384}


@pytest.mark.parametrize(("preset", "total"), TOTALS.items())
def test_the_parts_add_up_to_the_known_totals(preset, total):
    planned = plan(Config.model_validate({"model": {"preset": preset}, "train": {"steps": 1}}), gpus=1)
    assert planned["parameters"] == sum(planned["parameters_by_part"].values()) == total


def test_the_batch_arithmetic_of_a_small_run():
    train = {"tokens": 1001, "global_batch_size": 12, "micro_batch_size": 2}
    planned = plan(Config.model_validate({"data": {"sequence_length": 10}, "train": train}), gpus=3)
    assert planned["gradient_accumulation"] == 2
    assert planned["tokens_per_step"] == 120
    assert (planned["steps"], planned["tokens"]) == (9, 1080)
    assert planned["flops"] == planned["flops_per_token"] * 1080


def test_ranks_that_cannot_share_the_batch_name_the_nearest_that_can():
    config = Config.model_validate({"train": {"steps": 1, "global_batch_size": 24, "micro_batch_size": 2}})
    with pytest.raises(UserError, match=r"5 ranks cannot share 12 micro-batches.* 4 and 6$"):
        plan(config, gpus=5)


@pytest.mark.parametrize("gpus", [0, -1])
def test_a_run_needs_a_rank(gpus):
    with pytest.raises(UserError, match="--gpus"):
        plan(Config.model_validate({"train": {"steps": 1}}), gpus=gpus)


def test_flags_and_overrides_may_stand_in_any_order(capsys):
    assert main(["--train.steps", "3", "--gpus", "2", "--config=configs/tiny.yaml", "--json", "--run.seed", "5"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["gpus"], planned["steps"]) == (2, 3)


def test_the_table_shows_every_number(capsys):
    assert main(["--config", "configs/lamda_2b.yaml", "--gpus", "8"]) == 0
    told = capsys.readouterr().out
    config = Config.model_validate({"model": {"preset": "2b"}, "train": {"steps": 501_000}})
    for value in plan(config, gpus=8)["parameters_by_part"].values():
        assert f"{value:,}" in told
    assert all(number in told for number in ("2,179,138,560", "262,144", "501,000", "131,334,144,000"))


def test_a_plan_needs_no_torch():
    script = "import sys, lamda.cluster.plan; assert not {'torch', 'datasets', 'deepspeed'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
