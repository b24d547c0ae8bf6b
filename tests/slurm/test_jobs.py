"""`lamda submit` on a real SLURM: whatever befalls a job, it goes on where it was, and ends like the unbroken one."""

import os
import signal
import time
from pathlib import Path

import pytest

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
        if is_ours and words[1:4] == [b"-u", b"-m", b"lamda.training.main"]:
            found.append(int(entry.name))
    return found


def test_a_job_on_two_nodes_trains_to_the_end(place, unbroken):
    assert place.status(unbroken)["status"] == "finished"
    assert [row["step"] for row in place.rows(unbroken)] == list(range(1, STEPS + 1))
    logs = job_log(place, unbroken)
    assert "job: finished" in logs
    assert "node-0.log" in logs
    assert "node-1.log" in logs


def test_a_job_goes_on_after_a_warning_a_requeue_and_a_killed_rank(place, slurm, submit, unbroken):
    run, folder = "broken", place.folder / "broken"
    number = number_of(submit(run))

    def trained(steps: int) -> bool:
        return len(ranks_of(folder)) == 2 and (folder / "metrics.jsonl").exists() and len(place.rows(run)) >= steps

    def more(steps: int) -> None:
        goal = (len(place.rows(run)) if (folder / "metrics.jsonl").exists() else 0) + steps
        slurm.wait(lambda: trained(goal), f"step {goal}\n{job_log(place, run)}", seconds=400)

    def requeued(times: int) -> bool:
        return slurm.job(number)["Restarts"] == str(times)

    more(20)
    again = submit(run)
    assert again.returncode == 2
    assert "another process writes here" in again.stderr

    # The warning before the time limit; the batch script itself puts the job back into the queue.
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    slurm.wait(lambda: requeued(1), "the first requeue", seconds=60)
    assert place.status(run)["status"] == "preempted", job_log(place, run)
    more(20)

    # SLURM takes the job back without a warning.
    slurm.run("scontrol", "requeue", number)
    slurm.wait(lambda: requeued(2), "the second requeue", seconds=60)
    assert place.status(run)["status"] == "preempted", job_log(place, run)
    more(20)
    assert not (folder / "metrics.discarded.jsonl").exists(), "no step was lost, so that none was done twice"

    # A rank dies.
    ranks = ranks_of(folder)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    slurm.wait(lambda: not ranks_of(folder), "both nodes to be free", seconds=60)
    slurm.wait(lambda: requeued(3), "the third requeue", seconds=60)
    print(f"a killed rank: both nodes free and the job requeued after {time.monotonic() - began:.0f} s")
    assert place.status(run)["status"] == "failed", job_log(place, run)

    slurm.wait(lambda: slurm.ended(number), "the run to end", seconds=600)
    assert slurm.job(number)["JobState"] == "COMPLETED", job_log(place, run)
    assert place.difference(unbroken, run, step=STEPS) is None
