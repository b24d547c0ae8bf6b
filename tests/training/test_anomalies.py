"""A run goes back for too many refused steps or for a spike, and for nothing else."""

import math
import random

import pytest
from pydantic import ValidationError

from lamda.config.schema import TrainConfig
from lamda.training.anomalies import AnomalyDetector

QUIET = [4.0 - 0.01 * step + 0.02 * random.Random(step).uniform(-1, 1) for step in range(60)]


def health(history=(), **train):
    return AnomalyDetector(TrainConfig(steps=9, **train), history)


def judged(judge, losses):
    return [judge.check(loss, skipped=not math.isfinite(loss)) for loss in losses]


def test_a_falling_noisy_loss_is_healthy():
    assert judged(health(spike_threshold=6.0), QUIET) == [None] * len(QUIET)


def test_a_spike_is_reported_with_its_score_and_is_not_fatal():
    judge = health(spike_threshold=6.0, spike_window=16)
    judged(judge, QUIET)
    trouble = judge.check(4.5, skipped=False)
    window = sorted(QUIET[-16:])
    middle = (window[7] + window[8]) / 2
    distances = sorted(abs(loss - middle) for loss in window)
    score = (4.5 - middle) / (1.4826 * (distances[7] + distances[8]) / 2)
    assert f"{score:.1f} robust deviations" in trouble.text
    assert not trouble.must_roll_back


def test_a_sudden_fall_is_no_spike():
    judge = health(spike_threshold=6.0)
    judged(judge, QUIET)
    assert judge.check(0.5, skipped=False) is None


def test_without_a_threshold_no_finite_loss_is_trouble():
    judge = health(spike_threshold=None)
    judged(judge, QUIET)
    assert judge.check(1e9, skipped=False) is None


def test_a_spike_needs_some_losses_before_it():
    judge = health(spike_threshold=6.0)
    assert judged(judge, [3.0] * 7 + [99.0]) == [None] * 8


@pytest.mark.parametrize("window", range(1, 8))
def test_a_window_that_is_too_short_to_judge_by_is_refused(window):
    with pytest.raises(ValidationError, match="greater than or equal to 8"):
        health(spike_threshold=6.0, spike_window=window)


def test_losses_that_never_vary_make_any_rise_a_spike():
    judge = health(spike_threshold=6.0)
    judged(judge, [3.0] * 20)
    assert judge.check(3.0, skipped=False) is None
    assert judge.check(3.1, skipped=False) is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_only_refused_steps_in_a_row_are_fatal(bad):
    judge = health(max_skipped_steps=3)
    found = judged(judge, [bad, bad, 3.0, bad, bad, bad])
    assert found[:5] == [None] * 5
    assert found[5].must_roll_back
    assert "3 steps in a row" in found[5].text


def test_a_restart_judges_as_the_unbroken_run():
    losses = [*QUIET, math.nan, 4.6]
    whole = health(spike_threshold=6.0, spike_window=16, max_skipped_steps=2)
    unbroken = judged(whole, losses)
    for cut in range(len(losses)):
        refusals = [sum(not math.isfinite(loss) for loss in losses[: n + 1]) for n in range(cut)]
        history = [
            (loss if math.isfinite(loss) else None, count) for loss, count in zip(losses[:cut], refusals, strict=True)
        ]
        again = health(history, spike_threshold=6.0, spike_window=16, max_skipped_steps=2)
        assert judged(again, losses[cut:]) == unbroken[cut:]
