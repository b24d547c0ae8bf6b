"""`benchmark.py train`: the training step of a configuration, beside the matrix FLOP/s of the same device.

model FLOP/s = tokens/s x (6 x matrices + 6 x layers x L x heads x head width): the backward pass is twice the forward,
causal attention counts half, recomputation is not counted. The matrix rate is of the five matrix products of the model
and their gradients, in the proportions of a step, measured after every step. The share is the median of the ratios per
step, so that other load on the machine affects both.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import new_parser, report
from lamda import distributed
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.data.loader import StepBatch
from lamda.dialog.examples import form_of
from lamda.distributed import World
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from lamda.model.counts import flops_per_token, parameters, peak_flops
from lamda.proof.gemm import MatrixRate
from lamda.proof.plain_loop import PlainLoop
from lamda.proof.step import Clock
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.inputs import Inputs

PACKAGES = ("torch", "deepspeed")
WARM_UP = 3
PARTS = ("data wait", "forward", "backward", "optimizer", "rest")


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("train", takes_config=True)
    parser.add_argument("--steps", type=int, default=20, help="that count, after 3 that do not (%(default)s)")
    parser.add_argument("--gemm-seconds", type=float, default=60.0, help="of matrix products (%(default)s)")
    parser.add_argument("--plain", action="store_true", help="the same step in plain PyTorch too, in turn with ours")
    options, rest = parser.parse_known_args(argv)

    def measured() -> dict[str, Any] | None:
        world, config = distributed.read_world(), load_config(rest)
        found = measure(config, world, steps=options.steps, seconds=options.gemm_seconds, plain=options.plain)
        return found if world.is_main_process else None

    return report(options, ["train", *argv], PACKAGES, measured, markdown)


def measure(config: Config, world: World, *, steps: int, seconds: float, plain: bool) -> dict[str, Any]:
    """The report of rank 0 on `steps` steps of all ranks."""
    if plain and world.world_size > 1:
        raise UserError("--plain: the plain loop runs on one rank")
    device = distributed.start(world, threads=config.run.threads)
    with ExitStack() as stack:
        stack.callback(distributed.stop)
        folder = Path(distributed.broadcast(stack.enter_context(tempfile.TemporaryDirectory())))
        inputs = Inputs.open(config, _directory(folder, world), world, form=form_of(config))
        engine = DeepSpeedEngine(config, world=world, device=device, domains=len(inputs.domains) + 1)
        engine.initialize_weights()
        dtype = torch.bfloat16 if engine.is_bf16 else torch.float32
        rows = config.train.micro_batch_size * config.data.sequence_length
        before = _allocated(device)
        products = MatrixRate(config.model, rows=rows, device=device, dtype=dtype)
        loader = stack.enter_context(inputs.loader(RunState()))
        beside = PlainLoop(config, device=device, dtype=dtype, compiled=engine.is_compiled) if plain else None
        others = _allocated(device) - before
        rounds = list(_rounds(engine, iter(loader), products, steps=steps, slice_=seconds / steps, beside=beside))
        for each in rounds:
            each["bytes"] -= others
    return _report(config, engine, products, rounds)


def _directory(folder: Path, world: World) -> RunDirectory:
    directory = RunDirectory(folder / "run")
    distributed.on_main(world, directory.create)
    return directory


def _rounds(
    engine: DeepSpeedEngine,
    batches: Iterator[StepBatch],
    products: MatrixRate,
    *,
    steps: int,
    slice_: float,
    beside: PlainLoop | None,
) -> Iterator[dict[str, float]]:
    """Seconds of each step and its parts, from fetching the batch to the metrics, and the matrix rate after it."""
    rate = engine.config.train.lr
    for number, (waited, step) in enumerate(islice(_fetched(batches), WARM_UP + steps)):
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)
        clock = Clock(engine.device)
        engine.train_step(step, lr=rate, on_phase=clock.mark).wait().loss()
        found = {"data wait": waited, **clock.parts(), "bytes": float(_peak_memory(engine.device))}
        if beside is not None:
            found["plain"] = _timed_plain(beside, step, engine.device, rate)
        if number >= WARM_UP:
            found["matrix rate"] = products.measure(slice_)
        yield found


def _fetched(batches: Iterator[StepBatch]) -> Iterator[tuple[float, StepBatch]]:
    while True:
        began = time.perf_counter()
        step = next(batches)
        yield time.perf_counter() - began, step


def _timed_plain(loop: PlainLoop, step: StepBatch, device: torch.device, rate: float) -> float:
    began = time.perf_counter()
    ids = torch.stack([torch.from_numpy(part.ids.astype("int64")) for part in step.micro_batches]).to(device)
    loop.step(ids, learning_rate=rate)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _allocated(device: torch.device) -> int:
    """Bytes in use on a GPU, to subtract what this benchmark itself allocates; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of the GPU allocator since the step began, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report(
    config: Config, engine: DeepSpeedEngine, products: MatrixRate, rounds: list[dict[str, float]]
) -> dict[str, Any]:
    train, length, ranks = config.train, config.data.sequence_length, engine.world.world_size
    counted = rounds[WARM_UP:]
    tokens = train.global_batch_size * length
    flops = tokens * flops_per_token(config.model, length) / ranks
    seconds = [each["whole"] + each["data wait"] for each in counted]
    shares = [flops / took / each["matrix rate"] for took, each in zip(seconds, counted, strict=True)]
    on_gpu = engine.device.type == "cuda"
    name = torch.cuda.get_device_name(engine.device) if on_gpu else "CPU"
    peak = peak_flops(name) if on_gpu else None
    step = median(seconds)
    report = {
        "device": name,
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "model": config.model.dimensions,
        "parameters": parameters(config.model),
        "rows": {"length": length, "micro_batch": train.micro_batch_size, "batch": train.global_batch_size},
        "how": {
            "attention": engine.model.attention,
            "compiled": engine.is_compiled,
            "recompute": train.recompute,
            "optimizer": train.optimizer,
            "zero_stage": engine.stage,
            "bf16": engine.is_bf16,
        },
        "matrix_rate": products.report(),
        "step_seconds": step,
        "first_step_seconds": rounds[0]["whole"],
        "tokens_per_second": tokens / step,
        "model_flops_per_second": flops / step,
        "share_of_matrix_rate": {"median": median(shares), "rounds": shares},
        "mfu": flops / step / peak if peak else None,
        "peak_memory_bytes": int(rounds[WARM_UP - 1]["bytes"]),
        "parts": {part: median(each[part] for each in counted) for part in PARTS},
    }
    if "plain" in counted[0]:
        ratios = [each["whole"] / each["plain"] for each in counted]
        report["engine_to_plain"] = {"median": median(ratios), "rounds": ratios}
    return report


def markdown(report: dict[str, Any]) -> str:
    """The table of a report with its environment."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rows, how, step = report["rows"], report["how"], report["step_seconds"]
    mfu = "none (no data sheet for this device)" if report["mfu"] is None else f"{report['mfu']:.1%}"
    lines = [
        ("tokens/s", f"{report['tokens_per_second']:,.0f}"),
        ("model TFLOP/s per rank", f"{report['model_flops_per_second'] / 1e12:.3g}"),
        ("matrix rate, TFLOP/s per rank", f"{report['matrix_rate']['flops_per_second'] / 1e12:.3g}"),
        ("share of the matrix rate", _with_spread(report["share_of_matrix_rate"], ".1%")),
        ("MFU", mfu),
        ("peak memory per rank", f"{report['peak_memory_bytes'] / 1e9:.2f} GB"),
        ("step", f"{step:.3f} s (the first {report['first_step_seconds']:.1f} s)"),
        *((f"- {part}", f"{seconds / step:.1%}") for part, seconds in report["parts"].items()),
    ]
    if "engine_to_plain" in report:
        lines.append(("step under the engine / plain PyTorch", _with_spread(report["engine_to_plain"], ".3f")))
    kind = f"{'bf16' if how['bf16'] else 'fp32'}, ZeRO {how['zero_stage']}, {how['optimizer']}"
    way = f"{'compiled' if how['compiled'] else 'eager'}, attention {how['attention']}, recompute {how['recompute']}"
    return "\n".join(
        [
            f"`{report['command']}` at {report['commit']}, {report['ranks']} x {report['device']} ({report['cpu']}, "
            f"{report['cores']} cores, {report['threads']} threads per rank), {versions}.",
            f"{report['parameters']:,} parameters, micro-batch {rows['micro_batch']} x {rows['length']}, batch "
            f"{rows['batch']}; {kind}; {way}.",
            "",
            "| | |",
            "|---|---:|",
            *(f"| {name} | {value} |" for name, value in lines),
        ]
    )


def _with_spread(ratio: dict[str, Any], form: str) -> str:
    return f"{ratio['median']:{form}} ({min(ratio['rounds']):{form}} to {max(ratio['rounds']):{form}})"
