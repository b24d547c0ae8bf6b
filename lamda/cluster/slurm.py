"""SLURM: the batch script of a job, and its submission.

SLURM ends a job in two ways. The signal of `--signal` comes before the time limit or, depending on the site,
before preemption: the script asks the run to stop, waits, and requeues the job itself. SIGTERM to the script
means that SLURM cancels, requeues or preempts the job: the script only waits for the save.
"""

from __future__ import annotations

import math
import shutil
import subprocess

from lamda.cluster.job import Job, Submitted
from lamda.cluster.restarts import REQUEUE_EXIT
from lamda.cluster.site import seconds
from lamda.config.errors import UserError
from lamda.training.stop_requests import STOP_EXIT


def script(job: Job) -> str:
    """The batch script. It contains no values of environment variables."""
    cpus = job.site.slurm.cpus_per_node
    return job.render(
        "slurm.sh",
        options=options(job),
        cpus=f"--cpus-per-task={cpus} " if cpus else "",
        requeue=REQUEUE_EXIT,
        stopped=STOP_EXIT,
    )


def options(job: Job) -> list[str]:
    """The options of sbatch."""
    slurm, cluster = job.site.slurm, job.site.cluster
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time}
    if cluster.gpu is not None:
        named["gpus-per-node"] = str(cluster.ranks_per_node)
    if slurm.cpus_per_node is not None:
        named["cpus-per-task"] = str(slurm.cpus_per_node)
    found = [f"--job-name={job.name}", f"--nodes={job.nodes}", "--ntasks-per-node=1"]
    found += [f"--{name}={value}" for name, value in named.items() if value is not None]
    found += ["--exclusive"] if slurm.exclusive else []
    found += [f"--output={str(job.folder).replace('%', '%%')}/%j.log", "--open-mode=append"]
    found += [f"--export={','.join(sorted({*job.variables, *job.secrets})) or 'NONE'}"]
    if job.is_training:
        found += ["--requeue", f"--signal=B:USR1@{max(1, math.ceil(job.config.run.stop_margin_seconds))}"]
    else:
        found += ["--no-requeue"]
    return [*found, *slurm.options]


def check(job: Job) -> None:
    """Raises UserError if the time limit leaves no time to train."""
    time, margin = job.site.slurm.time, job.config.run.stop_margin_seconds
    if job.is_training and time is not None and seconds(time) <= margin + 60:
        raise UserError(
            f"slurm.time {time}: the run stops {margin:g} s before its limit (run.stop_margin_seconds), which leaves "
            "no time to train; raise the limit"
        )


def submit(job: Job) -> Submitted:
    """Write the script and pass it to sbatch. Raises UserError."""
    if not shutil.which("sbatch"):
        raise UserError(
            "there is no sbatch on this machine; submit from a login node, or see the script with --dry-run"
        )
    job.write(**{"job.sh": script(job)})
    answer = subprocess.run(
        ["sbatch", "--parsable", str(job.folder / "job.sh")], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        shutil.rmtree(job.folder)
        raise UserError(f"sbatch rejected the job: {answer.stderr.strip()}")
    number = answer.stdout.strip().split(";")[0]
    lines = [f"job {number} on {job.nodes} nodes with {job.ranks} ranks", f"logs      {job.folder}/{number}.log"]
    lines += [f"          {job.folder}/{number}/node-*.log", f"cancel    scancel {number}"]
    if job.is_training:
        lines += [f"stop      touch {job.run}/STOP", "continue  the same command; it resumes from the last checkpoint"]
    return Submitted(number, "\n".join(lines))
