"""A job on many nodes, for any scheduler: its command, its checks, and the environment of its ranks."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml

from lamda.cluster.plan import Machine, plan
from lamda.cluster.site import Site
from lamda.config import ds_config
from lamda.config.batches import micro_batches_per_rank
from lamda.config.errors import UserError, all_of
from lamda.config.help import to_yaml
from lamda.config.resources import templates
from lamda.config.schema import Config
from lamda.storage.run_directory import RunDirectory

TRAINING, DOCTOR = "lamda.launch.pretrain", "lamda.cluster.doctor"
PASSED_ON = ("NCCL_*", "GLOO_*", "HF_*", "WANDB_*", "OMP_*", "TORCH_*", "PYTHONPATH", "*_proxy", "*_PROXY")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


@dataclass(frozen=True)
class Submitted:
    """A job in a scheduler's queue: its name there, and a message for the user."""

    name: str
    message: str


@dataclass(frozen=True)
class Job:
    """`module` on `nodes` nodes of a site, with `options` before the configuration.

    folder: of this submission, in the run directory; holds the script, a copy of the configuration, and logs.
    """

    site: Site
    config: Config
    nodes: int
    module: str
    folder: Path
    options: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir).absolute()

    @property
    def name(self) -> str:
        """A name that every scheduler accepts."""
        return re.sub("[^a-z0-9]+", "-", self.run.name.lower()).strip("-")[:40].rstrip("-") or "lamda"

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.nodes * self.site.cluster.ranks_per_node

    @property
    def python(self) -> str:
        """The interpreter on the nodes."""
        return self.site.cluster.python or sys.executable

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables for the ranks, without secrets."""
        return {name: value for name, value in self._passed_on().items() if not is_secret(name, value)}

    @property
    def secrets(self) -> list[str]:
        """Names of environment variables for the ranks that must stay out of files and command lines."""
        return [name for name, value in self._passed_on().items() if is_secret(name, value)]

    def _passed_on(self) -> dict[str, str]:
        return passed_on(os.environ, self.site.cluster.export)

    @property
    def command(self) -> str:
        """The module and its options, for a shell."""
        return shlex.join([self.module, *self.options])

    @property
    def is_training(self) -> bool:
        """Whether this job trains; the doctor only checks."""
        return self.module == TRAINING

    @property
    def config_file(self) -> Path:
        """The configuration at submission; later edits of the user's file do not affect this job."""
        return self.folder / "config.yaml"

    def write(self, **files: str) -> None:
        """Make the folder, with the configuration and other small files. Raises UserError."""
        RunDirectory(self.run).create()
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError as error:
            raise UserError(f"{self.folder}: another job was submitted in the same second; try again") from error
        for name, text in {"config.yaml": to_yaml(self.config), **files}.items():
            (self.folder / name).write_text(text, "utf-8")

    def render(self, name: str, /, **values: object) -> str:
        """A script or manifest for this job from its template."""
        return _TEMPLATES.get_template(f"{name}.jinja").render(values, job=self, cluster=self.site.cluster)

    def check(self) -> None:
        """Raises UserError, which names everything that would end the job after its wait in the queue."""
        all_of(
            self._check_batch,
            lambda: ds_config.build(self.config, world_size=1),  # _check_batch checks the batch
            RunDirectory(self.run).require_no_writer,
        )

    def _check_batch(self) -> None:
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes}: a job needs at least 1 node")
        try:
            micro_batches_per_rank(self.config.train, world_size=self.ranks)
        except UserError as error:
            per_node = self.site.cluster.ranks_per_node
            nodes = " or ".join(f"--nodes {number}" for number in self._nodes_that_work())
            fitting = (
                f"with {per_node} ranks per node, {nodes}" if nodes else f"no number of nodes with {per_node} ranks"
            )
            raise UserError(f"{error}; {fitting}") from error
        self._check_memory()

    def _check_memory(self) -> None:
        gpu = self.site.cluster.gpu
        if gpu is None or not self.is_training:
            return
        planned = plan(self.config, Machine(gpus=self.ranks, gpu=gpu))
        if not planned.memory.fits:
            raise UserError("\n".join(planned.warnings))

    def _nodes_that_work(self) -> list[int]:
        """The two nearest numbers of nodes whose ranks can share the batch."""
        train, per_node = self.config.train, self.site.cluster.ranks_per_node
        count = train.global_batch_size // train.micro_batch_size
        fitting = [nodes for nodes in range(1, count // per_node + 1) if count % (nodes * per_node) == 0]
        return sorted(sorted(fitting, key=lambda nodes: abs(nodes - self.nodes))[:2])


def passed_on(environment: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """The variables to pass on to the ranks: names that match PASSED_ON or a pattern in `more`."""
    patterns = (*PASSED_ON, *more)
    return {
        name: value
        for name, value in sorted(environment.items())
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def is_secret(name: str, value: str) -> bool:
    """Whether a variable must stay out of files and command lines: by its name, or as a URL with a password."""
    return any(word in name.upper() for word in _SECRET) or re.search("://[^/]*@", value) is not None


def _yaml_scalar(text: str, style: Literal['"', "|"] = '"') -> str:
    return yaml.safe_dump(text, default_style=style, width=math.inf).rstrip("\n")


_TEMPLATES = templates("cluster/templates")
_TEMPLATES.filters |= {"quote": lambda value: shlex.quote(str(value)), "yaml": _yaml_scalar}
