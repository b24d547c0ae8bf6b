"""The run directory: its status is never half written, and whatever stands in its place says nothing."""

import json
import os
import socket
import time
from contextlib import ExitStack, suppress

import pytest

from lamda.config.errors import UserError
from lamda.storage.run_directory import RunDirectory


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory


OURS = (socket.gethostname(), os.getpid())


def test_status_says_who_and_what(directory):
    began = time.time()
    directory.write_status("running", step=3, steps=9)
    content = json.loads((directory.path / "status.json").read_text())
    assert {key: content[key] for key in ("status", "step", "steps", "host", "pid")} == {
        "status": "running", "step": 3, "steps": 9, "host": OURS[0], "pid": OURS[1],
    }  # fmt: skip
    assert began <= content["time"] <= time.time()


def test_a_crash_while_the_status_is_written_leaves_the_old_one(directory, monkeypatch):
    directory.write_status("running", step=3)

    def crash(descriptor):
        raise MemoryError

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(MemoryError):
        directory.write_status("finished", step=4)
    assert json.loads((directory.path / "status.json").read_text())["status"] == "running"


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_directory_that_cannot_be_is_reported(tmp_path, below):
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


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "3", '{"status": 7}', '{"status": "failed", "time": "x"}', "[" * 9999],
)
def test_a_status_file_of_something_else_says_nothing(directory, content):
    (directory.path / "status.json").write_text(content)
    assert directory.read_status() == {}


def test_a_pipe_in_the_place_of_the_status_is_not_waited_for(directory):
    os.mkfifo(directory.path / "status.json")
    assert directory.read_status() == {}


@pytest.mark.parametrize(
    ("error", "more", "stays"),
    [(UserError(), [], False), (UserError(), ["tokenizer.model"], True), (RuntimeError(), [], True), (None, [], True)],
)
def test_a_start_that_is_refused_leaves_no_folder_that_it_made(tmp_path, error, more, stays):
    directory = RunDirectory(tmp_path / "run")
    assert directory.create()
    assert not directory.create()
    directory.heartbeats.mkdir()
    (directory.path / "hang").mkdir()
    for name in ("train.log", "status.json", "heartbeats/rank-00000.json", *more):
        (directory.path / name).touch()
    with suppress(UserError, RuntimeError), ExitStack() as stack:
        stack.push(directory.remove_if_rejected)
        if error:
            raise error
    assert directory.path.exists() is stays


def test_a_run_never_begins_among_the_checkpoints_of_another(directory):
    checkpoint = directory.checkpoints / "step-00000002"
    checkpoint.mkdir(parents=True)
    (directory.checkpoints / "LATEST").write_text(checkpoint.name)
    for path in (checkpoint, checkpoint / "run", directory.checkpoints, directory.checkpoints / "mine"):
        with pytest.raises(UserError, match="is inside the checkpoints of"):
            RunDirectory(path).create()
    assert [*checkpoint.iterdir()] == []
    assert RunDirectory(directory.path.parent / "checkpoints" / "mine").create()


def test_a_name_that_the_file_system_does_not_take_is_refused(tmp_path):
    with pytest.raises(UserError, match="File name too long"):
        RunDirectory(tmp_path / ("x" * 300)).create()
