"""Steps of one small model on meshes of CPU devices, whose number is fixed when JAX starts: hence its own process.

`mesh_worker.py DEVICES FOLDER` writes what came out as JSON to FOLDER/DEVICES.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import jax

DEVICES = int(sys.argv[1])
jax.config.update("jax_num_cpu_devices", DEVICES)

import jax.numpy as jnp  # noqa: E402 - devices first
import numpy as np  # noqa: E402

from lamda.config.schema import Config, FlaxConfig  # noqa: E402
from lamda.data.loader import MicroBatch, StepBatch  # noqa: E402
from lamda.distributed import World, start_hosts, stop  # noqa: E402
from lamda.engines.flax.engine import FlaxEngine  # noqa: E402
from lamda.engines.flax.weights import plain_weights  # noqa: E402
from lamda.inference.sampling import Sampling  # noqa: E402
from lamda.model.initialization import initial_weights  # noqa: E402
from lamda.storage import commit  # noqa: E402

STEPS, BATCH, LENGTH, VOCABULARY = 3, 16, 12, 96
MESHES = {1: {"1x1x1": (1, 1, 8)}, 8: {"8x1x1": (1, 1, 1), "2x4x1": (4, 1, 2), "2x2x2": (2, 2, 2)}}
"""By the number of devices: fsdp, tensor and train.micro_batch_size of each."""


def config_of(fsdp: int, tensor: int, *, micro_batch: int) -> Config:
    return Config(
        model={"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_head": 8, "d_ff": 64},
        data={"sequence_length": LENGTH},
        train={"steps": 9, "global_batch_size": BATCH, "micro_batch_size": micro_batch, "lr": 1e-3},
        flax=FlaxConfig(fsdp=fsdp, tensor=tensor),
    )


def batch_of(step: int, *, micro_batch: int) -> StepBatch:
    """The same rows for every cut into micro-batches; some targets do not count, rows hold two documents."""
    random = np.random.default_rng(step)
    ids = random.integers(VOCABULARY, size=(BATCH, LENGTH + 1)).astype(np.uint32)
    domains = random.integers(2, size=(BATCH, LENGTH)).astype(np.int16)
    scored = random.random((BATCH, LENGTH)) < 0.8
    documents = np.repeat(np.arange(LENGTH + 1)[None] > 5, BATCH, axis=0).astype(np.int32)
    parts = [slice(start, start + micro_batch) for start in range(0, BATCH, micro_batch)]
    rows = tuple(MicroBatch(ids[part], scored[part], domains[part], documents[part]) for part in parts)
    return StepBatch(rows, np.arange(BATCH), np.zeros((BATCH, 32), np.uint8), BATCH)


def trained(engine: FlaxEngine, *, micro_batch: int) -> dict[str, object]:
    steps = [
        engine.train_step(batch_of(step, micro_batch=micro_batch), lr=1e-4, counters=(1,)) for step in range(STEPS)
    ]
    results = [step.wait() for step in steps]
    return {
        "losses": [result.loss() for result in results],
        "norms": [result.grad_norm for result in results],
        "domains": [result.by_domain() for result in results],
        "written": engine.generate([3, 1, 4], Sampling(max_new_tokens=8, temperature=0)),
        "weights": {name: weight.tolist() for name, weight in plain_weights(engine.state.weights)},
    }


def wrong_at_start(engine: FlaxEngine) -> list[str]:
    """The weights that are not as drawn."""
    drawn = initial_weights(engine.config.model, seed=engine.config.run.seed)
    found = plain_weights(engine.state.weights)
    return [name for name, each in found if not np.array_equal(each, drawn[name].draw().numpy())]


def of_program(engine: FlaxEngine, *, micro_batch: int) -> dict[str, object]:
    """What the compiled step gathers, and what of all layers it has at once: whole weights, and scores; by shape."""
    batch = engine._placed_batch(batch_of(0, micro_batch=micro_batch))
    text = engine._step.lower(engine.state, batch, jnp.float32(1e-4)).compile().as_text()
    gathered = re.findall(r"= \(?\w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    cut = [weight for weight in engine.state.weights.values() if weight.ndim == 3 and "fsdp" in weight.sharding.spec]
    whole = {",".join(map(str, weight.shape)) for weight in cut}
    model = engine.config.model
    scores = re.findall(rf"\[({model.n_layers},\d+,{model.n_heads},{LENGTH},{LENGTH})\]", text)
    return {
        "gathered": Counter(gathered),
        "whole": sorted(shape for shape in whole if f"[{shape}]" in text),
        "scores": sorted(set(scores)),
    }


def odd_after_a_flip(engine: FlaxEngine) -> list[int]:
    """The odd processes after one bit of one device's copy of a weight has turned over."""
    name = "final_norm.scale"
    weight = engine.state.weights[name]
    copies = [np.array(shard.data) for shard in weight.addressable_shards]
    copies[5].view(np.uint32)[3] ^= 1
    placed = [jax.device_put(copy, shard.device) for copy, shard in zip(copies, weight.addressable_shards, strict=True)]
    engine.state.weights[name] = jax.make_array_from_single_device_arrays(weight.shape, weight.sharding, placed)
    return engine.corrupted_ranks()


def main(folder: Path) -> None:
    start_hosts(World(), threads=1)
    engines, found = {}, {}
    for name, (fsdp, tensor, micro_batch) in MESHES[DEVICES].items():
        config = config_of(fsdp, tensor, micro_batch=micro_batch)
        engines[name] = FlaxEngine(config, world=World(), is_bf16=False, domains=2)
        engines[name].initialize_weights()
        wrong = wrong_at_start(engines[name])
        found[name] = trained(engines[name], micro_batch=micro_batch) | {"wrong at start": wrong}
    if DEVICES == 8:
        (folder / "checkpoint").mkdir()
        files = engines["2x2x2"].snapshot(folder / "checkpoint")()
        names = {str(file.relative_to(folder / "checkpoint")): commit.sync_and_describe(file) for file in files}
        commit.seal(folder / "checkpoint", {"files": names})
        resumed = FlaxEngine(engines["2x4x1"].config, world=World(), is_bf16=False, domains=2)
        resumed.load_checkpoint(folder / "checkpoint")
        engines["2x4x1"].state = resumed.state
        found["moved"] = {name: each.tolist() for name, each in plain_weights(engines["2x4x1"].state.weights)}
        found["moved on"] = trained(engines["2x4x1"], micro_batch=2)
        found["on"] = trained(engines["2x2x2"], micro_batch=2)
        found["program"] = of_program(engines["2x4x1"], micro_batch=2)
        found["odd"] = engines["8x1x1"].corrupted_ranks()
        found["odd after a flip"] = odd_after_a_flip(engines["8x1x1"])
    stop()
    (folder / f"{DEVICES}.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
