"""Learning rates are the textbook's functions of the step, without jumps."""

import random
from math import cos, pi

import pytest

from lamda.config.schema import TrainConfig
from lamda.training.schedule import learning_rate

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
