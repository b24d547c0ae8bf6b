"""What may befall a run, each kind once: it goes on, or it says truthfully why not, and the same command does."""

import json
import signal
import time
from pathlib import Path

from lamda.training.watchdog import HANG_EXIT

OTHER_STEP = 5


def test_a_run_that_is_preempted_loses_no_step(place, straight):
    """SIGTERM reaches one rank alone; all save and leave after the same step."""
    codes = place.run("term", fault=f"forward:term:1:{OTHER_STEP}")
    assert codes == [75, 75], place.log("term")
    status = place.status("term")
    assert (status["status"], status["reason"]) == ("preempted", "SIGTERM")
    assert len(place.rows("term")) == status["step"] < 10
    assert place.checkpoints("term")[-1] == f"step-{status['step']:08d}"
    place.finish("term")
    assert place.difference(straight(1), "term") is None
    assert not (place.folder / "term" / "metrics.discarded.jsonl").exists(), "no step was done twice"


def test_usr1_and_the_stop_file_do_the_same(place, straight):
    assert place.run("usr1", fault=f"update:usr1:0:{OTHER_STEP}") == [75, 75]
    processes = place.start("usr1")
    stop = place.folder / "usr1" / "STOP"
    while not stop.exists() and processes[0].poll() is None:
        if place.status("usr1")["status"] == "running":
            stop.touch()
        time.sleep(0.05)
    codes = [process.wait(600) for process in processes]
    assert codes in ([75, 75], [0, 0]), place.log("usr1")
    assert not stop.exists(), "obeyed or void"
    place.finish("usr1")
    assert place.difference(straight(1), "usr1") is None


def test_a_stopped_process_is_named_within_15_seconds_past_the_limit(place, straight):
    processes = place.start("hang", "--run.hang_timeout_seconds", "10", fault=f"backward:hang:1:{OTHER_STEP}")
    while not _is_stopped(processes[1].pid):
        assert processes[1].poll() is None, place.log("hang")
        time.sleep(0.1)
    began = time.monotonic()
    assert processes[0].wait(600) == HANG_EXIT, place.log("hang")
    assert time.monotonic() - began < 25
    assert processes[1].wait(10) == -signal.SIGKILL
    status = place.status("hang")
    assert status["status"] == "failed"
    assert status["reason"].startswith("rank 1 (host ")
    assert f"the others wait in step {OTHER_STEP}, phase" in status["reason"]
    assert "State: T (stopped)" in (place.folder / "hang" / "hang" / "rank-00001.txt").read_text()
    assert "engine.py" in (place.folder / "hang" / "hang" / "rank-00000.txt").read_text()
    place.finish("hang")
    assert place.difference(straight(1), "hang") is None


def test_a_rank_that_holds_the_interpreter_is_named_with_its_stack(place):
    codes = place.run("gil", "--run.hang_timeout_seconds", "5", fault=f"fetch:gil:1:{OTHER_STEP}")
    assert codes == [HANG_EXIT, -signal.SIGKILL], place.log("gil")
    assert "rank 1" in place.status("gil")["reason"]
    assert "_hold_the_gil" in (place.folder / "gil" / "hang" / "rank-00001.txt").read_text()


def test_an_exception_on_another_rank_is_reported_by_name(place, straight):
    codes = place.run("exception", fault=f"update:exception:1:{OTHER_STEP}")
    assert 0 not in codes
    assert place.status("exception")["status"] == "failed"
    assert "rank 1: InjectedError: a fault on purpose" in place.status("exception")["reason"]
    place.finish("exception")
    assert place.difference(straight(1), "exception") is None


def test_a_nan_on_one_rank_updates_none_and_the_run_continues(place):
    place.finish("nan", fault=f"loss:nan:1:{OTHER_STEP}")
    rows = place.rows("nan")
    assert [row["skipped_steps"] for row in rows] == [0] * 4 + [1] * 6
    assert rows[4]["loss"] is not None, "the loss itself was finite: its gradient was not"
    assert all(row["loss"] is not None for row in rows[5:])


def test_nans_in_a_row_send_the_run_back_past_the_samples_and_a_restart_jumps_them_too(place, straight):
    """Steps 5 and 6 are bad whatever they read: the run goes back once, then gives up; without the fault it goes on."""
    flags = ("--train.max_skipped_steps", "2", "--train.max_rollbacks", "1")
    assert place.run("back", *flags, fault="loss:nan:0:5,loss:nan:0:6") == [1, 1], place.log("back")
    assert "back to step-00000003, without samples 24 to 47 (time 1 of 1)" in place.log("back")
    assert "2 steps in a row" in place.status("back")["reason"]
    assert "train.max_rollbacks is 1" in place.status("back")["reason"]
    place.finish("back", *flags)
    digests = {run: [row["batch_digest"] for row in place.rows(run)] for run in ("back", straight(1))}
    assert digests["back"][:3] == digests[straight(1)][:3]
    assert digests["back"][3:7] == digests[straight(1)][6:], "samples 24 to 47 are those of steps 4 to 6"
    assert [row["rollbacks"] for row in place.rows("back")] == [0] * 3 + [1] * 7
    state = json.loads((place.folder / "back" / "checkpoints" / "step-00000010" / "run_state.json").read_text())
    assert (state["skipped"], state["rollbacks"]) == ([[24, 48]], 1)


def test_a_turned_bit_is_found_and_its_rank_named(place, straight):
    codes = place.run("flip", "--run.weight_check_every", "1", fault=f"update:flip:1:{OTHER_STEP}")
    assert codes == [1, 1], place.log("flip")
    status = place.status("flip")
    assert "the weights of rank 1 of 2" in status["reason"]
    assert f"step {OTHER_STEP}" in status["reason"]
    place.finish("flip")
    assert place.difference(straight(1), "flip") is None


def test_a_checkpoint_that_was_cut_is_set_aside_and_the_one_before_is_taken(place, straight):
    codes = place.run("truncate", fault="save.synced:truncate:1:6,save.done:kill:0:6")
    assert codes[0] == -signal.SIGKILL
    place.finish("truncate")
    assert "step-00000006.damaged" in place.checkpoints("truncate")
    assert "continuing from" in place.log("truncate")
    assert "step-00000003" in place.log("truncate")
    assert place.difference(straight(1), "truncate") is None


def test_a_disk_that_is_full_stops_the_save_and_not_the_run(place, straight):
    place.finish("full", fault="save.written:full:1:6")
    assert place.checkpoints("full") == ["LATEST", "step-00000003", "step-00000009", "step-00000010"]
    assert "rank 1 cannot write (No space left on device); training goes on" in place.log("full")
    assert place.difference(straight(1), "full") is None


def test_a_slow_disk_delays_the_save_and_not_the_steps(place, straight):
    place.finish("slow", fault="save.written:slow:0:3")
    rows = place.rows("slow")
    assert rows[3]["save_seconds"] < 1, "the save of step 3 was still being written then"
    assert place.difference(straight(1), "slow") is None


def test_a_cut_network_ends_the_run_which_then_continues(place, straight):
    codes = place.run("cut", "--run.hang_timeout_seconds", "10", fault=f"forward:cut:1:{OTHER_STEP}")
    assert 0 not in codes
    assert place.status("cut")["status"] == "failed"
    place.finish("cut")
    assert place.difference(straight(1), "cut") is None


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "T"
