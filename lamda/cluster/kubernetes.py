"""Kubernetes: a TrainJob of Kubeflow Trainer v2, with its own TrainingRuntime.

The Trainer's torch plugin gives each pod its rank and the first pod's address (PET_*).
"""

from __future__ import annotations

import shutil
import subprocess
from datetime import datetime

from lamda.cluster.job import Job, Submitted
from lamda.config.errors import UserError
from lamda.config.help import to_yaml
from lamda.training.stop_requests import STOP_EXIT


def script(job: Job) -> str:
    """The manifest as YAML: a TrainingRuntime and a TrainJob, without secrets."""
    return _manifest(job)[1]


def _manifest(job: Job) -> tuple[str, str]:
    """The name of the TrainJob, and the manifest."""
    name = f"{job.name}-{datetime.now():%m%d-%H%M%S}"
    return name, job.render(
        "kubernetes.yaml",
        name=name,
        site=job.site.kubernetes,
        variables={name: value for name, value in job.variables.items() if name != "PYTHONPATH"},
        script=job.render("kubernetes.sh", config=to_yaml(job.config), stopped=STOP_EXIT),
    )


def check(job: Job) -> None:
    """Raises UserError if the run directory is not on the volume, or if a variable is a secret."""
    site, problems = job.site.kubernetes, []
    if not job.run.is_relative_to(site.mount):
        problems.append(
            f"run.dir {job.config.run.dir}: is not on the volume, mounted in pods at kubernetes.mount {site.mount}; "
            f"set --run.dir {site.mount.rstrip('/')}/{job.run.name}"
        )
    if (secrets := job.secrets) and not site.secrets:
        problems.append(
            f"{', '.join(secrets)}: not allowed in a manifest; put {'it' if len(secrets) == 1 else 'them'} into a "
            "Secret (kubectl create secret generic lamda --from-literal=NAME=VALUE), and name that in "
            f"kubernetes.secrets, or unset {'it' if len(secrets) == 1 else 'them'} here"
        )
    if problems:
        raise UserError("\n".join(problems))


def submit(job: Job) -> Submitted:
    """Pass the manifest to kubectl. Raises UserError."""
    if not shutil.which("kubectl"):
        raise UserError("there is no kubectl on this machine; see the manifest with --dry-run, and create it elsewhere")
    name, manifest = _manifest(job)
    answer = subprocess.run(
        ["kubectl", "create", "-f", "-"], input=manifest, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise UserError(f"kubectl rejected the job: {answer.stderr.strip()}")
    return Submitted(name, answer.stdout.strip())
