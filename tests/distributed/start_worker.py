"""Starts a model under ZeRO stage 3 on this rank and measures host memory; `start_worker.py CASE.json OUT`.

A case: {"model": dimensions, "sub_group_size": elements}. Each rank writes to OUT/<rank>.json, in bytes by the kernel's
own figures (VmRSS, VmHWM), what the process had before and the peak of the start, and its share of the state: 16 bytes
per parameter over all ranks (bf16 weights and gradients, fp32 masters and moments).
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path

import torch

from lamda import distributed
from lamda.config.schema import Config
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.model.counts import parameters

TINY = {"vocab_size": 64, "d_model": 16, "n_layers": 1, "n_heads": 1, "d_head": 16, "d_ff": 16}


def status(key: str) -> int:
    """A figure of this process in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def config(case: dict, file: Path) -> Config:
    """A run of the case; its DeepSpeed file is written."""
    zero = {"stage": 3, "reduce_bucket_size": 1_000_000, "sub_group_size": case["sub_group_size"]}
    file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero}))
    train = {"steps": 9, "global_batch_size": 2, "micro_batch_size": 1}
    values = {"run": {"seed": 3}, "model": case["model"], "data": {"sequence_length": 8}, "train": train}
    return Config.model_validate(values | {"deepspeed": {"config": str(file)}})


def start(own: Config, world: distributed.World, device: torch.device) -> DeepSpeedEngine:
    """An engine with initial weights."""
    engine = DeepSpeedEngine(own, world=world, device=device)
    engine.initialize_weights()
    return engine


def main() -> None:
    """Measure. Should memory run out, this process ends rather than another one."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    case, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    world = distributed.read_world()
    device = distributed.start(world, threads=1)
    own = config(case, out / f"deepspeed-{world.rank}.json")
    share = 16 * parameters(own.model) // world.world_size
    resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9 + 3 * share // 2, -1))
    start(config({"model": TINY, "sub_group_size": 1}, out / f"tiny-{world.rank}.json"), world, device)
    before = status("VmRSS")  # with all that a start imports
    start(own, world, device)
    found = {"before": before, "share": share, "start": status("VmHWM")}
    (out / f"{world.rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
