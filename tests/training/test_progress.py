"""Without a terminal a run shows its first and last step, and others at intervals."""

import re
from contextlib import suppress
from types import SimpleNamespace

import pytest

from lamda import console as long_jobs
from lamda.training import loggers
from lamda.training.loggers import TrainingProgress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets; no terminal, whatever the environment says."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(loggers, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def run(clock, *, done, steps, seconds, visible=True):
    with TrainingProgress(done=done, steps=steps, visible=visible) as shown:
        for step in range(done + 1, steps + 1):
            clock.now += seconds
            shown.show({"step": step, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 1234.0, "mfu": None})


def steps_of(lines):
    return [int(re.match(r"step (\d+)/", line)[1]) for line in lines]


def test_first_and_last_and_one_in_ten_seconds_are_shown(clock, capsys):
    run(clock, done=0, steps=9, seconds=4)
    assert steps_of(capsys.readouterr().out.splitlines()) == [1, 4, 7, 9]


def test_fast_steps_show_the_first_and_the_last(clock, capsys):
    run(clock, done=0, steps=200, seconds=0.01)
    assert steps_of(capsys.readouterr().out.splitlines()) == [1, 200]


def test_a_line_has_the_figures_and_the_time_that_is_left(clock, capsys):
    run(clock, done=0, steps=100, seconds=60)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/100  loss 2.5000  lr 1.00e-03  1,234 tokens/s  ETA 1:39:00"
    assert lines[49].endswith("ETA 0:50:00")
    assert lines[-1].endswith("ETA 0:00:00")


def test_a_resumed_run_shows_its_own_first_step_and_its_own_speed(clock, capsys):
    run(clock, done=90, steps=100, seconds=3)
    lines = capsys.readouterr().out.splitlines()
    assert steps_of(lines) == [91, 95, 99, 100]
    assert lines[0].endswith("ETA 0:00:27")


def test_other_ranks_are_silent(clock, capsys):
    run(clock, done=0, steps=3, seconds=60, visible=False)
    TrainingProgress(done=0, steps=3, visible=False).say("saved")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("visible", [True, False])
def test_a_long_job_between_two_steps_has_lines_of_its_own(clock, capsys, monkeypatch, visible):
    monkeypatch.setattr(long_jobs, "LINE_SECONDS", 0)
    with TrainingProgress(done=0, steps=2, visible=visible) as shown:
        with shown.long_job("evaluating", total=64, unit="rows") as advance:
            advance(64)
        shown.show({"step": 2, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 1234.0, "mfu": None})
    message = capsys.readouterr()
    assert message.err.splitlines() == ["evaluating: 64 of 64 rows, 100%, ETA 0:00:00"] * visible
    assert steps_of(message.out.splitlines()) == [2] * visible


@pytest.mark.parametrize("fails", [False, True])
def test_at_a_terminal_the_bar_of_the_run_continues_after_a_long_job(capsys, monkeypatch, fails):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with TrainingProgress(done=0, steps=2, visible=True) as shown:
        with suppress(ValueError), shown.long_job("evaluating", total=64, unit="rows") as advance:
            advance(64)
            if fails:
                raise ValueError
        shown.show({"step": 2, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 1234.0, "mfu": None})
    message = capsys.readouterr()
    assert "64 of 64 rows" in message.err
    assert "2/2" in message.out.rpartition("0/2")[2]
