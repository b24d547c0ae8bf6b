"""W&B mirrors metrics.jsonl under one id, and nothing that befalls it reaches the run."""

import builtins
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from lamda.config import Config
from lamda.training.wandb_mirror import WandbMirror


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No key, no settings of this machine, and nobody to ask."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))

    def ask(*prompt):
        raise AssertionError("a run must not ask")

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr("getpass.getpass", ask)
    wandb.teardown()
    yield
    wandb.teardown()


class FakeRun:
    """What the mirror uses of a W&B run, kept for a look."""

    def __init__(self, **asked):
        self.asked, self.id, self.rows, self.finished = asked, asked["id"], [], False
        self.fail = None

    def define_metric(self, *names, **more):
        pass

    def log(self, row, step):
        if self.fail:
            raise self.fail
        self.rows.append((step, row))

    def finish(self):
        if self.fail:
            raise self.fail
        self.finished = True


@pytest.fixture
def server(monkeypatch):
    """W&B with a key, and a fake run for every start."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    runs = []
    monkeypatch.setattr(wandb, "init", lambda **asked: runs.append(FakeRun(**asked)) or runs[-1])
    return runs


def mirror(folder, *, mode="online", run_id=None, step=0):
    config = Config(train={"steps": 9}, wandb={"mode": mode, "project": "p", "name": "n"})
    return WandbMirror(config, folder=folder, run_id=run_id, step=step)


def row(step):
    return {"step": step, "loss": 1 / step, "tokens": 100 * step, "mfu": None}


def said(caplog):
    """What the mirror itself logged."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("lamda")]


def stored(folder):
    """(id, step, loss) of every row in the offline directories, in the order of the starts."""
    command = str(Path(sys.executable).with_name("wandb"))
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        shown = subprocess.run(
            [command, "leet", "inspect", "--json", str(file)], capture_output=True, text=True, check=True
        )
        records = [json.loads(line) for line in shown.stdout.splitlines()]
        (run_id,) = {record["run"]["run_id"] for record in records if record["type"] == "run"}
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        found += [(run_id, item["step"], item["loss"], item["tokens"]) for item in items]
    return found


def test_offline_rows_of_two_starts_are_kept_under_one_id(tmp_path, caplog):
    first = mirror(tmp_path, mode="offline")
    for step in (1, 2):
        first.log(row(step))
    first.finish()
    time.sleep(1)  # W&B names the folders of a run by the second
    second = mirror(tmp_path, mode="offline", run_id=first.run_id, step=2)
    assert second.run_id == first.run_id
    second.log(row(3))
    second.finish()
    assert stored(tmp_path) == [(first.run_id, 1, 1.0, 100), (first.run_id, 2, 0.5, 200), (first.run_id, 3, 1 / 3, 300)]
    assert said(caplog) == []


def test_online_without_a_key_goes_offline_and_says_so_once(tmp_path, caplog):
    run = mirror(tmp_path, mode="online")
    run.log(row(1))
    run.log(row(2))
    run.finish()
    assert [step for _, step, _, _ in stored(tmp_path)] == [1, 2]
    assert len(said(caplog)) == 1
    assert said(caplog)[0].startswith("no W&B key")
    assert str(tmp_path / "wandb") in said(caplog)[0]


def test_disabled_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = mirror(tmp_path, mode="disabled", run_id="0badcafe")
    run.log(row(1))
    run.finish()
    assert run.run_id == "0badcafe"
    assert not (tmp_path / "wandb").exists()


def test_a_missing_library_is_said_once_and_the_id_is_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = mirror(tmp_path, run_id="0badcafe")
    run.log(row(1))
    run.finish()
    assert run.run_id == "0badcafe"
    assert len(said(caplog)) == 1
    assert said(caplog)[0].startswith("W&B is not used: ModuleNotFoundError")


def test_a_resume_continues_the_run_and_sends_no_row_twice(tmp_path, server):
    first = mirror(tmp_path)
    for step in (1, 2, 3):
        first.log(row(step))
    first.finish()
    second = mirror(tmp_path, run_id=first.run_id, step=3)
    for step in (2, 3, 4, 5):
        second.log(row(step))
    second.finish()
    assert [run.id for run in server] == [first.run_id] * 2
    assert all((run.asked["mode"], run.asked["resume"], run.finished) == ("online", "allow", True) for run in server)
    assert [step for run in server for step, _ in run.rows] == [1, 2, 3, 4, 5]
    assert server[1].rows[0][1] == {"step": 4, "loss": 0.25, "tokens": 400}


def test_two_runs_have_two_ids(tmp_path, server):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert mirror(first).run_id != mirror(second).run_id


def test_a_run_that_stopped_before_its_first_checkpoint_keeps_its_id(tmp_path, server):
    assert mirror(tmp_path).run_id == mirror(tmp_path).run_id


def test_the_configuration_goes_along(tmp_path, server, monkeypatch):
    monkeypatch.setenv("PATH", "")
    mirror(tmp_path)
    asked = server[0].asked
    assert (asked["project"], asked["name"], asked["dir"]) == ("p", "n", tmp_path)
    assert asked["config"]["train"]["steps"] == 9
    assert asked["config"]["git_commit"] is None, "without git the mirror goes on"


def test_a_mirror_that_fails_stops_says_so_once_and_never_raises(tmp_path, server, caplog):
    run = mirror(tmp_path)
    run.log(row(1))
    server[0].fail = RuntimeError("no network\nand a long story")
    for step in (2, 3, 4):
        run.log(row(step))
    run.finish()
    assert said(caplog) == ["W&B stopped: RuntimeError: no network; metrics.jsonl goes on"]
    assert run.run_id == server[0].id


def test_a_failing_end_never_raises(tmp_path, server, caplog):
    run = mirror(tmp_path)
    server[0].fail = TimeoutError()
    run.finish()
    assert said(caplog) == ["W&B did not finish: TimeoutError: "]


def test_a_failing_start_keeps_the_id_and_never_raises(tmp_path, server, monkeypatch, caplog):
    def refuse(**asked):
        raise wandb.errors.CommError("wrong key")

    monkeypatch.setattr(wandb, "init", refuse)
    run = mirror(tmp_path, run_id="0badcafe")
    run.log(row(1))
    run.finish()
    assert run.run_id == "0badcafe"
    assert len(said(caplog)) == 1
    assert "wrong key" in said(caplog)[0]
