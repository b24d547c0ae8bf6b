"""Start small runs of two ranks, let faults befall them, and compare what is left with an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lamda.storage.metrics import read_metrics
from tests.conftest import make_text, write_shard
from tests.launch import ENVIRONMENT, ROOT, free_port

STEPS = 10
SETTINGS = f"""
model: {{vocab_size: 400, d_model: 32, n_layers: 2, n_heads: 2, d_head: 16, d_ff: 64}}
train: {{steps: {STEPS}, global_batch_size: 8, micro_batch_size: 2, lr: 1e-2, warmup_steps: 3}}
checkpoint: {{every: 3, keep: 9}}
wandb: {{mode: disabled}}
"""
IS_FULL = os.environ.get("LAMDA_FAULTS") == "full"


@dataclass(frozen=True)
class Place:
    """A folder with a corpus, a tokenizer and a configuration; runs live beside them."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, tokenizer: Path) -> Place:
        for file in range(3):
            texts = [make_text(50 * file + n, 40 + 29 * n) for n in range(24)]
            write_shard(folder / "train" / f"{file}.jsonl.zst", texts)
        write_shard(folder / "val.jsonl", [make_text(900 + n, 30) for n in range(2)])
        data = {
            "corpus": "standard_library", "files": f"{folder}/train/*", "eval_files": f"{folder}/val.jsonl",
            "sequence_length": 32,
        }  # fmt: skip
        (folder / "run.yaml").write_text(
            f"{SETTINGS}\ndata: {json.dumps(data)}\ntokenizer: {{path: '{tokenizer}'}}\n", "utf-8"
        )
        for stage in (1, 2, 3):
            own = json.loads((ROOT / "ds_config.json").read_text("utf-8"))
            own["zero_optimization"]["stage"] = stage
            (folder / f"zero-{stage}.json").write_text(json.dumps(own), "utf-8")
        return cls(folder)

    def start(self, run: str, *flags: str, fault: str = "", ranks: int = 2, stage: int = 1) -> list[subprocess.Popen]:
        """The ranks of a run, each in a session of its own; their output goes to `<run>-<rank>.log`."""
        return [
            self._start_rank(run, flags, fault, rank, ranks, stage, port)
            for port in [free_port()]
            for rank in range(ranks)
        ]

    def run(self, run: str, *flags: str, timeout: float = 900, **more: Any) -> list[int]:
        """Run to the end; the ranks' exit codes."""
        processes = self.start(run, *flags, **more)
        try:
            return [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()

    def finish(self, run: str, *flags: str, **more: Any) -> None:
        """Run to the end, which must be a good one."""
        codes = self.run(run, *flags, **more)
        assert not any(codes), self.log(run)

    def log(self, run: str) -> str:
        """The last of what the ranks wrote."""
        return "\n".join(file.read_text("utf-8")[-3000:] for file in sorted(self.folder.glob(f"{run}-*.log")))

    def rows(self, run: str) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return read_metrics(self.folder / run / "metrics.jsonl")

    def status(self, run: str) -> dict[str, Any]:
        """status.json."""
        return json.loads((self.folder / run / "status.json").read_text("utf-8"))

    def checkpoints(self, run: str) -> list[str]:
        """Everything in the folder of checkpoints."""
        return sorted(path.name for path in (self.folder / run / "checkpoints").iterdir())

    def difference(self, one: str, other: str, *, step: int = STEPS) -> str | None:
        """Where two runs differ to the last bit: losses, samples, weights, optimizer state; None where nowhere."""
        for column in ("step", "loss", "batch_digest", "grad_norm", "lr"):
            columns = [[row[column] for row in self.rows(run)] for run in (one, other)]
            if columns[0] != columns[1]:
                return f"{column}: {columns}"
        folders = [self.folder / run / "checkpoints" / f"step-{step:08d}" for run in (one, other)]
        weights, states = zip(
            *((load_file(path / "model.safetensors"), state_of(path)) for path in folders), strict=True
        )
        for name, (left, right) in {"weights": weights, "state": states}.items():
            different = [key for key in left.keys() | right.keys() if not _same(left.get(key), right.get(key))]
            if different:
                return f"{name}: {different[:3]}"
        return None

    def _start_rank(
        self, run: str, flags: Sequence[str], fault: str, rank: int, ranks: int, stage: int, port: int
    ) -> subprocess.Popen:
        command = [sys.executable, "scripts/pretrain.py", "--config", str(self.folder / "run.yaml")]
        command += ["--run.dir", str(self.folder / run), "--deepspeed.config", str(self.folder / f"zero-{stage}.json")]
        environment = {
            **os.environ, **ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "LAMDA_FAULT": fault, "LAMDA_ALLOW_FAULTS": "1" if fault else "0",
        }  # fmt: skip
        with (self.folder / f"{run}-{rank}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *flags],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=hear_hangups,
            )


def hear_hangups() -> None:
    """Undo what `nohup make faults` leaves to every process below it: a run that ignores SIGHUP is right to do so."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Optimizer state by "name|kind", put together from the ranks' pieces."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in checkpoint.glob("optimizer-*.safetensors"):
        for key, tensor in load_file(file).items():
            name, kind, start = key.split("|")
            pieces.setdefault(f"{name}|{kind}", []).append((int(start), tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
        for name, parts in pieces.items()
    }


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
