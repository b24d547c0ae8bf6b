"""Forward and backward time of every attention backend that trains on this device.

All backends do the same work in turn, for several rounds, so that other load on the machine affects all of them. A
ratio compares two times of one round; the report has the median over rounds. The timed work is from the packed
projection of queries, keys and values and the bias table to the output, and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, get_args

import torch
from einops import rearrange
from torch import Tensor

from lamda.config.errors import UserError
from lamda.config.schema import Backend as BackendName
from lamda.model.attention.backends import Backend, backend_for, choose_backend
from lamda.model.attention.bias import BAND, causal_buckets
from lamda.model.weights import BUCKETS
from lamda.proof.devices import device, timed

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
REFERENCE: BackendName = "math"
ROUNDS = 9
PARTS = ("forward", "backward")


def measure(
    *,
    lengths: Sequence[int],
    tokens: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    compiled: bool,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Times, ratios to `math` and memory for each length, and why a backend is left out, or failed."""
    here = device()
    backends: dict[str, Backend] = {}
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in BACKENDS:
        try:
            choose_backend(name, here, dtype=dtype, width=width, training=True)
            backends[name] = backend_for(name)
        except UserError as error:
            left_out[name] = str(error)
    short = [length for length in lengths if length > tokens]
    if short:
        raise UserError(f"--tokens {tokens} is less than a row of --lengths {short[0]}: give at least that")
    measured = {}
    for length in lengths:
        work: dict[str, Work] = {}
        for way, backend in backends.items():
            each = Work(backend, rows=tokens // length, length=length, heads=heads, width=width, dtype=dtype,
                        compiled=compiled)  # fmt: skip
            try:
                each.run()
            except Exception as error:  # a kernel, a compiler or memory: the others are measured all the same
                failed[f"{way} at {length}"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            else:
                work[way] = each
        measured[str(length)] = _rounds(work, rounds) | {"rows": tokens // length}
    shape = {"heads": heads, "width": width, "dtype": str(dtype).removeprefix("torch."), "compiled": compiled}
    return {
        "device": torch.cuda.get_device_name(here) if here.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "shape": shape,
        "lengths": measured,
        "left_out": left_out,
        "failed": failed,
    }


class Work:
    """Attention of one backend; the inputs are the same for all backends."""

    def __init__(
        self,
        backend: Backend,
        *,
        rows: int,
        length: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        compiled: bool,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device(), dtype)

        self.flops = 2 * rows * heads * length**2 * width
        self._backend, self._length, self._heads = backend, length, heads
        self._packed = (width**-0.25 * draw(rows, length, 3 * heads * width)).requires_grad_()
        self._table = (0.1 * draw(BUCKETS, heads)).requires_grad_()
        self._d_out = draw(rows, length, heads * width)
        self._mask = backend.mask(torch.empty(rows, length, dtype=torch.long, device=device()), None)
        self._buckets = causal_buckets(max(length, BAND), device=device())
        self._attend = torch.compile(self._forward) if compiled else self._forward

    def _forward(self, packed: Tensor, table: Tensor) -> Tensor:
        q, k, v = rearrange(packed, "b l (n h k) -> n b h l k", n=3, h=self._heads).unbind()
        bias = self._backend.bias(table, self._buckets, queries=self._length, keys=self._length)
        return rearrange(self._backend.attend(q, k, v, bias, self._mask), "b h l k -> b l (h k)")

    def run(self) -> dict[str, float]:
        """Seconds of each part, and on a GPU the peak memory in bytes beyond the inputs."""
        self._packed.grad = self._table.grad = None
        on_gpu = self._packed.is_cuda
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds, out = timed(lambda: self._attend(self._packed, self._table))
        found = {"forward": seconds, "backward": timed(lambda: out.backward(self._d_out))[0]}
        if on_gpu:
            found["bytes"] = torch.cuda.max_memory_allocated() - before
        return found


def _rounds(work: dict[str, Work], count: int) -> dict[str, Any]:
    """All backends in turn, after another warm-up round that fills caches."""
    rounds = [{name: each.run() for name, each in work.items()} for _ in range(count + 1)][1:]
    return {"backends": {name: _medians(rounds, name, flops=each.flops) for name, each in work.items()}}


def _medians(rounds: Sequence[dict[str, dict[str, float]]], name: str, *, flops: int) -> dict[str, Any]:
    def total(each: dict[str, float]) -> float:
        return sum(each[part] for part in PARTS)

    found = [each[name] for each in rounds]
    ratios = [total(each[REFERENCE]) / total(each[name]) for each in rounds if REFERENCE in each]
    seconds = median(map(total, found))
    return {
        "seconds": {part: median(each[part] for each in found) for part in PARTS},
        "times_as_fast_as_math": {"median": median(ratios), "rounds": ratios} if ratios else None,
        "teraflops_per_second": 3 * flops / seconds / 1e12,
        "peak_megabytes": max(each["bytes"] for each in found) / 1e6 if "bytes" in found[0] else None,
    }
