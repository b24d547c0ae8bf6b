"""Which jobs start again and which end: every way in which a start of a run can end, on real run directories."""

import json

import pytest

from lamda.cluster.restarts import REQUEUE_EXIT, begin, end
from lamda.storage.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.checkpoints.mkdir(parents=True)
    return directory


@pytest.fixture
def start(run, tmp_path):
    """One start of the run, which ends as told; the verdict."""
    state = tmp_path / "state"
    state.mkdir()

    def play(*, code, nodes=(), status=None, saved=None, warned=False, reason=None):
        begin(run, state, restarts=0)
        for number, node_code in enumerate(nodes):
            (state / f"exit-{number}").write_text(f"{node_code}\n")
        if status:
            run.write_status(status, **({"reason": reason} if reason else {}))
        if saved:
            (run.checkpoints / "LATEST").write_text(f"step-{saved:08d}")
        return end(run, state, code=code, warned=warned)

    return play


def test_a_finished_run_ends_the_job_also_when_it_is_started_again(start):
    assert start(code=0, nodes=(0, 0), status="finished") == 0
    assert start(code=0, nodes=(0, 0)) == 0


def test_a_mistake_ends_the_job_although_the_other_nodes_say_something_else(start):
    """The node that SLURM ended because of the first one's mistake has the higher code."""
    assert start(code=143, nodes=(143, 2)) == 2


@pytest.mark.parametrize("reason", ["the scheduler's time limit is near", "SIGTERM", "the launcher is gone"])
def test_a_stop_that_the_cluster_wanted_continues(start, reason):
    assert start(code=75, nodes=(75, 75), status="preempted", reason=reason) == REQUEUE_EXIT


def test_the_stop_file_ends_the_job_unless_the_batch_script_itself_made_it(start):
    stop = {"code": 75, "nodes": (75, 75), "status": "preempted", "reason": "STOP was there"}
    assert start(**stop) == 75
    assert start(**stop, warned=True) == REQUEUE_EXIT


def test_a_failure_starts_again_until_three_restarts_brought_no_newer_checkpoint(start, capsys):
    fail = {"code": 247, "nodes": (247, 1), "status": "failed", "reason": "rank 1: died"}
    assert start(**fail, saved=100) == REQUEUE_EXIT
    assert [start(**fail) for _ in range(2)] == [REQUEUE_EXIT] * 2
    assert start(**fail, saved=200) == REQUEUE_EXIT
    assert [start(**fail) for _ in range(3)] == [REQUEUE_EXIT, REQUEUE_EXIT, 1]
    assert "without a checkpoint newer than step 200: rank 1: died" in capsys.readouterr().out


def test_a_start_that_never_came_to_the_run_is_not_judged_by_the_status_before_it(start):
    assert start(code=75, nodes=(75,), status="preempted", reason="SIGTERM") == REQUEUE_EXIT
    assert start(code=1, nodes=(1,)) == REQUEUE_EXIT
    assert start(code=0, nodes=(0,), status="finished") == 0
    assert start(code=1, nodes=(1,)) == REQUEUE_EXIT


def test_a_restart_waits_for_rank_0_of_the_start_before_on_another_node(run, tmp_path, monkeypatch):
    lock = run.path / "lock.json"
    lock.write_text(json.dumps({"host": "another", "pid": 1}))
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            lock.unlink()

    monkeypatch.setattr("lamda.cluster.restarts.time.sleep", wait)
    begin(run, tmp_path, restarts=0)
    assert waits == [], "a first start is refused by the lock itself"
    begin(run, tmp_path, restarts=1)
    assert len(waits) == 3
