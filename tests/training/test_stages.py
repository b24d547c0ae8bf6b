"""A run of stages ends the same wherever it is stopped, and a source that several stages read is never read twice."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.stages import plan_stages
from lamda.data.corpus import fingerprint, open_corpus
from lamda.data.drop_list import Entry, lines_of
from lamda.data.hashing import document_hash
from lamda.runs.branch import main as branch
from lamda.runs.trace import main as trace_step
from lamda.runs.trace import trace
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.inputs import Inputs
from lamda.training.resume import _check_stages, find_resume_point
from lamda.training.stages import StagedInputs
from tests.conftest import make_text, write_shard
from tests.data.ranks import Numbers, config_of, read, write_file
from tests.faults.harness import Place
from tests.launch import ENVIRONMENT, ROOT

EXACT = (
    "step", "stage", "loss", "lr", "grad_norm", "batch_digest", "tokens", "samples", "epoch/files", "epoch/other",
    "eval/loss", "rollbacks",
)  # fmt: skip
BATCH = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_path):
    """`run.yaml` with three stages: one source, two with a larger batch and another schedule, one in longer rows."""
    place = Place.make(tmp_path_factory.mktemp("stages"), tokenizer_path)
    write_shard(place.folder / "other.jsonl", [make_text(400 + n, 90) for n in range(40)])
    files = {"files": "train/*", "other": "other.jsonl"}
    sources = [{"name": name, "license": "none", "files": f"{place.folder}/{each}"} for name, each in files.items()]
    for name, own in (("one", sources[:1]), ("two", sources)):
        card = {"name": name, "description": name, "sources": own, "domains": ["words"]}
        (place.folder / f"{name}.yaml").write_text(yaml.safe_dump(card))
    config = yaml.safe_load((place.folder / "run.yaml").read_text())
    dropped = Entry(document_hash(make_text(0, 90)), "near duplicate")
    drop = str(place.folder / "drop.jsonl")
    Path(drop).write_bytes(b"".join(lines_of({"files": []}, [dropped])))
    one, two = (str(place.folder / f"{name}.yaml") for name in ("one", "two"))
    del config["data"]["files"]
    config["data"]["corpus"] = one
    config["train"].update(steps=15, spike_window=8)
    config["checkpoint"] = {"every": 4, "keep": 99}
    config["eval"] = {"every": 5}
    config["stages"] = [
        {"name": "main", "until": "5 steps"},
        {"name": "mix", "until": "2816 tokens", "data": {"corpus": two},
         "train": {"schedule": "wsd", "lr": 3e-3, "global_batch_size": 12}},
        {"name": "long", "data": {"corpus": one, "sequence_length": 48, "drop": drop},
         "train": {"micro_batch_size": 1}},
    ]  # fmt: skip
    (place.folder / "run.yaml").write_text(yaml.safe_dump(config))
    return place


def train(place, run, *flags, fault="", spoiled_after="", config="run.yaml"):
    variables = {"LAMDA_ALLOW_FAULTS": "1", "LAMDA_FAULT": fault, "TEST_SPOIL_AFTER": spoiled_after}
    command = [sys.executable, "-m", "tests.training.plain_framework", "--config", str(place.folder / config)]
    command += ["--run.dir", str(place.folder / run), *flags]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT, **variables}, capture_output=True, text=True, check=False
    )


def rows(place, run):
    return [[row.get(name) for name in EXACT] for row in read_metrics(place.folder / run / "metrics.jsonl")]


def end(place, run, step=15):
    path = place.folder / run / "checkpoints" / f"step-{step:08d}"
    state = json.loads((path / "run_state.json").read_text()) | {"wandb_id": None}
    return state, (path / "model.safetensors").read_bytes(), (path / "state" / "moments.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(place):
    done = train(place, "straight")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_each_stage_has_its_text_rates_rows_and_batch(place, straight):
    found = read_metrics(place.folder / "straight" / "metrics.jsonl")
    assert [row["stage"] for row in found] == ["main"] * 5 + ["mix"] * 4 + ["long"] * 6
    sizes = [
        (after["samples"] - before["samples"], after["tokens"] - before["tokens"]) for before, after in pairwise(found)
    ]
    assert sizes == [(8, 256)] * 4 + [(12, 384)] * 4 + [(12, 576)] * 6
    assert [("epoch/other" in row) for row in found] == [False] * 5 + [True] * 4 + [False] * 6
    # the second schedule lasts 10 steps, with the three of warm-up of the first stage; its last fifth falls to a tenth
    assert [row["lr"] for row in found[5:]] == pytest.approx([1e-3, 2e-3, *[3e-3] * 6, 1.65e-3, 3e-4])
    assert [path.name for path in (place.folder / "straight" / "checkpoints").glob("step-*0[59]")], "saved at each end"
    assert "stage mix: steps 6 to 9, 1,536 tokens; data.corpus " in straight.stdout
    for step in (5, 6, 12):  # checked against the step's digest
        assert len(list(trace(RunDirectory(place.folder / "straight"), step=step, row=None))) == (8 if step < 6 else 12)


def test_the_trace_of_a_step_names_the_drop_list_of_its_stage(place, straight, capsys):
    for step, wanted in (
        ("6", "row 0\n---"),
        ("12", f"row 0, without the texts of {place.folder / 'drop.jsonl'}\n---"),
    ):
        assert trace_step([str(place.folder / "straight"), "--step", step, "--row", "0"]) == 0
        assert wanted in capsys.readouterr().out


def test_killed_at_random_and_on_the_ends_of_stages_it_ends_the_same(place, straight):
    draw = random.Random(7)
    for fault in (
        "commit.renamed:kill:0:5",
        f"loss:kill:0:{draw.randint(6, 9)}",
        "fetch:kill:0:10",
        f"update:kill:0:{draw.randint(11, 15)}",
    ):
        assert train(place, "killed", fault=fault).returncode == -9, fault
    done = train(place, "killed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(place, "killed") == rows(place, "straight")
    assert end(place, "killed") == end(place, "straight")


def test_a_rollback_to_an_earlier_stage_passes_what_was_read_and_is_resumed_exactly(place, straight):
    """The second stage has no checkpoint yet, so the run returns to the end of the first one, and its samples count."""
    config = yaml.safe_load((place.folder / "run.yaml").read_text())
    config["stages"][1]["until"] = "20 steps"
    (place.folder / "later.yaml").write_text(yaml.safe_dump(config))
    flags = ("--train.spike_threshold", "4", "--eval.every", "99", "--checkpoint.every", "99", "--train.steps", "24")
    done = train(place, "rolled", *flags, spoiled_after="14", config="later.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "back to step-00000005, without samples 40 to " in done.stderr
    run = place.folder / "rolled"
    before, after = read_metrics(run / "metrics.discarded.jsonl"), read_metrics(run / "metrics.jsonl")
    assert {row["step"] for row in before} == set(range(6, 16))
    for source in ("epoch/files", "epoch/other"):
        assert after[5][source] > before[-1][source]
    assert [row["rollbacks"] for row in after] == [0] * 5 + [1] * 19
    assert len(list(trace(RunDirectory(run), step=7, row=None))) == 12

    assert train(place, "again", *flags, spoiled_after="14", fault="forward:kill:0:17", config="later.yaml").returncode
    done = train(place, "again", *flags, config="later.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(place, "again") == rows(place, "rolled")
    assert end(place, "again", 24) == end(place, "rolled", 24)


def test_stages_that_have_begun_cannot_change_and_later_ones_may(place, straight):
    def change(name, **changes):
        config = yaml.safe_load((place.folder / "run.yaml").read_text())
        for index, stage in enumerate(config["stages"]):
            stage.update(changes.get(f"stage_{index}", {}))
        (place.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return f"{name}.yaml"

    assert train(place, "stopped", fault="save.done:kill:0:8").returncode == -9  # in `mix`
    main = change("main", stage_0={"until": "4 steps"})
    refused = train(place, "stopped", "--train.lr", "5e-3", config=main)
    assert refused.returncode == 2
    assert "stages that the run has begun cannot change: stage main: train.lr was 0.01, is 0.005" in refused.stderr
    assert "stage main: its last step was 5, is 4" in refused.stderr
    later = change("longer", stage_2={"data": {"corpus": str(place.folder / "two.yaml")}})
    allowed = train(place, "stopped", fault="forward:kill:0:9", config=later)
    assert "stage long, which is to come: data.corpus was " in allowed.stderr
    assert "sequence_length was 48, is 32" in allowed.stderr


def test_a_list_that_lacks_a_stage_that_has_begun_is_rejected(place, caplog):
    stages = plan_stages(load_config(["--config", str(place.folder / "run.yaml")]))
    state = RunState(step=7, stage=2, samples=5 * 8 + 2 * 12)
    for before, name in ((stages, "mix"), ((), "2")):  # no stages: this version rejects the checkpoint's settings
        with pytest.raises(UserError, match=f"stage {name} is missing"):
            _check_stages(stages[:1], before, state, place.folder)
    _check_stages(stages, stages, state, place.folder)
    assert caplog.messages == []
    _check_stages(stages, stages[:1], replace(state, samples=7 * 8), place.folder)
    assert "has read 56 rows, by its stages 64" in caplog.messages[-1]


def test_a_branch_with_fresh_data_may_have_other_stages(place, straight, tmp_path, world):
    for flags, stage in (("--stages=null", 1), ("--data.shuffle=1", 3)):
        new = RunDirectory(tmp_path / str(stage))
        flags = ("--fresh-data", flags, "--data.corpus", str(place.folder / "two.yaml"))
        branch([f"{place.folder}/straight@9", "--to", str(new.path), *flags])
        point = find_resume_point(load_config(["--config", str(new.config)]), new, world, framework="plain")
        assert (point.state.step, point.state.stage, point.state.start.sample) == (9, stage, 5 * 8 + 4 * 12)
    with pytest.raises(UserError, match=r"stages that the run has begun cannot change: stage main: train\.lr was"):
        branch([f"{place.folder}/straight@9", "--to", str(tmp_path / "new"), "--train.lr", "1e-3"])


def staged(folder, *cards):
    """Stages of 12 rows a step over sources of numbers; a card is its sources' weights by name, and its steps."""
    stages, step = [], 0
    for number, (weights, steps) in enumerate(cards, start=1):
        config = config_of(folder, [1.0], sequence_length=8, shuffle=1, cache_dir=None)
        sources = [
            {"name": name, "license": "none", "files": f"{folder}/{name}.jsonl", "weight": weight}
            for name, weight in weights.items()
        ]
        path = folder / f"card-{number}.yaml"
        path.write_text(yaml.safe_dump({"name": "c", "description": "numbers", "sources": sources}))
        data = config.data.model_copy(update={"corpus": str(path)})
        (whole,) = plan_stages(config.model_copy(update={"data": data}))
        stages.append(replace(whole, number=number, first=step, last=step + steps))
        step += steps
    return tuple(stages)


def opened(stage):
    corpus = open_corpus(stage.config.data)
    return Inputs(stage.config, None, corpus, Numbers(), (), fingerprint(corpus, stage.config, Numbers()))


def read_stages(stages, world_size):
    """The ids of the rows of each stage, and the states in which they begin."""
    inputs, state, found, states = StagedInputs(stages, opened), RunState(), [], []
    for stage in stages:
        state = inputs.enter(state)
        assert state.stage == stage.number
        states.append(state)
        corpus = replace(inputs.of(stage.number).corpus, start=state.start)
        steps = stage.last - stage.first
        run = read(stage.config, corpus, Numbers(), count=steps, world_size=world_size, after=state)
        found.append(np.concatenate(run.ids))
        state = replace(state, step=stage.last, consumed=run.consumed, order=run.order)
    return found, [*states, state], inputs


@pytest.fixture
def numbers(tmp_path):
    """Two sources of 3,000 and 900 tokens, each token different."""
    for name, first, last in (("a", 1000, 4000), ("b", 5000, 5900)):
        write_file(tmp_path / f"{name}.jsonl", [list(range(at, min(at + 50, last))) for at in range(first, last, 50)])
    return tmp_path


def test_a_source_goes_on_where_an_earlier_stage_left_it(numbers):
    stages = staged(numbers, ({"a": 1.0}, 7), ({"a": 1.0, "b": 1.0}, 9), ({"b": 3.0, "a": 1.0}, 4), ({"a": 1.0}, 13))
    (alone, states, _), (together, others, _) = (read_stages(stages, world_size) for world_size in (1, 3))
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))
    assert states == others
    assert [state.start.numbers for state in states[:4]] == [(), (0, 1), (1, 0), (0,)]
    targets = np.concatenate([ids[:, 1:].ravel() for ids in alone])
    for first, last in ((1000, 4000), (5000, 5900)):
        counts = np.bincount(targets[(targets >= first) & (targets < last)] - first, minlength=last - first)
        assert counts.max() == 1, "nothing comes twice before the epoch ends"
    assert np.bincount(targets)[1000:4000].sum() > 2000


def test_stages_with_the_same_text_are_read_as_one(numbers):
    halves, whole = (staged(numbers, *cards) for cards in ([({"a": 1.0}, 5), ({"a": 1.0}, 6)], [({"a": 1.0}, 11)]))
    halves = tuple(replace(stage, config=whole[0].config) for stage in halves)
    assert np.array_equal(np.concatenate(read_stages(halves, 1)[0]), read_stages(whole, 1)[0][0])


def test_a_rollback_over_the_end_of_a_stage_passes_all_that_was_read(numbers):
    stages = staged(numbers, ({"a": 1.0}, 7), ({"a": 1.0, "b": 1.0}, 9))
    _, (begin, middle, end), inputs = read_stages(stages, 1)
    target = replace(begin, step=5, consumed=60)
    skipped, later = inputs.rolled_back(target, replace(end, stage=2))
    (name,) = later
    assert skipped == (60, 84 + 54)  # half of the second stage's 108 rows came from the source of the first
    assert later[name]["rows"] == 54
    again = target.with_parked(later)
    again = inputs.enter(replace(again, step=7, consumed=84 + 54 + 24))
    assert again.start.rows == (84 + 54 + 24, 54)
    assert inputs.rolled_back(replace(begin, consumed=12), replace(begin, consumed=36)) == ((12, 36), {})
    assert middle.start.sample == 84
