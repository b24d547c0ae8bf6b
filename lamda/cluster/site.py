"""A site: its nodes and its scheduler, in one YAML file that is independent of models."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from lamda.cluster.estimates import DEVICES, unknown_device
from lamda.config.settings import Contents, Problem, Schema
from lamda.config.values import Positive, Section

Texts = tuple[str, ...]
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_NAME = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
"""A valid Kubernetes name."""
OWN_OPTIONS = (
    "array", "cpus-per-task", "error", "export", "gpus-per-node", "job-name", "nodes", "no-requeue", "ntasks",
    "ntasks-per-node", "open-mode", "output", "requeue", "signal", "time",
)  # fmt: skip
"""sbatch options that the script sets itself, or that would start the run more than once."""


def seconds(time: str) -> int:
    """A SLURM time limit in seconds. Raises ValueError if SLURM would reject it."""
    found = _TIME.fullmatch(time)
    if not found:
        raise ValueError(f"{time!r} is not a SLURM time; write minutes, hours:minutes:seconds or days-hours")
    days, *parts = found.groups()
    units = (60, 1, 0) if days is None and parts[2] is None else (3600, 60, 1)
    return int(days or 0) * 86400 + sum(int(part or 0) * unit for part, unit in zip(parts, units, strict=True))


def _time(time: str) -> str:
    seconds(time)
    return time


class ClusterConfig(Section):
    """The nodes and settings for all schedulers."""

    scheduler: Literal["slurm", "hostfile", "kubernetes"] = Field(description="what starts processes on the nodes")
    ranks_per_node: Positive = Field(8, description="processes per node, one per GPU")
    gpu: str | None = Field("h100", description="type of the nodes' GPUs; null: no GPUs, ranks use the CPU")
    python: str | None = Field(
        None, description="interpreter on the nodes; default: the submitting one, in Kubernetes the image's"
    )
    setup: Texts = Field((), description="shell lines before the start: `module load`, `source`")
    export: Texts = Field((), description="more patterns of environment variables to pass on, such as FI_*")

    @field_validator("gpu")
    @classmethod
    def _known(cls, gpu: str | None) -> str | None:
        if gpu is not None and gpu not in DEVICES:
            raise ValueError(unknown_device(gpu))
        return gpu


class SlurmConfig(Section):
    """Batch job settings."""

    partition: str | None = Field(None, description="default: the site's")
    account: str | None = Field(None, description="account to charge; default: the user's")
    qos: str | None = Field(None, description="quality of service; default: the user's")
    time: Annotated[str, AfterValidator(_time)] | None = Field(
        None, description="time limit of one start, as SLURM writes it (2-00:00:00); default: the partition's"
    )
    cpus_per_node: Positive | None = Field(None, description="CPU cores of a node that the ranks share")
    exclusive: bool = Field(default=True, description="no other job on the nodes")
    options: Texts = Field((), description="more sbatch options, such as --constraint=nvlink")

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: Texts) -> Texts:
        for option in options:
            name = option.partition("=")[0]
            if not name.startswith("--"):
                raise ValueError(f"{option!r} must be written --name=value")
            if name.removeprefix("--") in OWN_OPTIONS:
                raise ValueError(f"{name} is set by `lamda submit` itself")
        return options


class HostfileConfig(Section):
    """Machines reached over ssh, without a scheduler."""

    hosts: Annotated[Texts, Field(min_length=1)] | None = Field(None, description="host names for ssh")
    master_address: str | None = Field(None, description="where rank 0 listens; default: the first host's name")
    master_port: Annotated[int, Field(gt=0, lt=65536)] = Field(29500, description="port where rank 0 listens")
    ssh_options: Texts = Field((), description="ssh options, such as `-p 2222`")

    @field_validator("hosts")
    @classmethod
    def _once(cls, hosts: Texts | None) -> Texts | None:
        duplicate = next((host for host in hosts or () if (hosts or ()).count(host) > 1), None)
        if duplicate:
            raise ValueError(f"{duplicate} is listed twice")
        return hosts


class KubernetesConfig(Section):
    """A namespace with Kubeflow Trainer (v2.3 or later)."""

    namespace: str = Field("default", pattern=_NAME, description="namespace of the job")
    image: str | None = Field(None, description="built from the Dockerfile")
    claim: str | None = Field(None, description="volume claim (ReadWriteMany) that holds the run directory")
    mount: str = Field("/data", pattern="/.+", description="where the volume is mounted")
    secrets: Texts = Field((), description="Secrets whose keys become environment variables (WANDB_API_KEY, HF_TOKEN)")
    restarts: int = Field(20, ge=0, description="how often a failed job starts again before it is given up")


class Site(Section):
    """A cluster file."""

    cluster: ClusterConfig
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    hostfile: HostfileConfig = Field(default_factory=HostfileConfig)
    kubernetes: KubernetesConfig = Field(default_factory=KubernetesConfig)


SCHEMA = Schema(Site, flag="cluster", among="configs/cluster/*.yaml")
_NEEDED = {"hostfile": ("hostfile.hosts",), "kubernetes": ("kubernetes.image", "kubernetes.claim")}


def load_site(file: str) -> Site:
    """Read a cluster file. Raises `ConfigError` with one line per problem."""
    problems: list[Problem] = []
    contents = SCHEMA.read(file, problems)
    if scheduler := contents.settings.get("cluster.scheduler"):
        problems += _misplaced(contents, str(scheduler.value))
    return SCHEMA.build(contents, problems)


def _misplaced(contents: Contents, scheduler: str) -> list[Problem]:
    """Missing keys of this scheduler, and keys of other schedulers, which are not read."""
    found = [
        Problem(contents.sections[key.split(".")[0]], key, f"is required for scheduler {scheduler}")
        for key in _NEEDED.get(scheduler, ())
        if key not in contents.settings
    ]
    return found + [
        Problem(setting.place, key, f"is not read for scheduler {scheduler}; remove it")
        for key, setting in contents.settings.items()
        if key.split(".")[0] not in ("cluster", scheduler)
    ]
