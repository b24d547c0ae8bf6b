"""The simulated month adds up, and answers to what it is told."""

import pytest

from benchmarks.month import DAY, GPU_HOURS_PER_FAILURE, HOUR, Times, simulate

TIMES = Times(interval=1000.0, stall=2.0, save=20.0, start=100.0, detect=600.0, queue=50.0)


@pytest.mark.parametrize("gpus", [1, 64, 4096, 16384])
def test_every_second_is_accounted_for(gpus):
    month = simulate(TIMES, gpus=gpus)
    parts = [month[name] for name in ("kept", "stalled", "lost steps", "down")]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(30 * DAY, rel=2e-3)


def test_without_failures_only_preemptions_and_stalls_cost():
    month = simulate(TIMES, gpus=0)
    assert (month["failures"], month["lost steps"]) == (0, 0)
    assert month["down"] == month["preemptions"] * (20 + 50 + 100)
    assert month["stalled"] == pytest.approx(month["kept"] / 1000 * 2, rel=1e-2)


def test_failures_come_at_the_rate_of_the_cluster():
    months = [simulate(TIMES, gpus=4096, seed=seed) for seed in range(50)]
    expected = 30 * DAY / (GPU_HOURS_PER_FAILURE / 4096 * HOUR + 750)
    assert sum(month["failures"] for month in months) / 50 == pytest.approx(expected, rel=0.1)


def test_a_longer_interval_loses_more_steps_and_stalls_less():
    often, rarely = (simulate(Times(interval, 2.0, 20.0, 100.0, 600.0, 50.0), gpus=16384) for interval in (500, 10_000))
    assert rarely["lost steps"] > often["lost steps"]
    assert rarely["stalled"] < often["stalled"]
