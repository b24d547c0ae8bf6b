"""`benchmark.py attention`: forward and backward time of every attention backend that trains on this device.

All backends do the same work in turn, for several rounds, so that other load on the machine affects all of them. A
ratio compares two times of one round; the report has the median over rounds. The timed work is from the packed
projection of queries, keys and values and the bias table to the output, and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, get_args

import torch
from einops import rearrange
from torch import Tensor

from benchmarks import new_parser, report
from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.model.attention.backends import Backend, backend_for, check_backend
from lamda.model.attention.bias import BAND, causal_buckets
from lamda.model.weights import BUCKETS

BACKENDS: tuple[str, ...] = get_args(ModelConfig.model_fields["attention"].annotation)
REFERENCE = "math"
ROUNDS = 9
PARTS = ("forward", "backward")
PACKAGES = ("torch", "numpy")


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("attention")
    gpu = torch.cuda.is_available()
    parser.add_argument(
        "--lengths", metavar="L", type=int, nargs="+", default=[1024, 2048, 4096] if gpu else [512, 1024]
    )
    parser.add_argument("--tokens", metavar="N", type=int, default=32768 if gpu else 2048, help="a batch (%(default)s)")
    parser.add_argument("--heads", metavar="H", type=int, default=40 if gpu else 8, help="(%(default)s)")
    parser.add_argument("--width", metavar="K", type=int, default=128 if gpu else 64, help="of a head (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile, as a compiled block has it")
    options = parser.parse_args(argv)
    return report(
        options,
        ["attention", *argv],
        PACKAGES,
        lambda: measure(
            lengths=options.lengths,
            tokens=options.tokens,
            heads=options.heads,
            width=options.width,
            dtype=getattr(torch, options.dtype),
            compiled=options.compile,
        ),
        markdown,
    )


def measure(
    *, lengths: Sequence[int], tokens: int, heads: int, width: int, dtype: torch.dtype, compiled: bool
) -> dict[str, Any]:
    """Times, ratios to `math` and memory for each length, and the reason for each backend that is left out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends, left_out = {}, {}
    for name in BACKENDS:
        try:
            check_backend(name, device, training=True)
            backends[name] = backend_for(name, device)
        except UserError as error:
            left_out[name] = str(error)
    short = [length for length in lengths if length > tokens]
    if short:
        raise UserError(f"--tokens {tokens} is less than a row of --lengths {short[0]}: give at least that")
    measured = {}
    for length in lengths:
        work = {
            name: Work(backend, rows=tokens // length, length=length, heads=heads, width=width, dtype=dtype,
                       device=device, compiled=compiled)
            for name, backend in backends.items()
        }  # fmt: skip
        measured[str(length)] = _rounds(work) | {"rows": tokens // length}
    shape = {"heads": heads, "width": width, "dtype": str(dtype).removeprefix("torch."), "compiled": compiled}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": device_name,
        "threads": torch.get_num_threads(),
        "shape": shape,
        "lengths": measured,
        "left_out": left_out,
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
        device: torch.device,
        compiled: bool,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.flops = 2 * rows * heads * length**2 * width
        self._backend, self._length, self._heads = backend, length, heads
        self._packed = (width**-0.25 * draw(rows, length, 3 * heads * width)).requires_grad_()
        self._table = (0.1 * draw(BUCKETS, heads)).requires_grad_()
        self._d_out = draw(rows, length, heads * width)
        self._mask = backend.mask(torch.empty(rows, length, dtype=torch.long, device=device), None)
        self._buckets = causal_buckets(max(length, BAND), device=device)
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
        seconds, out = _timed(lambda: self._attend(self._packed, self._table), on_gpu=on_gpu)
        found = {"forward": seconds, "backward": _timed(lambda: out.backward(self._d_out), on_gpu=on_gpu)[0]}
        if on_gpu:
            found["bytes"] = torch.cuda.max_memory_allocated() - before
        return found


def _timed(work: Callable[[], Any], *, on_gpu: bool) -> tuple[float, Any]:
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _rounds(work: dict[str, Work]) -> dict[str, Any]:
    """All backends in turn, after two warm-up rounds that compile and fill caches."""
    rounds = [{name: each.run() for name, each in work.items()} for _ in range(ROUNDS + 2)][2:]
    return {"backends": {name: _medians(rounds, name, flops=each.flops) for name, each in work.items()}}


def _medians(rounds: Sequence[dict[str, dict[str, float]]], name: str, *, flops: int) -> dict[str, Any]:
    def total(each: dict[str, float]) -> float:
        return sum(each[part] for part in PARTS)

    found = [each[name] for each in rounds]
    ratios = [total(each[REFERENCE]) / total(each[name]) for each in rounds]
    seconds = median(map(total, found))
    return {
        "seconds": {part: median(each[part] for each in found) for part in PARTS},
        "times_as_fast_as_math": {"median": median(ratios), "rounds": ratios},
        "teraflops_per_second": 3 * flops / seconds / 1e12,
        "peak_megabytes": max(each["bytes"] for each in found) / 1e6 if "bytes" in found[0] else None,
    }


def markdown(report: dict[str, Any]) -> str:
    """The table of a report with its environment."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    shape = report["shape"]
    way = "compiled" if shape["compiled"] else "eager"
    rows = [
        ["L", "backend", "forward ms", "backward ms", "times as fast as math", "rounds", "TFLOP/s", "peak MB"],
        ["---:", "---", "---:", "---:", "---:", "---:", "---:", "---:"],
    ]
    for length, found in report["lengths"].items():
        for name, each in found["backends"].items():
            ratios, peak = each["times_as_fast_as_math"], each["peak_megabytes"]
            rows.append(
                [
                    f"{found['rows']} x {length}",
                    name,
                    *(f"{each['seconds'][part] * 1e3:.2f}" for part in PARTS),
                    f"{ratios['median']:.2f}",
                    f"{min(ratios['rounds']):.2f} to {max(ratios['rounds']):.2f}",
                    f"{each['teraflops_per_second']:.3g}",
                    "" if peak is None else f"{peak:.0f}",
                ]
            )
    return "\n".join(
        [
            f"`{report['command']}` at {report['commit']}, {report['device']} ({report['cpu']}, {report['cores']} "
            f"cores, {report['threads']} threads), {versions}.",
            f"{shape['heads']} heads of {shape['width']}, {shape['dtype']}, {way}; a product of causal attention "
            "counts half, and the backward pass twice the forward.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *(f"Not measured: {reason}." for reason in report["left_out"].values()),
        ]
    )
