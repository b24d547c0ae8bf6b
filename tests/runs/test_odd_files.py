"""A command that reads runs answers with words, never with a traceback or a wait, whatever stands in a run's files."""

import os
import signal

import pytest

from lamda.cli import main
from tests.runs.conftest import leave_status, make_run, save_checkpoint

ODD = {
    "list": b"[]\n",
    "deep": b"[" * 100_000,
    "zeros": b"\0" * 4096,
    "pipe": None,
    "folder": None,
}
FILES = ["status.json", "metrics.jsonl"]
COMMANDS = [
    ("runs", "{parent}"), ("watch", "{run}"), ("checkpoint", "ls", "{run}"), ("checkpoint", "verify", "{run}"),
]  # fmt: skip


def put(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(ODD[kind])


@pytest.fixture
def run(tmp_path, weights):
    directory = make_run(tmp_path / "runs" / "one", losses=[3.0, 2.5], samples=8, tokens=8, skipped_steps=0)
    leave_status(directory, "finished", step=2, steps=2)
    save_checkpoint(directory.path, 2, weights(0))
    return directory.path


@pytest.fixture(autouse=True)
def _no_command_waits():
    def end(*_):
        raise AssertionError("the command waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", FILES)
def test_every_reader_answers(run, capsys, name, kind):
    put(run / name, kind)
    for command in COMMANDS:
        words = [word.format(run=run, parent=run.parent) for word in command]
        if command[0] == "watch" and name == "status.json":
            continue  # it waits for the run, as it says
        assert main(words) in (0, 1, 2), words
        capsys.readouterr()
