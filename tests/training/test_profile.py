"""A trace holds the steps that were asked for, in the format that Perfetto reads, also of a run that ends before."""

import gzip
import json

import pytest
import torch
from torch.profiler import record_function

from lamda.config.loading import load_config
from lamda.config.settings import ConfigError
from lamda.training.loggers import Profile


def run(folder, steps, *, until):
    profile = Profile(steps, folder)
    for step in range(1, until + 1):
        profile.begin(step)
        with record_function(f"step {step}"):
            torch.ones(3).sum()
        profile.end(step)
    profile.write()


@pytest.mark.parametrize(("until", "traced"), [(5, ["step 2", "step 3"]), (2, ["step 2"])])
def test_the_steps_between_are_traced(tmp_path, until, traced):
    run(tmp_path / "profile", (2, 3), until=until)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-2-to-3.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert sorted({event["name"] for event in events if event["name"].startswith("step ")}) == traced


@pytest.mark.parametrize("steps", [None, (7, 9)])
def test_without_such_steps_nothing_is_written(tmp_path, steps):
    run(tmp_path / "profile", steps, until=3)
    assert not (tmp_path / "profile").exists()


def test_steps_in_the_wrong_order_are_refused():
    with pytest.raises(ConfigError, match=r"train\.profile: the first step, 4, comes after the last, 3"):
        load_config(["--train.steps", "9", "--train.profile", "[4, 3]"])
