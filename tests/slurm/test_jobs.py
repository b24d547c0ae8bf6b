"""`lamda submit` on a real SLURM: whatever befalls a job, it goes on where it was, and ends like the unbroken one."""

import os
import signal
import time
from pathlib import Path

import pytest

from lamda.storage.run_directory import RunDirectory
from tests.launch import ENVIRONMENT
from tests.slurm.conftest import STEPS, job_log, number_of

pytestmark = pytest.mark.cluster


def ranks_of(run: Path) -> list[int]:
    """Processes that train, by the submission's configuration in their command."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_ours = any(word.startswith(f"{run}/submit/".encode()) for word in words)
        if is_ours and words[1:4] == [b"-u", b"-m", b"lamda.launch.pretrain"]:
            found.append(int(entry.name))
    return found


def test_a_job_on_two_nodes_trains_to_the_end(place, unbroken):
    assert place.status(unbroken)["status"] == "finished"
    assert [row["step"] for row in place.rows(unbroken)] == list(range(1, STEPS + 1))
    logs = job_log(place, unbroken)
    assert "job: finished" in logs
    assert "node-0.log" in logs
    assert "node-1.log" in logs


def test_a_job_continues_after_a_warning_a_requeue_and_a_killed_rank(place, slurm, submit, unbroken):
    run, folder = "broken", place.folder / "broken"
    number = number_of(submit(run))

    def trained(steps: int) -> bool:
        return len(ranks_of(folder)) == 2 and (folder / "metrics.jsonl").exists() and len(place.rows(run)) >= steps

    def more(steps: int) -> None:
        goal = (len(place.rows(run)) if (folder / "metrics.jsonl").exists() else 0) + steps
        slurm.wait(lambda: trained(goal), f"step {goal}\n{job_log(place, run)}", seconds=400)

    def requeued(times: int, *, status: str) -> None:
        """SLURM counts a restart when it is asked for; the ranks may still be saving."""
        slurm.wait(lambda: slurm.job(number)["Restarts"] == str(times), f"requeue {times}")
        slurm.wait(lambda: place.status(run)["status"] != "running", "the ranks to save")
        assert place.status(run)["status"] == status, job_log(place, run)

    more(20)
    again = submit(run)
    assert again.returncode == 2
    assert "another process writes here" in again.stderr

    # The warning before the time limit; the batch script itself puts the job back into the queue.
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    requeued(1, status="preempted")
    more(20)

    # SLURM takes the job back without a warning.
    slurm.run("scontrol", "requeue", number)
    requeued(2, status="preempted")
    more(20)
    assert not (folder / "metrics.discarded.jsonl").exists(), "no step was lost, so that none was done twice"

    # A rank dies.
    ranks = ranks_of(folder)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    slurm.wait(lambda: not ranks_of(folder), "both nodes to be free", seconds=60)
    print(f"a killed rank: both nodes were free after {time.monotonic() - began:.0f} s")
    requeued(3, status="failed")

    slurm.wait(lambda: slurm.ended(number), "the run to end", seconds=600)
    assert slurm.job(number)["JobState"] == "COMPLETED", job_log(place, run)
    assert place.difference(unbroken, run, step=STEPS) is None


def test_an_array_or_another_job_of_the_same_run_is_refused_while_the_lock_is_held(place, slurm, submit, unbroken):
    (script,) = (place.folder / unbroken / "submit").glob("*/job.sh")
    with RunDirectory(place.folder / unbroken).lock():
        again = submit(unbroken)
        array = slurm.run("sbatch", "--parsable", "--array=0-1", str(script), variables=ENVIRONMENT).strip()
        tasks = [f"{array}_0", f"{array}_1"]
        slurm.wait(lambda: all(slurm.ended(task) for task in tasks), "both tasks to end", seconds=600)
    assert again.returncode == 2
    assert "another process writes here" in again.stderr
    for task in tasks:
        job = slurm.job(task)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), job_log(place, unbroken)
    assert "another process writes here" in job_log(place, unbroken)


def test_the_doctor_looks_from_all_nodes(place, slurm, submit):
    number = number_of(submit("examined", "--doctor"))
    slurm.wait(lambda: slurm.ended(number), "the doctor to end", seconds=600)
    message = job_log(place, "examined")
    assert slurm.job(number)["ExitCode"] in {"0:0", "1:0"}, message
    for line in ("all 2 ranks have the same code", "all 2 ranks see", "GB/s over 2 ranks"):
        assert line in message
