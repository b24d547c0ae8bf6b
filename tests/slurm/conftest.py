"""Two nodes, a place for runs, and the unbroken run that all others are compared with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.faults.harness import Place
from tests.launch import ENVIRONMENT, ROOT
from tests.slurm.cluster import Slurm

STEPS = 240
SITE = """
cluster:
  scheduler: slurm
  ranks_per_node: 1
  gpu: null
  export: [CUDA_VISIBLE_DEVICES, DS_ACCELERATOR]
slurm: {exclusive: false}
"""
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch")

Submit = Callable[..., subprocess.CompletedProcess[str]]


def missing(*tools: str) -> str | None:
    """Why these tests cannot run here, None where they can."""
    if os.geteuid():
        return "SLURM's daemons and network namespaces need root"
    absent = [tool for tool in tools if not shutil.which(tool)]
    return f"there is no {', no '.join(absent)} (`make cluster` installs them on Debian)" if absent else None


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster that is up."""
    if reason := missing(*TOOLS):
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Place:
    """Corpus, tokenizer, configuration and cluster file."""
    place = Place.make(tmp_path_factory.mktemp("jobs"), tokenizer_path)
    (place.folder / "slurm.yaml").write_text(SITE, "utf-8")
    return place


@pytest.fixture(scope="session")
def submit(place: Place, slurm: Slurm) -> Submit:
    """`lamda submit` for a run on two nodes, with the flags given."""

    def run(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        cluster = ["--cluster", str(place.folder / "slurm.yaml"), "--nodes", "2"]
        return lamda("submit", *cluster, *settings(place, name), *flags, variables=slurm.environment)

    return run


def settings(place: Place, name: str) -> list[str]:
    """The flags of a run, the same for all of them."""
    run = ["--config", str(place.folder / "run.yaml"), "--run.dir", str(place.folder / name)]
    return [*run, "--train.steps", str(STEPS), "--checkpoint.every", "80"]


def lamda(*arguments: str, variables: Mapping[str, str], timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    """The command, as a user types it."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from lamda.cli import main; sys.exit(main())", *arguments],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def unbroken(place: Place, slurm: Slurm, submit: Submit) -> str:
    """A run of two nodes that nothing befalls."""
    answer = submit("unbroken")
    assert answer.returncode == 0, answer.stderr
    number = number_of(answer)
    slurm.wait(lambda: slurm.ended(number), "the unbroken run to end", seconds=600)
    job = slurm.job(number)
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "0", "2"), job_log(place, "unbroken")
    return "unbroken"


def number_of(answer: subprocess.CompletedProcess[str]) -> str:
    """The job's number, as `lamda submit` tells it."""
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.split()[1]


def job_log(place: Place, run: str) -> str:
    """Everything that the jobs of a run wrote."""
    logs = sorted((place.folder / run / "submit").rglob("*.log"))
    return "\n".join(f"--- {log}\n{log.read_text('utf-8', 'replace')[-4000:]}" for log in logs)
