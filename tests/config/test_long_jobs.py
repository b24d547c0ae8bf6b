"""A long job tells how far it is without touching what a script reads; a short one says nothing."""

import threading
from contextlib import contextmanager

import pytest

from lamda import console
from lamda.console import Progress, waiting
from lamda.data import tokenizer_training
from tests.conftest import make_text


@pytest.fixture
def clock(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: seconds[0])
    return seconds


def test_through_a_pipe_a_line_comes_every_ten_seconds_with_the_time_that_is_left(clock, capsys):
    with Progress("evaluating", total=4000, unit="rows") as shown:
        for _ in range(40):
            clock[0] += 0.5
            shown.advance(100)
    message = capsys.readouterr()
    assert message.out == ""
    assert message.err.splitlines() == [
        "evaluating: 2,000 of 4,000 rows, 50%, ETA 0:00:10",
        "evaluating: 4,000 of 4,000 rows, 100%, ETA 0:00:00",
    ]


def test_a_short_job_says_nothing(clock, capsys):
    with Progress("evaluating", total=10, unit="rows") as shown:
        for _ in range(10):
            clock[0] += 0.9
            shown.advance()
    assert capsys.readouterr() == ("", "")


def test_at_a_terminal_there_is_a_bar_and_without_colors_the_same_words(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress("evaluating", total=10, unit="rows") as shown:
        shown.advance(5)
    message = capsys.readouterr()
    assert message.out == ""
    assert "5 of 10 rows" in message.err
    assert not {f"\x1b[{code}m" for code in (31, 32, 33, 34, 35, 36)} & set(message.err.split("5"))


def lines_of(things, clock, capsys, *, wait):
    """What is said of a job of 4 things that takes a minute, once `wait` is set."""
    with Progress("evaluating", total=things, unit="rows") as shown:
        assert wait.wait(120)
        while shown._total is None and shown._counting.is_alive():
            pass
        for _ in range(4):
            clock[0] += 15
            shown.advance()
    return capsys.readouterr().err.splitlines()


def test_things_are_counted_while_the_job_continues(clock, capsys):
    counted = threading.Event()

    def things():
        yield from range(4)
        counted.set()

    assert lines_of(things(), clock, capsys, wait=counted) == [
        f"evaluating: {done} of 4 rows, {25 * done}%, ETA 0:{left:02}:{seconds:02}"
        for done, left, seconds in ((1, 0, 45), (2, 0, 30), (3, 0, 15), (4, 0, 0))
    ]


def test_what_cannot_be_counted_is_reported_without_a_time(clock, capsys):
    failed = threading.Event()

    def things():
        yield 1
        failed.set()
        raise ValueError("line 2 is damaged")

    assert lines_of(things(), clock, capsys, wait=failed) == [f"evaluating: {done} rows" for done in (1, 2, 3, 4)]


def test_a_job_that_ends_first_ends_the_counting():
    def things():
        while True:
            yield 1

    with Progress("evaluating", total=things(), unit="rows") as shown:
        shown.advance()
    assert not shown._counting.is_alive()


def test_more_than_all_is_all(clock, capsys):
    with Progress("evaluating", total=10, unit="rows") as shown:
        clock[0] += 10
        shown.advance(16)
    assert capsys.readouterr().err.splitlines() == ["evaluating: 10 of 10 rows, 100%, ETA 0:00:00"]


def test_a_job_that_cannot_tell_how_far_it_is_says_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.01)
    said = []
    with waiting("learning 8,000 pieces"):
        while len(said) < 2:
            said += capsys.readouterr().err.splitlines()
    assert set(said) == {"learning 8,000 pieces: 0:00:00 so far"}


def test_learning_a_vocabulary_is_such_a_job(monkeypatch, tmp_path):
    """It begins when all text is read, and ends where learning fails."""
    begun = []

    @contextmanager
    def shown(name):
        begun.append(name)
        yield
        begun.append("ended")

    def read():
        yield from (make_text(n, 40) for n in range(30))
        assert not begun

    monkeypatch.setattr(tokenizer_training, "waiting", shown)
    tokenizer_training.train_tokenizer(read(), tmp_path / "tokenizer.model", vocab_size=400)
    assert begun == ["learning 400 pieces", "ended"]
