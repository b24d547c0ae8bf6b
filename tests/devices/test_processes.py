"""JAX over two processes that share every weight: the same steps as in one, and a checkpoint that one goes on from."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

from lamda.storage.metrics import read_metrics
from tests.faults.harness import Place
from tests.launch import ENVIRONMENT, ROOT, run_ranks


def in_a_slurm_step(arguments: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Two tasks of a step, as far as JAX looks to find them."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    tasks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **step, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    message = [task.communicate(timeout=900) for task in tasks]
    return [
        subprocess.CompletedProcess(task.args, task.returncode, *each)
        for task, each in zip(tasks, message, strict=True)
    ]


def test_two_processes_train_as_one_and_one_continues(tmp_path, tokenizer_path):
    place = Place.make(tmp_path, tokenizer_path)

    def arguments(run: str, *more: str) -> list[str]:
        own = ["--config", f"{tmp_path}/run.yaml", "--run.dir", f"{tmp_path}/{run}", "--run.weight_check_every", "2"]
        fp32 = ["--deepspeed.config", "deepspeed/fp32.json", "--train.schedule", "inverse_sqrt"]
        return ["scripts/pretrain_flax.py", *own, *fp32, *more]

    def alone(*words: str) -> None:
        environment = {**os.environ, **ENVIRONMENT}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    alone(*arguments("one"))
    for run, more in (("copies", ["--multihost"]), ("cut", ["--flax.fsdp", "2"])):
        words = arguments(run, *more, "--train.steps", "6")
        ranks = in_a_slurm_step(words) if "--multihost" in more else run_ranks(words, world_size=2)
        assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
        alone(*arguments(run))
        rows, expected = (read_metrics(place.folder / each / "metrics.jsonl") for each in (run, "one"))
        assert [row["batch_digest"] for row in rows] == [row["batch_digest"] for row in expected]
        for name in ("loss", "grad_norm"):
            given = ([row[name] for row in each] for each in (rows, expected))
            np.testing.assert_allclose(*given, rtol=0, atol=1e-5, err_msg=f"{name} of {run}")
