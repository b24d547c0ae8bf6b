"""Under DeepSpeed's launcher: it is signalled, it vanishes, the time is up; the run saves, and says so itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import ENVIRONMENT, ROOT, free_port


def launch(place, run: str, **environment: str) -> subprocess.Popen:
    """`deepspeed --num_gpus 2 scripts/pretrain.py ...`: the command that a user types, in a session of its own."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", "2", "--master_port", str(free_port()), "scripts/pretrain.py"]
    command += ["--config", str(place.folder / "run.yaml"), "--run.dir", str(place.folder / run)]
    command += ["--train.steps", "100000", "--checkpoint.every", "50"]
    variables = {**os.environ, **ENVIRONMENT, **environment, "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    with (place.folder / f"{run}-0.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True)


def wait_for_steps(place, run: str, steps: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while len(place.rows(run)) < steps:
        assert time.monotonic() < deadline, place.log(run)
        assert process.poll() is None, place.log(run)
        time.sleep(0.1)


def wait_for_the_end(place, run: str) -> dict:
    deadline = time.monotonic() + 600
    while place.status(run)["status"] == "running":
        assert time.monotonic() < deadline, place.log(run)
        time.sleep(0.1)
    return place.status(run)


@pytest.mark.parametrize("way", ["launcher-term", "launcher-kill", "runner-term"])
def test_a_launcher_that_is_signalled_or_vanishes_costs_no_step(place, way):
    process = launch(place, way)
    wait_for_steps(place, way, 20, process)
    (inner,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    target, number = {
        "launcher-term": (int(inner), signal.SIGTERM),
        "launcher-kill": (int(inner), signal.SIGKILL),
        "runner-term": (process.pid, signal.SIGTERM),
    }[way]
    os.kill(target, number)
    status = wait_for_the_end(place, way)
    assert status["status"] == "preempted", place.log(way)
    assert status["reason"] in {"SIGTERM", "the launcher is gone"}
    assert len(place.rows(way)) == status["step"]
    assert place.checkpoints(way)[-1] == f"step-{status['step']:08d}"
    process.wait(600)
    deadline = time.monotonic() + 600
    while any_rank_of(place.folder / way):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_schedulers_time_limit_is_met(place):
    end = int(time.time()) + 180 + 45  # the run leaves 180 s before it
    process = launch(place, "limit", SLURM_JOB_END_TIME=str(end))
    assert process.wait(150) == 75, place.log("limit")
    status = place.status("limit")
    assert (status["status"], status["reason"]) == ("preempted", "the scheduler's time limit is near")
    assert len(place.rows("limit")) == status["step"] > 0


def any_rank_of(run: Path) -> bool:
    """Whether a process with this run's directory in its command is left."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() + b"\0" in (entry / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False
