"""status.json says of a start what is true of it, whichever rank says it, and of a refused one nothing."""

import pytest

from lamda.distributed import World
from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import Attempt


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory


def test_from_the_first_moment_it_does_not_tell_of_the_run_before(directory, device):
    directory.write_status("failed", reason="a disk")
    Attempt(directory, World()).begin()
    status = directory.read_status()
    assert (status["status"], status["phase"]) == ("running", "starting")
    assert "reason" not in status


def test_a_signal_to_another_rank_is_not_overwritten_by_the_start(directory, device):
    attempt = Attempt(directory, World())
    attempt.leave_by_signal("SIGTERM")
    attempt.begin()
    assert directory.read_status()["status"] == "preempted"


@pytest.mark.parametrize("end", ["finished", "preempted", "failed"])
def test_the_first_word_about_its_end_stays(directory, device, end):
    attempt = Attempt(directory, World())
    assert attempt.exit_code() is None
    attempt.end(end, step=3)
    Attempt.end(attempt, "failed", reason="what follows from it")
    assert (directory.read_status()["status"], directory.read_status()["step"]) == (end, 3)
    assert attempt.exit_code() == {"finished": 0, "preempted": 75, "failed": 1}[end]


def test_the_end_of_the_run_before_is_not_this_ones(directory, device):
    directory.write_status("finished", step=3)
    attempt = Attempt(directory, World())
    directory.restore_status(attempt.previous_status)
    assert attempt.exit_code() is None


@pytest.mark.parametrize("before", ["finished", "preempted", "failed", "running", None])
def test_a_refused_start_changes_nothing(directory, device, before):
    if before is not None:
        directory.write_status(before, step=3)
    there = directory.read_status()
    attempt = Attempt(directory, World())
    attempt.begin()
    attempt.reject("a typo")
    if before is None:
        assert (directory.read_status()["status"], directory.read_status()["reason"]) == ("failed", "a typo")
    else:
        assert directory.read_status() == there


def test_a_signal_says_that_nothing_has_changed(directory, device):
    attempt = Attempt(directory, World())
    attempt.leave_by_signal("SIGHUP")
    status = directory.read_status()
    assert (status["status"], status["reason"]) == ("preempted", "SIGHUP before the first step: nothing has changed")
