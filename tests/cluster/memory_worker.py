"""Measures what DeepSpeed allocates and sends on this rank; `test_memory.py` starts it and compares.

`memory_worker.py PRESET CASES.json OUT.json`: a case is a configuration of DeepSpeed's. Rank 0 writes, for each,
bytes: of weights, of the optimizer's masters and moments; copied for a checkpoint; alive when a step's last backward
pass has ended; the most alive at the start, and at any time of a step; given to each collective in a step.
"""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

from lamda import distributed
from lamda.config.schema import Config
from lamda.data.loader import MicroBatch, StepBatch
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from tests.cluster.storages import Storages

LENGTH, ACCUMULATION = 8, 2


WIDER = {"preset": "tiny", "d_model": 192, "n_heads": 6, "d_ff": 1536}
"""At `tiny`'s own width most of the memory at stage 3 are DeepSpeed's small buffers."""


def model_of(name: str) -> dict:
    """The `model` section of a preset, or of `wider`."""
    return WIDER if name == "wider" else {"preset": name}


def config(preset: str, file: Path, *, ranks: int) -> Config:
    """A run of a row a micro-batch."""
    train = {"steps": 9, "global_batch_size": ACCUMULATION * ranks, "micro_batch_size": 1}
    values = {"model": model_of(preset), "data": {"sequence_length": LENGTH}, "train": train}
    return Config.model_validate(values | {"deepspeed": {"config": str(file)}})


def size(tensors) -> int:
    """Bytes of the storages of tensors, each once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def known() -> list[torch.Tensor]:
    """All tensors that Python knows."""
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]


def alive(*, beside: set[int]) -> int:
    """Bytes of all tensors that Python knows but for those with these ids, and of their gradients."""
    tensors = [each for each in known() if id(each) not in beside]
    return size([*tensors, *(each.grad for each in tensors if each.is_leaf and each.grad is not None)])


def batch(world: distributed.World) -> StepBatch:
    """Two rows of this rank's."""
    every, none = np.ones((1, LENGTH), bool), np.zeros((1, LENGTH), np.int16)
    parts = tuple(MicroBatch(np.full((1, LENGTH + 1), at, np.uint32), every, none) for at in range(ACCUMULATION))
    own_rows = np.arange(ACCUMULATION) + ACCUMULATION * world.rank
    return StepBatch(parts, own_rows, np.zeros((ACCUMULATION, 32), np.uint8), 0)


def measure(preset: str, case: dict, world: distributed.World, device: torch.device, folder: Path) -> dict:
    """All figures of a case. What was there before it does not count."""
    file = folder / f"deepspeed-{world.rank}.json"
    file.write_text(json.dumps(case))
    there, found = known(), {}
    beside = {id(each) for each in there}
    with Storages() as storages:
        engine = DeepSpeedEngine(config(preset, file, ranks=world.world_size), world=world, device=device)
        engine.initialize_weights()
        found["start"] = storages.peak
        base = engine.deepspeed.basic_optimizer
        found["snapshot"] = engine.checkpoint_bytes()
        del engine._snapshots  # host memory, and here the host's is the device's
        storages.peak = storages.current
        found["weights"] = size(getattr(each, "ds_tensor", each) for each in engine.model.parameters())
        groups = [parameter for group in base.param_groups for parameter in group["params"]]
        masters = getattr(engine.deepspeed.optimizer, "fp32_partitioned_groups_flat", groups)
        found["masters"] = size(masters) if engine.deepspeed.optimizer is not base else 0
        found["moments"] = size(each for state in base.state.values() for each in state.values() if each.ndim)
        engine.deepspeed.allreduce_gradients = before(
            engine.deepspeed.allreduce_gradients, lambda: found.update(backward=alive(beside=beside))
        )
        engine.train_step(batch(world), lr=1e-4)
        del engine.deepspeed.allreduce_gradients
        storages.sent.clear()
        engine.train_step(batch(world), lr=1e-4)
        found["peak"], found["sent"] = storages.peak, dict(storages.sent)
    return found


def before(method, action):
    """The method, with an action before each call: the last one counts."""

    def both(*args, **kwargs):
        action()
        return method(*args, **kwargs)

    return both


def main() -> None:
    """Measure every case."""
    preset, cases, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    world = distributed.read_world()
    device = distributed.start(world, threads=1)
    found = [measure(preset, case, world, device, out.parent) for case in cases]
    if world.is_main_process:
        out.write_text(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main()
