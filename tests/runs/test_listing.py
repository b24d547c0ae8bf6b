"""`lamda list` shows the status of every run in a folder, newest first, to people and to scripts."""

import json
import os
import time

import pytest

from lamda.config.errors import UserError
from lamda.runs.listing import main
from tests.runs.conftest import leave_lock, leave_status, make_run, save_checkpoint


@pytest.fixture
def folder(tmp_path, weights):
    """Three runs: one that goes on, one that failed at a loss that was not finite, and one of an older version."""
    old = make_run(tmp_path / "old", losses=[3.0])
    failed = make_run(tmp_path / "deep/failed", losses=[3.0, float("nan")], tokens_per_second=1234.5)
    leave_status(failed, "failed", steps=7, reason="no space left")
    running = make_run(tmp_path / "running", losses=[3.0, 2.5, 2.25], tokens_per_second=99999.9)
    leave_status(running, "running", steps=10)
    leave_lock(running, process=os.getpid())
    for step in (1, 2):
        save_checkpoint(running.path, step, weights(0))
    for directory, age in ((old, 5000), (failed, 400), (running, 30)):
        for file in directory.path.glob("*.json*"):
            os.utime(file, (time.time() - age,) * 2)
    return tmp_path


def test_a_pipe_gets_aligned_lines_with_the_newest_run_first(folder, capsys):
    assert main([str(folder)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "status", "step", "loss", "tokens/s", "last", "step", "checkpoint", "reason"]
    assert [line.split() for line in lines] == [
        [f"{folder}/running", "running", "3/10", "2.2500", "100,000", "30s", "ago", "step-00000002"],
        [f"{folder}/deep/failed", "failed", "2/7", "nan", "1,234", "6m40s", "ago", "-", "no", "space", "left"],
        [f"{folder}/old", "unknown", "1", "3.0000", "-", "1h23m", "ago", "-"],
    ]
    assert len({line.index(word) for line, word in zip(lines, ("running ", "failed ", "unknown"), strict=True)}) > 0
    assert {line[header.index("status") - 1] for line in lines} == {" "}


def test_a_script_gets_json(folder, capsys):
    assert main([str(folder), "--json"]) == 0
    running, failed, old = json.loads(capsys.readouterr().out)
    assert 29 < running.pop("age_seconds") < 40
    assert running == {
        "run": f"{folder}/running", "status": "running", "reason": None, "step": 3, "steps": 10, "loss": 2.25,
        "tokens_per_second": 99999.9, "checkpoint": "step-00000002", "parent": None,
    }  # fmt: skip
    assert (failed["loss"], failed["reason"], failed["checkpoint"]) == (None, "no space left", None)
    assert (old["status"], old["steps"], old["tokens_per_second"]) == ("unknown", None, None)


@pytest.mark.parametrize("parent", ["one", "two", "gone", "a\0b", 5])
def test_a_branch_whose_parent_has_another_folder_now_stays_in_the_list(tmp_path, capsys, parent):
    one, two = (make_run(tmp_path / name, losses=[3.0]) for name in ("one", "two"))
    one.branch.write_text(json.dumps({"run": f"{tmp_path}/{parent}" if isinstance(parent, str) else parent}))
    two.branch.write_text(json.dumps({"run": str(tmp_path / "one"), "step": 1}))
    main([str(tmp_path)])
    listed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    trees = {"two": [str(tmp_path / "two"), f"└ {tmp_path}/one"]}
    assert listed in ([str(tmp_path / "one"), f"└ {tmp_path}/two"], trees.get(parent))


def test_a_run_that_has_only_begun_has_no_step_yet(tmp_path, capsys):
    directory = make_run(tmp_path / "run")
    leave_status(directory, "running", step=0, steps=5)
    leave_lock(directory, process=os.getpid())
    assert main([str(tmp_path), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["status"], run["step"], run["steps"], run["age_seconds"]) == ("running", None, 5, None)
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].split() == [str(directory.path), "running", "-", "-", "-", "-", "-"]


def test_no_runs_are_said_to_be_none(tmp_path, capsys):
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no run here, or up to 4 levels below\n"
    with pytest.raises(UserError, match="no such folder"):
        main([str(tmp_path / "none")])


def test_the_folder_is_runs_where_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs: no such folder"):
        main([])
    (tmp_path / "runs").mkdir()
    assert main([]) == 0
    assert "runs: no run here" in capsys.readouterr().out
