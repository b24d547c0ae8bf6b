"""What the files of a run say is what the run is: its status, its place among folders, its rows."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.storage import run_directory
from lamda.storage.lock import STALE_SECONDS
from lamda.storage.metrics import MetricsFile, MetricsReader, last_lines, last_row, read_metrics
from lamda.storage.run_directory import RunDirectory, find_runs, read_run_status
from tests.runs.conftest import leave_lock, leave_status, make_run

OURS, OTHERS, DEAD = os.getpid(), os.getppid(), None
ELSEWHERE = {"process": 1, "host": "elsewhere"}


@pytest.mark.parametrize(
    ("status", "lock", "truth"),
    [
        ({"status": "running"}, {"process": OURS}, "running"),
        ({"status": "running"}, {"process": OURS, "age": STALE_SECONDS * 9}, "running"),
        ({"status": "running"}, {"process": DEAD}, "died"),
        ({"status": "running"}, None, "died"),
        ({"status": "running"}, {**ELSEWHERE, "age": STALE_SECONDS / 2}, "running"),
        ({"status": "running"}, {**ELSEWHERE, "age": STALE_SECONDS + 5}, "died"),
        (None, {"process": OTHERS}, "starting"),
        (None, {"process": DEAD}, "died"),
        (None, None, "unknown"),
        ({"status": "finished"}, None, "finished"),
        ({"status": "finished", "age": 3600}, {"process": OURS}, "finished"),
        ({"status": "finished", "age": 3600}, {"process": DEAD}, "finished"),
        ({"status": "preempted", "age": 3600}, {"process": OTHERS}, "starting"),
        ({"status": "failed"}, {"process": OTHERS}, "failed"),
    ],
)
def test_the_status_is_true_whatever_the_process_could_still_write(tmp_path, dead_process, status, lock, truth):
    directory = make_run(tmp_path / "run")
    if status:
        leave_status(directory, **status)
    if lock:
        leave_lock(directory, **{**lock, "process": lock["process"] or dead_process})
    assert read_run_status(directory).state == truth


def test_a_run_that_ends_between_two_looks_has_not_died(tmp_path, monkeypatch):
    directory = make_run(tmp_path / "run")
    leave_status(directory, "running")

    def end_now(directory):
        leave_status(directory, "finished", steps=3)

    monkeypatch.setattr(run_directory, "_lock_holder", end_now)
    assert read_run_status(directory).state == "finished"


@pytest.mark.parametrize("content", ['{"status": {"code": 7}}', '{"status": "gree', "[3]", ""])
def test_a_status_file_of_something_else_says_nothing(tmp_path, content):
    directory = make_run(tmp_path / "run")
    (directory.path / "status.json").write_text(content)
    assert read_run_status(directory).state == "unknown"


def test_the_length_is_that_of_the_status_or_of_the_configuration(tmp_path):
    directory = make_run(tmp_path / "run")
    leave_status(directory, "failed", reason="rank 1: it broke")
    assert (read_run_status(directory).steps, read_run_status(directory).reason) == (None, "rank 1: it broke")
    directory.config.write_text(to_yaml(Config(train={"tokens": 1000, "global_batch_size": 2, "micro_batch_size": 1})))
    assert read_run_status(directory).steps == 1
    directory.config.write_text("train: {steps: 5, optimiser_of_another_version: 3}")
    assert read_run_status(directory).steps is None
    leave_status(directory, "finished", steps=9)
    assert read_run_status(directory).steps == 9


def test_runs_are_found_once_and_only_so_deep(tmp_path):
    for path in ("a", "b/c", "b/d/e", "f/g/h/i"):
        make_run(tmp_path / path, losses=[1.0])
    make_run(tmp_path / ".hidden", losses=[1.0])
    make_run(tmp_path / "a/inside", losses=[1.0])
    leave_status(make_run(tmp_path / "only-status"), "running")
    (tmp_path / "only-status/metrics.jsonl").unlink()
    (tmp_path / "b/latest").symlink_to(tmp_path / "b/c")
    (tmp_path / "b/loop").symlink_to(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in find_runs(tmp_path, depth=3)}
    assert names == {"a", "b/c", "b/d/e", "only-status"}
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]


ACTIONS = st.one_of(
    st.tuples(st.just("write"), st.integers(1, 4)),
    st.tuples(st.just("rewind"), st.integers(0, 9)),
    st.tuples(st.just("resume"), st.integers(0, 9)),
    st.just(("look", 0)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ACTIONS, max_size=14))
def test_a_reader_follows_every_rewriting_and_tells_what_is_new(tmp_path_factory, actions):
    directory = RunDirectory(tmp_path_factory.mktemp("run"))
    metrics, step, life = MetricsReader(directory.metrics), 0, 0
    file = MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=0)
    for action, number in [*actions, ("look", 0)]:
        if action == "write":
            for _ in range(number):
                step, life = step + 1, life + 1
                file.write({"step": step, "loss": life})
        elif action == "look":
            before = list(metrics.rows)
            new = metrics.update()
            assert metrics.rows == read_metrics(directory.metrics)
            assert metrics.rows[:new] == before[:new]
            assert new == len(before) or new == len(metrics.rows) or metrics.rows[new] != before[new]
        else:
            step = min(step, number)
            if action == "rewind":
                file.rewind(step)
            else:
                file.__exit__(None, None, None)
                file = MetricsFile(directory.metrics, discarded=directory.discarded_metrics, step=step)
    file.__exit__(None, None, None)


def test_a_line_that_is_being_written_waits_until_it_is_whole(tmp_path):
    directory = make_run(tmp_path / "run", losses=[3.0, 2.0])
    metrics = MetricsReader(directory.metrics)
    assert (metrics.update(), len(metrics.rows)) == (0, 2)
    line = b'{"step": 3, "loss": null}\n'
    for end in (9, len(line)):
        with directory.metrics.open("ab") as stream:
            stream.write(line[:9] if end == 9 else line[9:])
        assert metrics.update() == 2
        assert len(metrics.rows) == (2 if end == 9 else 3)
    assert metrics.rows[-1] == {"step": 3, "loss": None}


def test_a_reader_waits_for_a_run_that_has_not_begun_and_survives_one_that_goes(tmp_path):
    metrics = MetricsReader(tmp_path / "run" / "metrics.jsonl")
    assert (metrics.update(), metrics.rows) == (0, [])
    directory = make_run(tmp_path / "run", losses=[3.0])
    assert (metrics.update(), len(metrics.rows)) == (0, 1)
    directory.metrics.unlink()
    assert (metrics.update(), metrics.rows) == (0, [])


def test_only_the_wanted_columns_are_held_and_all_names_are_known(tmp_path):
    directory = make_run(tmp_path / "run", losses=[3.0], lr=0.1, batch_digest="ab")
    metrics = MetricsReader(directory.metrics, keep=["lr"])
    metrics.update()
    assert metrics.rows == [{"step": 1, "lr": 0.1}]
    assert list(metrics.names) == ["step", "loss", "lr", "batch_digest"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 3}', '{"step": "three"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    directory = make_run(tmp_path / "run", losses=[3.0, 2.0])
    with directory.metrics.open("a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3: is no row of metrics"):
        MetricsReader(directory.metrics).update()


def test_a_file_where_a_folder_should_be_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be read"):
        MetricsReader(tmp_path / "file" / "metrics.jsonl").update()


@pytest.mark.parametrize("rows", [0, 1, 5000])
def test_the_last_row_is_the_last_whole_one(tmp_path, rows):
    directory = make_run(tmp_path / "run", losses=[1.0] * rows, padding="x" * 40)
    with directory.metrics.open("ab") as stream:
        stream.write(b'{"step": 9999, "lo')
    expected = read_metrics(directory.metrics)
    assert last_row(directory.metrics) == (expected[-1] if expected else None)


def test_the_last_lines_are_whole(tmp_path):
    (tmp_path / "log").write_text("ä first\nsecond\nthird\n")
    assert last_lines(tmp_path / "log") == ["ä first", "second", "third"]
    assert last_lines(tmp_path / "log", size=9) == ["third"]
    assert last_lines(tmp_path / "none") == []


def test_looking_at_runs_loads_neither_torch_nor_matplotlib():
    modules = ["listing", "watch", "plot", "checkpoint_ls", "checkpoint_show", "checkpoint_verify"]
    code = "".join(f"import lamda.runs.{module}\n" for module in modules)
    code += "import sys, json; print(json.dumps([name for name in ('torch', 'matplotlib') if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
