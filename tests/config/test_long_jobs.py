"""A long job tells how far it is without touching what a script reads; a short one says nothing."""

import pytest

from lamda.config import progress
from lamda.config.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def test_through_a_pipe_a_line_comes_every_ten_seconds_with_the_time_that_is_left(clock, capsys):
    with Progress("evaluating", total=4000, unit="rows") as shown:
        for _ in range(40):
            clock[0] += 0.5
            shown.advance(100)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "evaluating: 2,000 of 4,000 rows, 50%, ETA 0:00:10",
        "evaluating: 4,000 of 4,000 rows, 100%, ETA 0:00:00",
    ]


def test_a_short_job_says_nothing(clock, capsys):
    with Progress("evaluating", total=10, unit="rows") as shown:
        for _ in range(10):
            clock[0] += 0.9
            shown.advance()
    assert capsys.readouterr() == ("", "")


def test_at_a_terminal_there_is_a_bar_and_without_colours_the_same_words(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress("evaluating", total=10, unit="rows") as shown:
        shown.advance(5)
    told = capsys.readouterr()
    assert told.out == ""
    assert "5 of 10 rows" in told.err
    assert not {f"\x1b[{code}m" for code in (31, 32, 33, 34, 35, 36)} & set(told.err.split("5"))
