"""A rank that hangs is named, with what is known of it; a run that is merely slow is left alone."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from lamda.config import Config
from lamda.training.setup import TrainingJob
from lamda.training.stop_requests import Signals
from lamda.training.watchdog import HANG_EXIT, Heartbeat, clear_heartbeats, kernel_state, verdict

RANK = """
import json, sys, time
from pathlib import Path
from lamda.distributed import World
from lamda.training.watchdog import Watchdog
folder, rank, behavior = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def sleep_for_long():
    time.sleep(600)

def tell(verdict):
    with (folder / "told").open("a") as file:
        file.write(verdict + "\\n")

# Slow: longer than a step, by far, and shorter than all of them.
seconds = 60.0 if behavior.startswith("hurried") else 3.0 if behavior == "slow" else 1.0
world = World(rank=rank, world_size=1 if behavior == "hurried-alone" else 2)
with Watchdog(folder / "heartbeats", world=world, seconds=seconds, report=tell) as watchdog:
    if behavior.startswith("hurried"):
        watchdog.hurry(0.5, during=("update",))
        watchdog.mark(behavior.removeprefix("hurried-").replace("alone", "update"), step=1)
        time.sleep(3)
        sys.exit()
    if behavior in ("saves", "waits-for-it"):
        watchdog.mark("save", step=1)
        for _ in range(20):
            time.sleep(0.2)
            if behavior == "saves":
                watchdog.progress()
        sys.exit()
    for step in range(1, 9 if behavior == "slow" else 600):
        watchdog.mark("fetch", step=step)
        if step == 3 and behavior == "sleeps":
            sleep_for_long()
        time.sleep(0.5 if behavior == "slow" else 0.05)
        if step >= 3 and behavior == "waits":
            watchdog.mark("update", step=step)
            time.sleep(600)
"""


def heart(rank, *, beat=9, marks=50, phase="update", step=7):
    return Heartbeat(rank, "h", 100 + rank, beat, marks, phase, step)


def test_a_silent_rank_is_named_with_its_place_and_that_of_the_others():
    silent = heart(1, phase="fetch", step=6)
    message = verdict([heart(0), silent, heart(2)], [silent], seconds=10)
    assert message == (
        "rank 1 (host h, process 101) has not answered for 10 s, last seen in step 6, phase fetch; "
        "the others wait in step 7, phase update"
    )


def test_where_all_live_the_rank_that_is_behind_is_named():
    message = verdict([heart(0), heart(1, marks=48, phase="fetch", step=7), heart(2)], [], seconds=10)
    assert message == "rank 1 (host h, process 101) has made no progress for 10 s in step 7, phase fetch"


def test_where_nobody_is_behind_all_are_reported():
    message = verdict([heart(0), heart(1)], [], seconds=10)
    assert message == "all 2 ranks have waited for 10 s in step 7, phase update"


def test_the_kernel_tells_of_a_stopped_process_and_of_one_that_is_gone():
    with subprocess.Popen(["sleep", "60"]) as process:
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while "T (stopped)" not in kernel_state(process.pid):
            assert time.monotonic() < deadline
        process.kill()
    assert kernel_state(process.pid) == "The process is gone."


@pytest.fixture
def start(tmp_path):
    processes = []

    def start(*behaviors):
        for rank, behavior in enumerate(behaviors):
            processes.append(subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank), behavior]))
        return processes

    yield start
    for process in processes:
        process.kill()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_run_and_is_killed(tmp_path, start, stopped):
    processes = start("waits", "waits")
    file = tmp_path / "heartbeats" / f"rank-{stopped:05d}.json"
    while not file.exists() or json.loads(file.read_text())["step"] < 3:
        time.sleep(0.01)
    processes[stopped].send_signal(signal.SIGSTOP)
    assert processes[1 - stopped].wait(600) == HANG_EXIT
    assert processes[stopped].wait(600) == -signal.SIGKILL
    (message,) = (tmp_path / "told").read_text().splitlines()
    assert message.startswith(f"rank {stopped} (host ")
    assert "State: T (stopped)" in (tmp_path / "hang" / f"rank-{stopped:05d}.txt").read_text()
    assert "Thread" in (tmp_path / "hang" / f"rank-{1 - stopped:05d}.txt").read_text()


def test_a_rank_that_is_stuck_in_python_is_named_with_its_stack(tmp_path, start):
    assert [process.wait(600) for process in start("waits", "sleeps")] == [HANG_EXIT] * 2
    (message,) = (tmp_path / "told").read_text().splitlines()
    assert message.startswith("rank 1 ")
    assert message.endswith("has made no progress for 1 s in step 3, phase fetch")
    assert "sleep_for_long" in (tmp_path / "hang" / "rank-00001.txt").read_text()


def test_a_slow_run_is_left_alone_and_leaves_nothing_behind(tmp_path, start):
    assert [process.wait(600) for process in start("slow", "slow")] == [0, 0]
    assert not (tmp_path / "told").exists()
    assert not list((tmp_path / "heartbeats").iterdir())
    assert not list((tmp_path / "hang").iterdir())


def test_a_rank_that_waits_for_anothers_long_work_is_no_hang_while_that_makes_progress(tmp_path, start):
    assert [process.wait(600) for process in start("saves", "waits-for-it")] == [0, 0]
    assert not (tmp_path / "told").exists()


def test_ranks_that_all_wait_without_progress_are_a_hang(tmp_path, start):
    assert [process.wait(600) for process in start("waits-for-it", "waits-for-it")] == [HANG_EXIT] * 2
    assert (tmp_path / "told").read_text() == "all 2 ranks have waited for 1 s in step 1, phase save\n"


def test_a_stop_hurries_a_step_of_several_ranks_and_not_a_save(start):
    started = [start(f"hurried-{what}")[-1] for what in ("update", "save", "alone")]
    assert [process.wait(600) for process in started] == [HANG_EXIT, 0, 0]


def test_old_signs_of_life_are_cleared_before_ranks_are_judged_and_killed_by_them(tmp_path):
    (tmp_path / "rank-00007.json").write_text('{"rank": 7, "pid": 1}')
    clear_heartbeats(tmp_path)
    assert not list(tmp_path.iterdir())
    clear_heartbeats(tmp_path / "none")


def test_a_finished_run_that_waits_for_its_last_copy_is_no_hang(tmp_path, world, monkeypatch):
    config = Config(run={"dir": str(tmp_path), "hang_timeout_seconds": 0.3}, train={"steps": 1})
    hung = []
    with Signals() as signals:
        job = TrainingJob(config, world, None, None, None, signals)
        monkeypatch.setattr(job, "_open", lambda *_: None)
        monkeypatch.setattr(job, "_start_mirror", lambda stack: stack.callback(time.sleep, 2))
        monkeypatch.setattr(job, "_report_hang", hung.append)  # then the process would end
        assert job._train(torch.device("cpu")) == 0
    assert hung == []
