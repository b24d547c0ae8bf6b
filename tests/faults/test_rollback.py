"""A run rolls back past a checkpoint that a bad update has spoiled, and every reader knows what it then skips."""

import os
import subprocess
import sys

import pytest

from lamda.runs.trace import trace
from lamda.storage import manifest
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from tests.launch import ENVIRONMENT, ROOT

BATCH = 8


def names(directory):
    return sorted(path.name for path in directory.checkpoints.glob("step-*"))


def train(place, run, *flags, fault="", spoiled_after=""):
    """A run of one rank in plain PyTorch. spoiled_after: the step whose update spoils the weights, the first time."""
    variables = {"LAMDA_ALLOW_FAULTS": "1", "LAMDA_FAULT": fault, "TEST_SPOIL_AFTER": spoiled_after}
    command = [sys.executable, "-m", "tests.training.plain_framework", "--config", str(place.folder / "run.yaml")]
    command += ["--run.dir", str(place.folder / run), *flags]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT, **variables}, capture_output=True, text=True, check=False
    )


SPIKES = ("--train.steps", "18", "--train.spike_threshold", "4", "--train.spike_window", "8", "--train.lr", "3e-3")


@pytest.fixture(scope="module")
def spoiled(place):
    """A bad update at step 12, whose checkpoint so has spoiled weights; the loss of step 13 shows it."""
    done = train(place, "spoiled", *SPIKES, spoiled_after="12")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_spike_after_a_spoiled_checkpoint_rolls_back_to_the_sound_one_before_it(place, spoiled):
    directory = RunDirectory(place.folder / "spoiled")
    rows = read_metrics(directory.metrics)
    assert "step 13: the loss" in spoiled.stderr
    assert "back to step-00000009, without samples 72 to 111 (time 1 of 3)" in spoiled.stderr
    assert "step-00000012.spoilt" in names(directory)
    assert [row["rollbacks"] for row in rows] == [0] * 9 + [1] * 9
    assert max(row["loss"] for row in rows[9:]) < rows[8]["loss"] + 0.2, "the spike is gone"
    assert directory.skipped() == ((72, 112),)
    (noted,) = directory._skipped_ranges()
    shown = next(row for row in read_metrics(directory.discarded_metrics) if row["step"] == noted["step"] == 13)
    assert f"the loss {shown['loss']:.4f} is a spike" in noted["reason"]


def test_where_names_what_was_read_before_and_after_a_rollback(place, spoiled):
    """Its rows are checked against each step's batch_digest."""
    for step in (9, 10, 18):
        assert len(list(trace(RunDirectory(place.folder / "spoiled"), step=step, row=None))) == BATCH


def test_where_knows_the_windows_that_no_checkpoint_tells_of_yet(place):
    """The run ends right after it rolled back and trained some steps, before the next checkpoint."""
    ended = train(place, "ended", *SPIKES, "--checkpoint.every", "6", fault="forward:exception:0:12", spoiled_after="9")
    assert ended.returncode == 1, ended.stderr[-3000:]
    directory = RunDirectory(place.folder / "ended")
    assert not any(RunState.read(path / "run_state.json").skipped for path in manifest.complete(directory.checkpoints))
    assert directory.skipped()
    newest = read_metrics(directory.metrics)[-1]["step"]
    assert len(list(trace(directory, step=newest, row=None))) == BATCH


def test_a_branch_skips_what_the_run_that_it_came_from_had_noted_by_then(place, spoiled):
    origin = place.folder / "spoiled"
    done = train(place, "branch", *SPIKES, "--checkpoint.resume", str(origin / "checkpoints" / "step-00000009"))
    assert done.returncode == 0, done.stderr[-3000:]
    digests = {run: [row["batch_digest"] for row in read_metrics(place.folder / run / "metrics.jsonl")]
               for run in ("spoiled", "branch")}  # fmt: skip
    assert digests["branch"] == digests["spoiled"][9:]
    directory = RunDirectory(place.folder / "branch")
    assert (directory.skipped(), directory.rollbacks) == (((72, 112),), 0)
    assert len(list(trace(directory, step=10, row=None))) == BATCH, "the file's first step is not the run's first"


def test_killed_between_the_note_and_the_renaming_a_run_does_not_resume_from_what_it_rolled_back_from(place, spoiled):
    directory = RunDirectory(place.folder / "killed")
    done = train(place, "killed", *SPIKES, "--train.steps", "12")
    assert done.returncode == 0, done.stderr[-3000:]
    directory.note_skipped((72, 112), step=13, reason="as if it had been killed here")
    done = train(place, "killed", *SPIKES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step-00000012.spoilt" in names(directory)
    digests = [[row["batch_digest"] for row in read_metrics(place.folder / run / "metrics.jsonl")]
               for run in ("spoiled", "killed")]  # fmt: skip
    assert digests[0] == digests[1]
