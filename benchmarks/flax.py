"""`benchmark.py flax`: the training step of a configuration in JAX and in plain PyTorch, alternating in one run.

Both compute the same step on the same random rows (`lamda.proof.plain_loop`), in the precision of the DeepSpeed file.
The ratio is the median over rounds, so that other load on the machine affects both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import new_parser, report
from lamda.config import ds_config
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.data.loader import MicroBatch, StepBatch
from lamda.distributed import stop
from lamda.engines.deepspeed import compile
from lamda.engines.flax.framework import Flax
from lamda.model.counts import flops_per_token, parameters
from lamda.proof.plain_loop import PlainLoop

PACKAGES = ("torch", "jax", "flax", "optax")
WARM_UP = 3


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("flax", takes_config=True)
    parser.add_argument("--steps", type=int, default=10, help="that count, after 3 that do not (%(default)s)")
    parser.add_argument("--alone", action="store_true", help="JAX alone: where PyTorch has no such device (TPU)")
    options, rest = parser.parse_known_args(argv)
    return report(
        options,
        ["flax", *argv],
        PACKAGES,
        lambda: measure(load_config(rest), steps=options.steps, alone=options.alone),
        markdown,
    )


def measure(config: Config, *, steps: int, alone: bool) -> dict[str, Any]:
    """Seconds of `steps` steps in each framework, and their ratio."""
    flax = Flax()
    world = flax.world()
    flax.check(config, world)
    engine = flax.engine(config, world=world, device=flax.start(config, world), domains=1)
    engine.initialize_weights()
    is_bf16 = ds_config.is_bf16(ds_config.read(config))
    beside = None if alone else _plain(config, is_bf16=is_bf16)
    rounds: dict[str, list[float]] = {"jax": [], "pytorch": []}
    for step in _random_steps(config, count=WARM_UP + steps):
        began = time.perf_counter()
        engine.train_step(step, lr=config.train.lr).wait().loss()
        rounds["jax"].append(time.perf_counter() - began)
        if beside is not None:
            rounds["pytorch"].append(_timed(beside, step, rate=config.train.lr))
    stop()
    tokens = config.train.global_batch_size * config.data.sequence_length
    flops = tokens * flops_per_token(config.model, config.data.sequence_length) / engine.num_devices
    seconds = {name: median(each[WARM_UP:]) for name, each in rounds.items() if each}
    counted = zip(rounds["jax"][WARM_UP:], rounds["pytorch"][WARM_UP:], strict=not alone)
    return {
        "device": _device_kind(),
        "devices": engine.num_devices,
        "mesh": dict(engine.mesh.shape),
        "model": config.model.dimensions,
        "parameters": parameters(config.model),
        "rows": {
            "length": config.data.sequence_length,
            "micro_batch": config.train.micro_batch_size,
            "batch": config.train.global_batch_size,
        },
        "how": {"bf16": is_bf16, "recompute": config.train.recompute, "pytorch_attention": config.model.attention},
        "step_seconds": seconds,
        "first_step_seconds": {name: each[0] for name, each in rounds.items() if each},
        "tokens_per_second": {name: tokens / each for name, each in seconds.items()},
        "mfu": flops / seconds["jax"] / engine.peak_flops if engine.peak_flops else None,
        "jax_to_pytorch": [jax / pytorch for jax, pytorch in counted],
    }


def markdown(report: dict[str, Any]) -> str:
    """The table of a report with its environment."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rows, precision = report["rows"], "bf16" if report["how"]["bf16"] else "fp32"
    lines = [
        f"`{report['command']}` at {report['commit']}, {report['devices']} x {report['device']} ({report['cpu']}, "
        f"{report['cores']} cores), {versions}.",
        f"{report['parameters']:,} parameters, micro-batch {rows['micro_batch']} x {rows['length']}, batch "
        f"{rows['batch']}, {precision}.",
        "",
        "| | tokens/s | step | the first step |",
        "|---|---:|---:|---:|",
    ]
    for name, seconds in report["step_seconds"].items():
        first, rate = report["first_step_seconds"][name], report["tokens_per_second"][name]
        lines.append(f"| {name} | {rate:,.0f} | {seconds:.3f} s | {first:.1f} s |")
    if ratios := report["jax_to_pytorch"]:
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"\nA step in JAX / the same in plain PyTorch: {spread}.")
    return "\n".join(lines)


def _device_kind() -> str:
    import jax

    return jax.devices()[0].device_kind


def _plain(config: Config, *, is_bf16: bool) -> PlainLoop:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = compile.is_worthwhile(config, device.type, stage=0)
    return PlainLoop(config, device=device, dtype=torch.bfloat16 if is_bf16 else torch.float32, compiled=compiled)


def _timed(loop: PlainLoop, step: StepBatch, *, rate: float) -> float:
    began = time.perf_counter()
    ids_MBL = torch.stack([torch.from_numpy(part.ids.astype("int64")) for part in step.micro_batches])
    loop.step(ids_MBL.to(loop.device), learning_rate=rate)
    if loop.device.type == "cuda":
        torch.cuda.synchronize(loop.device)
    return time.perf_counter() - began


def _random_steps(config: Config, *, count: int) -> Iterator[StepBatch]:
    random = np.random.default_rng(config.run.seed)
    batch, micro, length = config.train.global_batch_size, config.train.micro_batch_size, config.data.sequence_length
    for number in range(count):
        ids = random.integers(config.model.vocab_size, size=(batch // micro, micro, length + 1)).astype(np.uint32)
        loss_mask, domains = np.ones(ids[..., 1:].shape, bool), np.zeros(ids[..., 1:].shape, np.int16)
        rows = tuple(map(MicroBatch, ids, loss_mask, domains))
        yield StepBatch(rows, np.arange(batch), np.zeros((batch, 32), np.uint8), consumed=(number + 1) * batch)
