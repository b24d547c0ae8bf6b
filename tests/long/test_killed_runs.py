"""A run on real text, killed again and again on changing numbers of ranks, ends with the weights of an unbroken one.

W&B, which watches it, ends with one run that has each step once.

`make test-long` kills it 5 times, `make faults-full` 20 times; it needs LAMDA_TEST_DATA.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamda.storage.metrics import read_metrics
from tests.launch import ENVIRONMENT, ROOT, free_port
from tests.wandb_run import environment
from tests.wandb_server import WandbServer

STEPS, KILLS = (60, 5) if os.environ.get("LAMDA_FAULTS") != "full" else (200, 20)
DATA = os.environ.get("LAMDA_TEST_DATA")
FLAGS = {
    "model.vocab_size": 2000, "model.d_model": 64, "model.n_layers": 2, "model.n_heads": 2, "model.d_head": 32,
    "model.d_ff": 128, "tokenizer.train_bytes": 2_000_000, "data.corpus": "standard_library",
    "data.sequence_length": 128,
    "train.steps": STEPS, "train.global_batch_size": 16, "train.micro_batch_size": 4,
    "checkpoint.every": 4, "data.files": f"{DATA}/pile-sample/train/*.jsonl.zst",
    "data.eval_files": f"{DATA}/pile-sample/val.jsonl.zst",
}  # fmt: skip


def start(run: Path, *, ranks: int, wandb: WandbServer | None = None) -> subprocess.Popen:
    """`deepspeed --num_gpus RANKS scripts/pretrain.py ...` in a process group of its own."""
    mode = "disabled" if wandb is None else "online"
    launcher = Path(sys.executable).with_name("deepspeed")
    flags = [
        part
        for key, value in {**FLAGS, "run.dir": run, "wandb.mode": mode}.items()
        for part in (f"--{key}", str(value))
    ]
    command = [
        str(launcher),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        "scripts/pretrain.py",
        *flags,
    ]
    variables = {**os.environ, **ENVIRONMENT, "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    if wandb is not None:
        watched = {"WANDB_MODE": mode, "WANDB_BASE_URL": wandb.url, "WANDB_API_KEY": "k" * 40}
        variables |= environment(run.parent / "home") | watched
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True)


def finished_steps(run: Path) -> int:
    rows = read_metrics(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


@pytest.mark.skipif(DATA is None, reason="LAMDA_TEST_DATA is not set")
def test_kills_at_random_on_one_and_two_ranks_change_no_bit(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert start(straight, ranks=1).wait(timeout=900) == 0
    with WandbServer() as wandb:
        kill_again_and_again(broken, wandb)
        assert start(broken, ranks=2, wandb=wandb).wait(timeout=900) == 0, said(broken)
    (watched,) = wandb.runs.values()
    assert watched.steps == list(range(1, STEPS + 1))
    columns = [[row["batch_digest"] for row in read_metrics(run / "metrics.jsonl")] for run in (straight, broken)]
    assert len(columns[0]) == STEPS
    assert columns[0] == columns[1]
    last = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert (straight / last).read_bytes() == (broken / last).read_bytes()


def kill_again_and_again(run: Path, wandb: WandbServer) -> None:
    """KILLS starts on one and two ranks in turn, each killed at a random moment after a few more steps."""
    draw = random.Random(17)
    for kill in range(KILLS):
        process = start(run, ranks=1 + kill % 2, wandb=wandb)
        goal = min(STEPS - 5, finished_steps(run) + draw.randint(3, 14 if KILLS == 5 else 12))
        while finished_steps(run) < goal and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.random() / 3)
        assert process.poll() is None, said(run)
        kill_everything_of(process, run)


def said(run: Path) -> str:
    """The end of what its starts wrote."""
    return (run.parent / f"{run.name}.log").read_text("utf-8")[-3000:]


def kill_everything_of(process: subprocess.Popen, run: Path) -> None:
    """SIGKILL to the launcher's group and to every rank, which the launcher put into groups of their own."""
    os.killpg(process.pid, signal.SIGKILL)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    process.wait()
