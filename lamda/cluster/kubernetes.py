"""Kubernetes: a TrainJob of Kubeflow Trainer v2, with its own TrainingRuntime.

The runtime sets what a TrainJob cannot: the number of restarts, the volume, shared memory. The Trainer's torch
plugin gives each pod its rank and the first pod's address (PET_*).
"""

from __future__ import annotations

import shutil
import subprocess
from datetime import datetime
from typing import Any

import yaml

from lamda.cluster.job import Job, Submitted
from lamda.config.errors import UserError
from lamda.config.help import to_yaml
from lamda.training.stop_requests import STOP_EXIT

API = "trainer.kubeflow.org/v1alpha1"
STEP_LABEL = "trainer.kubeflow.org/trainjob-ancestor-step"
GRACE_SECONDS = 300
"""Time from SIGTERM until a pod is killed: enough for a step and a save."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Writes multi-line strings as blocks."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def script(job: Job) -> str:
    """The manifest as YAML."""
    return _as_yaml(manifest(job))


def manifest(job: Job) -> list[dict[str, Any]]:
    """The TrainingRuntime and the TrainJob, without secrets."""
    name = f"{job.name}-{datetime.now():%m%d-%H%M%S}"
    about = {"name": name, "namespace": job.site.kubernetes.namespace}
    runtime = {"apiVersion": API, "kind": "TrainingRuntime", "metadata": about, "spec": _runtime(job)}
    trainer: dict[str, Any] = {
        "image": job.site.kubernetes.image,
        "command": ["bash", "-c", job.render("kubernetes.sh", config=to_yaml(job.config), stopped=STOP_EXIT)],
        "numNodes": job.nodes,
        "numProcPerNode": job.site.cluster.ranks_per_node,
        "env": [{"name": name, "value": value} for name, value in job.variables.items() if name != "PYTHONPATH"],
    }
    if job.site.cluster.gpu is not None:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": job.site.cluster.ranks_per_node}}
    spec = {"runtimeRef": {"apiGroup": API.split("/")[0], "kind": "TrainingRuntime", "name": name}, "trainer": trainer}
    return [runtime, {"apiVersion": API, "kind": "TrainJob", "metadata": about, "spec": spec}]


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
    documents = manifest(job)
    answer = subprocess.run(
        ["kubectl", "create", "-f", "-"], input=_as_yaml(documents), capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise UserError(f"kubectl rejected the job: {answer.stderr.strip()}")
    return Submitted(documents[-1]["metadata"]["name"], answer.stdout.strip())


def _as_yaml(documents: list[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)


def _runtime(job: Job) -> dict[str, Any]:
    site = job.site.kubernetes
    node = {
        "name": "node",
        "image": site.image,
        "envFrom": [{"secretRef": {"name": secret}} for secret in site.secrets],
        "volumeMounts": [{"name": "run", "mountPath": site.mount}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [node],
        "volumes": [
            {"name": "run", "persistentVolumeClaim": {"claimName": site.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    # A failed pod ends its job immediately, and all pods restart together.
    nodes = {
        "name": "node",
        "template": {
            "metadata": {"labels": {STEP_LABEL: "trainer"}},
            "spec": {"backoffLimit": 0, "template": {"spec": pod}},
        },
    }
    restarts = site.restarts if job.is_training else 0
    return {
        "mlPolicy": {"numNodes": job.nodes, "torch": {}},
        "template": {"spec": {"failurePolicy": {"maxRestarts": restarts}, "replicatedJobs": [nodes]}},
    }
