"""How often to save, against published figures and a search."""

import numpy as np
import pytest

from lamda.cluster.estimates import best_interval, lost_share, seconds_between_failures


def test_failures_come_as_often_as_llama_3_tells():
    """419 in 54 days, on 16,384 GPUs."""
    assert 54 * 86_400 / seconds_between_failures(16_384) == pytest.approx(419, rel=0.001)


@pytest.mark.parametrize("gpus", [1, 64, 512, 16_384])
@pytest.mark.parametrize("save_seconds", [0.5, 30.0])
def test_no_other_interval_loses_less(gpus, save_seconds):
    intervals = np.geomspace(1, 1e8, 20_001)
    losses = [lost_share(each, save_seconds=save_seconds, gpus=gpus) for each in intervals]
    assert best_interval(save_seconds=save_seconds, gpus=gpus) == pytest.approx(intervals[np.argmin(losses)], rel=1e-3)


def test_what_is_lost_is_what_a_simulated_run_loses():
    """Work in intervals, each followed by a save; a failure undoes the interval that it comes in."""
    draw = np.random.default_rng(0)
    gpus, save, interval = 4096, 60.0, 3000.0
    mean = seconds_between_failures(gpus)
    done, spent, failure = 0.0, 0.0, draw.exponential(mean)
    while done < 3000 * interval:
        if spent + interval + save <= failure:
            spent, done = spent + interval + save, done + interval
        else:
            spent, failure = failure, failure + draw.exponential(mean)
    assert spent / done - 1 == pytest.approx(lost_share(interval, save_seconds=save, gpus=gpus), rel=0.1)
