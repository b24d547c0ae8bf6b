"""A run on many nodes, before a scheduler is chosen: what is started, where, and what is wrong with it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from lamda.cluster.plan import Machine, plan
from lamda.cluster.site import Site
from lamda.config import ds_config
from lamda.config.batches import micro_batches_per_rank
from lamda.config.errors import UserError, all_of
from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.storage.run_directory import RunDirectory

TRAINING, DOCTOR = "lamda.launch.pretrain", "lamda.cluster.doctor"


@dataclass(frozen=True)
class Submitted:
    """A job that waits in a scheduler's queue, by its name there, and what to tell a person of it."""

    name: str
    told: str


@dataclass(frozen=True)
class Job:
    """`module` on `nodes` nodes of a site.

    folder: of this submission in the run directory; the script, the configuration as it was and the logs go there.
    """

    site: Site
    config: Config
    nodes: int
    module: str
    folder: Path

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir).absolute()

    @property
    def name(self) -> str:
        """A name that every scheduler takes."""
        return re.sub("[^a-z0-9]+", "-", self.run.name.lower()).strip("-")[:40].rstrip("-") or "lamda"

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.nodes * self.site.cluster.ranks_per_node

    @property
    def python(self) -> str:
        """The interpreter on the nodes."""
        return self.site.cluster.python or sys.executable

    @property
    def is_training(self) -> bool:
        """Whether this trains; the doctor only looks."""
        return self.module == TRAINING

    @property
    def config_file(self) -> Path:
        """The configuration as it was when the job was submitted; later edits of the user's file are another run's."""
        return self.folder / "config.yaml"

    def write(self, **files: str) -> None:
        """Make the folder, with the configuration and other small files. Raises UserError."""
        RunDirectory(self.run).create()
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError as error:
            raise UserError(f"{self.folder}: something was submitted in this very second; try again") from error
        for name, text in {"config.yaml": to_yaml(self.config), **files}.items():
            (self.folder / name).write_text(text, "utf-8")

    def check(self) -> None:
        """Raises UserError, which names everything that would end the job after its wait in the queue."""
        all_of(self._check_batch, self._check_deepspeed, RunDirectory(self.run).require_no_writer)

    def _check_batch(self) -> None:
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes}: a job needs at least 1 node")
        try:
            micro_batches_per_rank(self.config.train, world=self.ranks)
        except UserError as error:
            per_node = self.site.cluster.ranks_per_node
            nodes = " or ".join(f"--nodes {number}" for number in self._nodes_that_work())
            fitting = f"with {per_node} ranks a node, {nodes}" if nodes else f"no number of nodes with {per_node} ranks"
            raise UserError(f"{error}; {fitting}") from error
        self._check_memory()

    def _check_memory(self) -> None:
        gpu = self.site.cluster.gpu
        if gpu is None or not self.is_training:
            return
        planned = plan(self.config, Machine(gpus=self.ranks, gpu=gpu))
        if not planned["memory"]["fits"]:
            raise UserError("\n".join(planned["warnings"]))

    def _check_deepspeed(self) -> None:
        ds_config.build(self.config, world=1)  # the batch has a check of its own

    def _nodes_that_work(self) -> list[int]:
        """The two nearest numbers of nodes whose ranks can share the batch as it is."""
        train, per_node = self.config.train, self.site.cluster.ranks_per_node
        count = train.global_batch_size // train.micro_batch_size
        fitting = [nodes for nodes in range(1, count // per_node + 1) if count % (nodes * per_node) == 0]
        return sorted(sorted(fitting, key=lambda nodes: abs(nodes - self.nodes))[:2])
