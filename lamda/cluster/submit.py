"""`lamda submit`: start a run on a cluster, after checking everything that could be wrong with it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from lamda.cluster import hostfile, kubernetes, slurm
from lamda.cluster.job import DOCTOR, TRAINING, Job
from lamda.cluster.site import Site, load_site
from lamda.config.errors import UserError, all_of
from lamda.config.help import ConfigParser
from lamda.config.loading import load_config

SCHEDULERS = {"slurm": slurm, "hostfile": hostfile, "kubernetes": kubernetes}


def parser() -> ConfigParser:
    """The options of `lamda submit`."""
    parser = ConfigParser("lamda submit")
    parser.add_argument(
        "--cluster", metavar="FILE", help="scheduler, partition and the hardware of a node (configs/cluster/)"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default %(default)s")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--doctor", action="store_true", help="check all ranks instead of training")
    instead.add_argument(
        "--smoke", action="store_true", help="run `lamda doctor --smoke` on all ranks instead of training"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object for a queued job: scheduler, job, run, nodes, ranks"
    )
    return parser


def main(argv: list[str]) -> int:
    """Arguments as in the table of commands; 0, or for a hostfile the run's exit code. Raises UserError."""
    options, flags = parser().parse_known_args(argv)
    loaded: list[Any] = []
    all_of(lambda: loaded.append(_load_site(options.cluster)), lambda: loaded.append(load_config(flags)))
    site, config = loaded
    job = Job(
        site=site,
        config=config,
        nodes=options.nodes,
        module=DOCTOR if options.doctor or options.smoke else TRAINING,
        options=("--smoke",) if options.smoke else (),
        folder=Path(config.run.dir).absolute() / "submit" / f"{datetime.now():%Y%m%d-%H%M%S}",
    )
    scheduler = SCHEDULERS[site.cluster.scheduler]
    all_of(job.check, lambda: scheduler.check(job), lambda: _check_json(job, is_asked=options.json))
    if options.dry_run:
        print(scheduler.script(job), end="")
        return 0
    submitted = scheduler.submit(job)
    if isinstance(submitted, int):
        return submitted
    facts = {"job": submitted.name, "run": str(job.run), "nodes": job.nodes, "ranks": job.ranks}
    print(json.dumps({"scheduler": site.cluster.scheduler, **facts}) if options.json else submitted.message)
    return 0


def _check_json(job: Job, *, is_asked: bool) -> None:
    if is_asked and job.site.cluster.scheduler == "hostfile":
        raise UserError(
            "--json: over ssh there is no queued job; the command waits until the run ends, and its exit code and "
            f"{job.run}/status.json give the result"
        )


def _load_site(file: str | None) -> Site:
    if file is None:
        raise UserError("--cluster: no file given; write --cluster configs/cluster/slurm.yaml, or a copy of it")
    return load_site(file)
