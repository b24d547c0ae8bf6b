"""A signal, a kill or a slow disk before the first step, in a save, in an evaluation and at the end of a run."""

import os
import signal
import time

import pytest

from lamda.training.fault_injection import TRICKLE_SECONDS
from lamda.training.watchdog import HANG_EXIT

LAST = 10
EVALUATION = ("eval/loss", "eval/bits_per_byte")


def evaluated(place, run):
    return {key: place.rows(run)[-1].get(key) for key in EVALUATION}


def wait_for_the_start(place, run, processes):
    """Until the run says that it is starting."""
    deadline = time.monotonic() + 600
    while not (place.folder / run / "status.json").exists() or place.status(run).get("phase") != "starting":
        assert all(process.poll() is None for process in processes), place.log(run)
        assert time.monotonic() < deadline, place.log(run)
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_one_rank_before_the_first_step_ends_all_and_changes_nothing(place, straight, name):
    processes = place.start(name)
    wait_for_the_start(place, name, processes)
    os.kill(processes[1].pid, getattr(signal, name))
    assert [process.wait(600) for process in processes] == [75, 75], place.log(name)
    assert place.status(name)["reason"] == f"{name} before the first step: nothing has changed"
    assert not place.rows(name)
    place.finish(name)
    assert place.difference(straight(1), name) is None


def test_a_process_that_stops_before_the_first_step_is_a_hang(place):
    processes = place.start("early", "--run.hang_timeout_seconds", "10")
    wait_for_the_start(place, "early", processes)
    while not (place.folder / "early" / "heartbeats" / "rank-00001.json").exists():
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGSTOP)
    assert processes[0].wait(90) == HANG_EXIT, place.log("early")
    assert processes[1].wait(10) == -signal.SIGKILL
    assert place.status("early")["reason"].startswith("rank 1 (host ")
    assert "step 0, phase" in place.status("early")["reason"]


@pytest.mark.parametrize("point", ["save", "save.written", "finish"])
def test_sighup_in_a_save_or_at_the_end_loses_nothing(place, straight, point):
    run = f"hup-{point}"
    processes = place.start(run, fault=f"{point}:hup:0:{LAST}")
    codes = [process.wait(600) for process in processes]
    assert codes == [75, 75], place.log(run)
    assert place.status(run)["step"] == LAST
    place.finish(run)
    assert place.status(run)["status"] == "finished"
    assert (place.folder / run / "samples" / f"step-{LAST:08d}.txt").exists()
    assert place.difference(straight(1), run) is None


def test_a_stop_in_the_last_evaluation_is_obeyed_and_the_same_command_makes_up_for_it(place, straight):
    assert place.run("evaluation", fault=f"evaluate:term:1:{LAST}") == [75, 75], place.log("evaluation")
    assert place.status("evaluation")["status"] == "preempted"
    assert evaluated(place, "evaluation") == dict.fromkeys(EVALUATION), "what was left has no figures"
    assert "evaluation interrupted" in place.log("evaluation")
    place.finish("evaluation")
    assert place.status("evaluation")["status"] == "finished"
    assert evaluated(place, "evaluation") == evaluated(place, straight(1))
    assert place.difference(straight(1), "evaluation") is None


@pytest.mark.parametrize("point", ["save.done", "finish"])
def test_a_run_that_dies_after_its_last_checkpoint_is_finished_by_the_same_command(place, straight, point):
    run = f"end-{point}"
    codes = place.run(run, fault=f"{point}:kill:*:{LAST}")
    assert codes == [-signal.SIGKILL] * 2
    assert place.status(run)["status"] == "running", "of processes that are dead"
    place.finish(run)
    assert (place.status(run)["status"], place.status(run)["step"]) == ("finished", LAST)
    assert (place.folder / run / "samples" / f"step-{LAST:08d}.txt").exists()
    assert place.difference(straight(1), run) is None
    before = place.status(run)
    place.finish(run)
    assert place.status(run) | {"time": 0, "pid": 0} == before | {"time": 0, "pid": 0}, "and once more"


def test_a_save_that_takes_longer_than_any_patience_ends_well_at_a_stop(place, straight):
    """Longer than `run.hang_timeout_seconds`, and than a step may take after a signal."""
    fault = "forward:term:0:5,save.written:trickle:0:5,save.written:trickle:0:6"
    codes = place.run("trickle", "--run.hang_timeout_seconds", str(TRICKLE_SECONDS - 8), timeout=900, fault=fault)
    assert codes == [75, 75], place.log("trickle")
    step = place.status("trickle")["step"]
    assert place.checkpoints("trickle")[-1] == f"step-{step:08d}"
    place.finish("trickle")
    assert place.difference(straight(1), "trickle") is None
