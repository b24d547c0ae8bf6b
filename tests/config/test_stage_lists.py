"""Stages follow from the configuration alone; every mistake in one is named with file, line and key."""

import pytest

from lamda.cluster.plan import Machine, plan
from lamda.cluster.plan_text import plan_text
from lamda.config.errors import UserError
from lamda.config.help import to_yaml
from lamda.config.loading import load_config
from lamda.config.stages import plan_stages, stage_at
from lamda.storage.state import RunState
from lamda.training.lr_schedule import learning_rate, rate_in, remarks

BASE = """\
model: {vocab_size: 400, d_model: 32, n_layers: 2, n_heads: 2, d_head: 16, d_ff: 64}
data: {corpus: pile, sequence_length: 32}
train: {tokens: 20000, global_batch_size: 8, micro_batch_size: 2, lr: 1e-2, warmup_steps: 3}
stages:
"""
THREE = """\
  - name: main
    until: 10 steps
  - until: 8_000 tokens
    train: {global_batch_size: 16}
  - name: long
    data: {sequence_length: 64, files: [x/*]}
    train: {lr: 1e-3, schedule: wsd}
"""


def load(folder, stages, *flags):
    path = folder / "run.yaml"
    path.write_text(BASE + stages)
    return load_config(["--config", str(path), *flags])


def test_a_stage_keeps_what_it_does_not_change_and_begins_where_the_one_before_ends(tmp_path):
    config = load(tmp_path, THREE)
    main, second, third = stages = plan_stages(config)
    assert [each.name for each in stages] == ["main", "2", "long"]
    assert [(each.first, each.last, each.tokens) for each in stages] == [(0, 10, 0), (10, 21, 2560), (21, 33, 8192)]
    assert [each.config.train.global_batch_size for each in stages] == [8, 16, 16]
    assert [each.config.data.sequence_length for each in stages] == [32, 32, 64]
    assert (second.config.data.files, third.config.data.files) == (None, ("x/*",))
    assert [each.schedule for each in stages] == [(0, 21), (0, 21), (21, 33)]
    assert config.steps == 33
    assert [stage_at(stages, step).name for step in (0, 9, 10, 21, 33)] == ["main", "main", "2", "long", "long"]
    assert main.config.stages == ()
    path = tmp_path / "saved.yaml"
    path.write_text(to_yaml(config))
    assert load_config(["--config", str(path)]) == config


def test_a_schedule_lasts_until_the_next_stage_that_names_a_rate(tmp_path):
    main, second, third = plan_stages(load(tmp_path, THREE))
    assert rate_in(main, RunState(step=5)) == learning_rate(6, train=main.config.train, steps=21)
    assert rate_in(second, RunState(step=12)) == learning_rate(13, train=main.config.train, steps=21)
    assert rate_in(third, RunState(step=21)) == learning_rate(1, train=third.config.train, steps=12)
    assert third.config.train.warmup_steps == 3
    short = THREE.replace("lr: 1e-3,", "lr: 1e-3, warmup_steps: 50,")
    (message,) = remarks(plan_stages(load(tmp_path, short)), RunState(), before=None)
    assert "never reaches train.lr 1.00e-03: train.warmup_steps is 50, and its schedule has 12 steps" in message


@pytest.mark.parametrize(
    ("stages", "line", "message"),
    [
        ("  - until: 5\n  - {}\n", 5, "item 1: until: should be `8000 steps` or `4e9 tokens`, not '5'"),
        ("  - until: 5 steps\n    untill: 3\n  - {}\n", 6, "untill: there is no such key; did you mean 'until'"),
        ("  - until: 5 steps\n    train: {lr: 1}\n  - {}\n", 6, "item 1: train.lr: the first stage has the run's own"),
        ("  - {}\n  - {}\n", 5, "item 1: until: is missing"),
        ("  - until: 5 steps\n  - until: 9 steps\n", 6, "item 2: until: the last stage ends with the run"),
        ("  - until: 5 steps\n  - until: 4 steps\n  - {}\n", 6, "item 2: until: ends at step 4, and the stage begins"),
        ("  - until: 5 steps\n  - train:\n      sede: 1\n", 7, "item 2: train.sede: cannot change in a stage"),
        ("  - until: 5 steps\n  - train:\n      lrr: 1\n", 7, "did you mean 'train.lr'"),
        ("  - until: 5 steps\n  - train:\n      lr: fast\n", 7, "item 2: train.lr: "),
        (
            "  - until: 5 steps\n  - train:\n      global_batch_size: 9\n",
            6,
            "2 does not divide train.global_batch_size 9",
        ),
        ("  - {name: a, until: 5 steps}\n  - name: a\n", 6, "item 2: name: two stages are called 'a'"),
        ("  - {name: '2', until: 5 steps}\n  - {}\n", 6, "item 2: name: two stages are called '2'"),
        ('  - {name: "a\\nb", until: 5 steps}\n  - {}\n', 5, "item 1: name: should hold no line break"),
        ("  - until: 5.5 steps\n  - {}\n", 5, "item 1: until: should be `8000 steps`"),
        ("  - until: 1e400 tokens\n  - {}\n", 5, "item 1: until: should be `8000 steps`"),
        ("  - until: 1e99 tokens\n  - {}\n", 6, "item 2: until: ends at step 79, and the stage begins after step 39"),
        ("  - until: 5 steps\n  - train: {lr: -1}\n", 6, "item 2: train.lr: should be greater than 0, not -1"),
        ("  name: a\n", 4, "stages: should be a list of items that begin with `- `"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, stages, line, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, stages)
    found = [text for text in str(caught.value).splitlines() if message in text]
    assert found, str(caught.value)
    assert f"run.yaml:{line}: " in found[0]


def test_an_empty_list_is_no_stages(tmp_path):
    assert load(tmp_path, "").stages == load(tmp_path, "  []\n").stages == ()


def test_a_card_behind_files_is_refused(tmp_path):
    stages = "  - until: 5 steps\n  - data: {corpus: lamda_mixture}\n"
    with pytest.raises(UserError, match=r"run\.yaml:6: stages, item 2: data\.corpus: data\.files, from before, would"):
        load(tmp_path, stages, "--data.files", "x/*")
    stages = stages.replace("corpus:", "files: null, corpus:")
    assert plan_stages(load(tmp_path, stages, "--data.files", "x/*"))[1].config.data.files is None


def test_a_plan_adds_the_stages_up(tmp_path):
    config = load(tmp_path, THREE)
    planned = plan(config, Machine(gpus=2, price=2.0))
    alone = [plan(each.config, Machine(gpus=2)) for each in plan_stages(config)]
    assert [(each.name, each.steps, each.tokens) for each in planned.stages] == [
        ("main", 10, 2560), ("2", 11, 5632), ("long", 12, 12288),
    ]  # fmt: skip
    assert planned.steps == 33
    assert planned.tokens == sum(each.tokens for each in planned.stages)
    assert planned.time.seconds == pytest.approx(sum(each.seconds for each in planned.stages))
    assert planned.memory.peak == max(each.memory.peak for each in alone)
    assert planned.flops == sum(
        each.tokens * one.flops_per_token for each, one in zip(planned.stages, alone, strict=True)
    )
    assert ["long", "12", "16", "64", "12,288"] in [line.split()[:5] for line in plan_text(planned).splitlines()]
