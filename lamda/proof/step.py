"""The training step: time from fetch to fetch, its parts, memory, and what the device is busy with."""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lamda.config.schema import Config
from lamda.data.loader import MicroBatch, StepBatch
from lamda.engines.protocol import PhaseHook
from lamda.model.counts import flops_per_token, parameters, peak_flops
from lamda.proof.devices import deepspeed_obstacle, device, loop_name, timed, wait
from lamda.proof.findings import Findings
from lamda.proof.gemm import MatrixRate
from lamda.proof.models import attention, choose_config, open_engine
from lamda.proof.plain_loop import PlainLoop
from lamda.proof.sizes import Sizes

WARM_UP = 3
KINDS = {"forward": "forward", "loss": "backward", "backward": "optimizer"}
"""The part of a step that begins at a phase."""
TOP_KERNELS = 15
MAX_ROWS = 8192
"""Of the matrix products, which take 3 GB with the 2B then."""


class Clock:
    """Times of the phases of a step; on a GPU, by events of the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.mark("begin")

    def mark(self, point: str, _: torch.Tensor | None = None) -> None:
        """Record the time of `point`; called by an engine's `train_step`."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((point, event))
        else:
            self._marks.append((point, time.perf_counter()))

    def parts(self) -> dict[str, float]:
        """Seconds between points up to now or the mark "end", summed by kind, and of the whole step."""
        if self._marks[-1][0] != "end":
            self.mark("end")
        if self._on_gpu:
            torch.cuda.synchronize()
        parts = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0, "rest": 0.0}
        for (point, start), (_, end) in pairwise(self._marks):
            parts[KINDS.get(point, "rest")] += self._between(start, end)
        return {**parts, "whole": sum(parts.values())}

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start


Steps = Callable[[StepBatch, PhaseHook], Callable[[], float]]
"""A training loop's step: begins one, calls the hook, and returns a function that waits for it and returns its loss."""


def measure_rate(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Record the GEMM rate over time, on the model's own products: it falls where the device gets hot."""
    products = matrix_rate(choose_config(sizes, sizes.lengths[0]))
    findings.record("over_time", [products.measure(sizes.gemm_seconds / 5) for _ in range(5)])
    findings.record("rate", {**products.report(), "data_sheet": _peak_flops()})


def measure_short(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Measure steps with the shorter rows."""
    _measure(sizes, findings, length=sizes.lengths[0], compiled="short" in sizes.compiled)


def measure_long(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Measure steps with the longer rows."""
    _measure(sizes, findings, length=sizes.lengths[1], compiled="long" in sizes.compiled)


def _measure(sizes: Sizes, findings: Findings, *, length: int, compiled: bool) -> None:
    """Measure the largest model that fits, with rows of `length`: eager, and then `compiled`."""
    config = choose_config(sizes, length)
    findings.record("setting", describe(config))
    begin, compile_blocks = _plain(config) if deepspeed_obstacle() else _engine(config)
    before = _allocated()
    products = matrix_rate(config)
    beside = _allocated() - before
    for way in ("eager", "compiled") if compiled else ("eager",):
        if way == "compiled":
            compile_blocks()
        findings.attempt(way, lambda: time_steps(begin, config, products, sizes, beside=beside))
    findings.record("gemm", products.report())
    findings.attempt("waits", lambda: _waits(begin, config))
    findings.attempt("kernels", lambda: _kernels(begin, config))


def matrix_rate(config: Config) -> MatrixRate:
    """The model's products, with the rows of a micro-batch, but no more than fit beside a step."""
    rows = min(MAX_ROWS, config.train.micro_batch_size * config.data.sequence_length)
    return MatrixRate(config.model, rows=rows, device=device(), dtype=torch.bfloat16)


def describe(config: Config) -> dict[str, Any]:
    """The model, the rows and how they are computed."""
    train = config.train
    return {
        "loop": loop_name(),
        "parameters": parameters(config.model),
        "length": config.data.sequence_length,
        "micro_batch": train.micro_batch_size,
        "batch": train.global_batch_size,
        "attention": attention(config),
        "recompute": train.recompute,
        "optimizer": train.optimizer,
    }


def _engine(config: Config) -> tuple[Steps, Callable[[], None]]:
    engine = open_engine(config)

    def begin(batch: StepBatch, on_phase: PhaseHook) -> Callable[[], float]:
        step = engine.train_step(batch, lr=1e-4, on_phase=on_phase)
        return lambda: step.wait().loss()

    return begin, engine.compile_blocks


def _plain(config: Config) -> tuple[Steps, Callable[[], None]]:
    loop = PlainLoop(config, device=device(), dtype=torch.bfloat16, compiled=False)

    def begin(batch: StepBatch, on_phase: PhaseHook) -> Callable[[], float]:
        ids = torch.stack([torch.from_numpy(part.ids.astype("int64")) for part in batch.micro_batches])
        loss = loop.step(ids.to(device()), learning_rate=1e-4, on_phase=on_phase)
        return lambda: loss.item()

    return begin, loop.compile_blocks


def random_batches(config: Config) -> Iterator[StepBatch]:
    """Batches of random ids."""
    train, length = config.train, config.data.sequence_length
    generator, rows = np.random.default_rng(0), train.micro_batch_size
    shape = (rows, length)
    while True:
        parts = tuple(
            MicroBatch(
                generator.integers(3, config.model.vocab_size, (rows, length + 1), np.uint32),
                np.ones(shape, np.bool_),
                np.zeros(shape, np.int16),
            )
            for _ in range(train.global_batch_size // rows)
        )
        positions = np.arange(train.global_batch_size)
        yield StepBatch(parts, positions, np.zeros((len(positions), 32), np.uint8), consumed=len(positions))


def time_steps(begin: Steps, config: Config, products: MatrixRate, sizes: Sizes, *, beside: int) -> dict[str, Any]:
    """Times of steps as a run makes them: the metrics of a step are read after the next one has begun.

    beside: bytes of the products, which lie in the same memory and do not count.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches = random_batches(config)
    first_seconds, _ = timed(lambda: begin(next(batches), _ignore)())
    for _ in range(WARM_UP - 1):
        begin(next(batches), _ignore)()
    before = products.measure(sizes.gemm_seconds / 5)
    clocks, begins, seconds, loss = _timed_steps(begin, batches, sizes.steps)
    after = products.measure(sizes.gemm_seconds / 5)
    parts = [clock.parts() for clock in clocks]
    tokens = config.train.global_batch_size * config.data.sequence_length
    flops = tokens * flops_per_token(config.model, config.data.sequence_length) / seconds
    peak = _peak_flops()
    return {
        "step_seconds": seconds,
        "fetch_to_fetch": [later - earlier for earlier, later in pairwise(begins)],
        "first_step_seconds": first_seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_second": flops,
        "mfu": flops / peak if peak else None,
        "share_of_gemm_rate": 2 * flops / (before + after),
        "parts": {name: median(each[name] for each in parts) for name in parts[0]},
        "peak_bytes": _peak_bytes() - beside,
        "reserved_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
        "loss": loss,
    }


def _timed_steps(
    begin: Steps, batches: Iterator[StepBatch], count: int
) -> tuple[list[Clock], list[float], float, float]:
    """Clock and beginning of each step, the mean seconds of a step, and the last loss."""
    clocks: list[Clock] = []
    begins: list[float] = []
    wait()
    previous: Callable[[], float] | None = None
    for _ in range(count):
        begins.append(time.perf_counter())
        batch, clock = next(batches), Clock(device())
        step = begin(batch, clock.mark)
        clock.mark("end")
        clocks.append(clock)
        if previous is not None:
            previous()
        previous = step
    loss = step()
    wait()
    return clocks, begins, (time.perf_counter() - begins[0]) / count, loss


def _peak_flops() -> float | None:
    """FLOP/s by the data sheet, where there is one."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _ignore(phase: str, tensor: torch.Tensor | None) -> None:
    pass


def _allocated() -> int:
    """Bytes in use on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _peak_bytes() -> int:
    """Peak bytes of the GPU's allocator, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _waits(begin: Steps, config: Config) -> list[str]:
    """Where a step waits for the device, by PyTorch's own warnings; none on a CPU."""
    if not torch.cuda.is_available():
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            begin(next(random_batches(config)), _ignore)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wait()
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
    return sorted(places)


def _kernels(begin: Steps, config: Config) -> dict[str, Any]:
    """The kernels that take most of a step's time, and the share of the time in which the device is busy."""
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    batches, count = random_batches(config), 2
    with torch.profiler.profile(activities=[activity]) as profile:
        seconds, _ = timed(lambda: [begin(next(batches), _ignore) for _ in range(count)])

    def took(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    events = sorted(profile.key_averages(), key=took, reverse=True)
    return {
        "busy": sum(map(took, events)) / seconds,
        "top": [{"name": each.key[:90], "share": took(each) / seconds, "calls": each.count / count}
                for each in events[:TOP_KERNELS]],
    }  # fmt: skip
