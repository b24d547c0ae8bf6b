"""Learning rates are the textbook's functions of the step, without jumps."""

import itertools
import random
from math import cos, pi

import pytest

from lamda.config.schema import Config, TrainConfig
from lamda.config.stages import plan_stages
from lamda.storage.state import RunState
from lamda.training.lr_schedule import learning_rate, next_learning_rate, remarks, total_steps

PEAK, WARMUP, STEPS, FLOOR = 3e-3, 7, 101, 0.1


def rates(schedule, **changes):
    values = {
        "steps": STEPS,
        "lr": PEAK,
        "warmup_steps": WARMUP,
        "min_lr_ratio": FLOOR,
        "schedule": schedule,
        **changes,
    }
    train = TrainConfig(**values)
    return {step: learning_rate(step, train=train, steps=STEPS) for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_is_a_straight_line_from_its_first_part_to_the_peak(schedule):
    found = rates(schedule)
    assert found[1] == pytest.approx(PEAK / WARMUP)
    for step in range(1, WARMUP + 1):
        assert found[step] == pytest.approx(PEAK * step / WARMUP)
    assert found[WARMUP] == max(found.values()) == pytest.approx(PEAK)


def test_cosine_is_half_a_cosine_from_the_peak_to_the_floor():
    found = rates("cosine")
    assert found[(WARMUP + STEPS) // 2] == pytest.approx(PEAK * (1 + FLOOR) / 2)
    assert found[STEPS] == pytest.approx(PEAK * FLOOR)
    for step in range(WARMUP, STEPS + 1):
        angle = pi * (step - WARMUP) / (STEPS - WARMUP)
        assert found[step] == pytest.approx(PEAK * FLOOR + PEAK * (1 - FLOOR) * (1 + cos(angle)) / 2)


def test_wsd_is_stable_and_then_falls_in_a_straight_line_to_the_floor():
    found = rates("wsd", decay_fraction=0.25)
    begin = STEPS * 0.75
    for step in range(WARMUP, STEPS + 1):
        fallen = max(0.0, step - begin) / (STEPS - begin)
        assert found[step] == pytest.approx(PEAK - (PEAK - PEAK * FLOOR) * fallen)
    assert found[75] == PEAK > found[76]
    assert found[STEPS] == pytest.approx(PEAK * FLOOR)


def test_wsd_without_decay_stays_at_the_peak():
    assert set(list(rates("wsd", decay_fraction=0.0).values())[WARMUP:]) == {PEAK}


def test_inverse_sqrt_holds_the_peak_and_then_falls_with_the_root_of_the_step():
    found = rates("inverse_sqrt")
    assert [found[step] for step in range(1, WARMUP + 1)] == [PEAK] * WARMUP
    for step in range(WARMUP, STEPS + 1):
        assert found[step] == pytest.approx(PEAK * WARMUP**0.5 / step**0.5)
    assert found[4 * WARMUP] == pytest.approx(PEAK / 2)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "inverse_sqrt"])
def test_no_warm_up_begins_at_the_peak(schedule):
    first = rates(schedule, warmup_steps=0)[1]
    assert first == pytest.approx(PEAK, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "steepest"),
    [("cosine", pi / 2 / (STEPS - WARMUP)), ("wsd", 1 / (0.2 * STEPS)), ("inverse_sqrt", 0.5 / WARMUP)],
)
def test_the_rate_never_jumps(schedule, steepest):
    found = rates(schedule)
    for step in range(WARMUP, STEPS):
        assert 0 <= found[step] - found[step + 1] <= PEAK * steepest


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "inverse_sqrt"])
def test_the_rate_depends_on_the_step_and_not_on_what_was_asked_before(schedule):
    train = TrainConfig(steps=STEPS, lr=PEAK, warmup_steps=WARMUP, schedule=schedule)
    order = random.Random(0).sample(range(1, STEPS + 1), STEPS)
    shuffled = {step: learning_rate(step, train=train, steps=STEPS) for step in order}
    assert shuffled == rates(schedule)


@pytest.mark.parametrize("decay_fraction", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("warmup_steps", [0, 30, 90, 100, 200])
def test_a_warm_up_of_any_length_makes_no_rate_of_wsd_jump(warmup_steps, decay_fraction):
    train = TrainConfig(
        steps=100, lr=1.0, schedule="wsd", warmup_steps=warmup_steps, decay_fraction=decay_fraction, min_lr_ratio=0.0
    )
    found = [learning_rate(step, train=train, steps=100) for step in range(1, 101)]
    steepest = max(1 / warmup_steps if warmup_steps else 0.0, 1 / (100 * decay_fraction) if decay_fraction else 0.0)
    assert all(abs(b - a) <= steepest + 1e-12 for a, b in itertools.pairwise(found))
    assert max(found) <= 1.0


def config(**train):
    return Config.model_validate(
        {"data": {"sequence_length": 32}, "train": {"global_batch_size": 8, "lr": PEAK, **train}}
    )


@pytest.mark.parametrize(
    ("train", "is_told"),
    [
        ({"steps": 100, "warmup_steps": 200}, True),
        ({"steps": 100, "warmup_steps": 100}, False),
        ({"steps": 100, "warmup_steps": 90, "schedule": "wsd"}, True),
        ({"steps": 100, "warmup_steps": 80, "schedule": "wsd"}, False),
        ({"steps": 100, "warmup_steps": 200, "schedule": "inverse_sqrt"}, False),
        ({"steps": 3}, False),
    ],
)
def test_a_rate_that_is_never_reached_is_reported(train, is_told):
    message = list(remarks(plan_stages(config(**train)), RunState(), before=None))
    assert [line.split(":")[0] for line in message] == ["the learning rate never reaches train.lr 3.00e-03"] * is_told


FINISHED = RunState(step=6, samples=48)


@pytest.mark.parametrize(
    ("schedule", "changes", "is_told"),
    [
        ("cosine", {"steps": 10}, True),
        ("cosine", {}, False),
        ("wsd", {"steps": 10}, True),
        ("inverse_sqrt", {"steps": 10}, False),
        ("cosine", {"lr": 2 * PEAK}, True),
    ],
)
def test_a_rate_that_another_setting_makes_jump_at_a_resume_is_reported_with_both(schedule, changes, is_told):
    before = config(**{"steps": 6, "schedule": schedule})
    now = config(**{"steps": 6, "schedule": schedule, **changes})
    message = list(remarks(plan_stages(now), FINISHED, before=plan_stages(before)))
    assert len(message) == is_told
    if message:
        (key, value) = next(iter(changes.items()))
        assert f"step 7: the learning rate is {next_learning_rate(now, FINISHED):.2e}" in message[0]
        assert f"would be {next_learning_rate(before, FINISHED):.2e}" in message[0]
        assert f"train.{key} was {getattr(before.train, key)}, is {value}" in message[0]


def test_a_longer_wsd_run_has_the_same_rates_up_to_where_the_shorter_one_decays():
    """What is saved before the decay can be trained on for longer without a jump."""
    before, now = (config(steps=steps, schedule="wsd", warmup_steps=10) for steps in (100, 1000))
    state = RunState(step=79, samples=79 * 8)
    assert list(remarks(plan_stages(now), state, before=plan_stages(before))) == []


@pytest.mark.parametrize("batches", [(8, 16), (16, 8), (8, 8), (16, 16, 8, 32)])
def test_a_length_in_tokens_is_kept_whatever_the_batch_size(batches):
    """5,120 tokens are 160 rows of 32; the batch size changes after every third step."""
    state, sizes, rates_seen = RunState(), iter(batches), []
    size = next(sizes)
    while state.step < total_steps(config(tokens=5120, global_batch_size=size), state):
        settings = config(tokens=5120, global_batch_size=size)
        rates_seen.append(next_learning_rate(settings, state))
        state = state.after(consumed=state.consumed + size, rows=size, updated=True)
        if state.step % 3 == 0:
            size = next(sizes, size)
    assert 5120 <= state.samples * 32 < 5120 + size * 32
    assert rates_seen == sorted(rates_seen, reverse=True)
    assert rates_seen[-1] == pytest.approx(0.1 * PEAK, rel=0.05)


def test_one_batch_size_gives_a_length_in_tokens_the_rates_of_its_steps():
    in_tokens, in_steps = config(tokens=8 * 32 * 20, warmup_steps=4), config(steps=20, warmup_steps=4)
    for step in range(20):
        state = RunState(step=step, samples=8 * step)
        assert next_learning_rate(in_tokens, state) == next_learning_rate(in_steps, state)
        assert total_steps(in_tokens, state) == 20
