"""One living writer a run directory; its status is never half written."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from lamda.config.errors import UserError
from lamda.training import run_directory
from lamda.training.run_directory import STALE_SECONDS, RunDirectory


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory


@pytest.fixture
def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_lock(directory, *, host, process, age=0.0):
    path = directory.path / "lock.json"
    path.write_text(json.dumps({"host": host, "pid": process}))
    os.utime(path, (time.time() - age,) * 2)


def owner(directory):
    content = json.loads((directory.path / "lock.json").read_text())
    return content["host"], content["pid"]


OURS = (socket.gethostname(), os.getpid())


def test_the_lock_names_its_owner_and_goes_at_the_end(directory):
    with directory.lock():
        assert owner(directory) == OURS
    assert list(directory.path.iterdir()) == []


def test_the_lock_goes_after_an_exception(directory):
    with pytest.raises(KeyboardInterrupt), directory.lock():
        raise KeyboardInterrupt
    assert list(directory.path.iterdir()) == []


@pytest.mark.parametrize("age", [0.0, STALE_SECONDS + 60.0])
def test_a_living_process_of_this_host_is_refused_however_busy(directory, age):
    leave_lock(directory, host=OURS[0], process=os.getppid(), age=age)
    with pytest.raises(UserError, match=rf"another process writes here .*process {os.getppid()}.*choose another"):
        directory.lock().__enter__()
    assert owner(directory) == (OURS[0], os.getppid())


def test_a_fresh_heartbeat_of_another_host_is_refused(directory, dead_process):
    leave_lock(directory, host="elsewhere", process=dead_process, age=STALE_SECONDS / 2)
    with pytest.raises(UserError, match="host elsewhere"):
        directory.lock().__enter__()
    assert owner(directory) == ("elsewhere", dead_process)


def test_a_dead_process_of_this_host_is_replaced_at_once(directory, dead_process):
    leave_lock(directory, host=OURS[0], process=dead_process)
    with directory.lock():
        assert owner(directory) == OURS


def test_a_silent_process_of_another_host_is_replaced(directory):
    leave_lock(directory, host="elsewhere", process=os.getppid(), age=STALE_SECONDS + 1)
    with directory.lock():
        assert owner(directory) == OURS


def test_a_lock_of_this_very_process_number_is_of_a_life_before(directory):
    leave_lock(directory, host=OURS[0], process=os.getpid())
    with directory.lock():
        assert owner(directory) == OURS


def test_half_a_lock_of_a_crash_is_replaced(directory):
    (directory.path / "lock.json").write_text('{"host": "els')
    with directory.lock():
        assert owner(directory) == OURS


def test_the_heart_beats_on_after_a_failure(directory, monkeypatch):
    monkeypatch.setattr(run_directory, "HEARTBEAT_SECONDS", 0.01)
    beat, calls = os.utime, []

    def fail_at_first(path, *times):
        calls.append(path)
        if len(calls) == 1:
            raise OSError("stale file handle")
        beat(path, *times)

    monkeypatch.setattr(os, "utime", fail_at_first)
    with directory.lock():
        path = directory.path / "lock.json"
        beat(path, (0, 0))
        limit = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < limit:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 5


def test_status_says_who_and_what(directory):
    directory.write_status("running", step=3, steps=9)
    content = json.loads((directory.path / "status.json").read_text())
    assert {key: content[key] for key in ("status", "step", "steps", "host", "pid")} == {
        "status": "running", "step": 3, "steps": 9, "host": OURS[0], "pid": OURS[1],
    }  # fmt: skip
    assert abs(content["time"] - time.time()) < 60


def test_a_crash_while_the_status_is_written_leaves_the_old_one(directory, monkeypatch):
    directory.write_status("running", step=3)

    def crash(descriptor):
        raise MemoryError

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(MemoryError):
        directory.write_status("finished", step=4)
    assert json.loads((directory.path / "status.json").read_text())["status"] == "running"


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_directory_that_cannot_be_is_told(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"run\.dir .*cannot be written to .*choose another"):
        RunDirectory(tmp_path / "file" / below).create()


def test_a_run_is_there_once_it_has_metrics_or_checkpoints(directory):
    assert not directory.holds_a_run
    directory.checkpoints.mkdir()
    assert directory.holds_a_run
    directory.checkpoints.rmdir()
    directory.metrics.touch()
    assert directory.holds_a_run
