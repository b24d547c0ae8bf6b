"""Attention's time in every backend, beside plain causal attention, which has no bias: the bound."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from lamda.proof import attention
from lamda.proof.devices import device, timed
from lamda.proof.findings import Findings
from lamda.proof.sizes import Sizes


def measure(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Record times for each length, eager and compiled."""
    shape = {"tokens": sizes.tokens, "heads": sizes.heads, "width": sizes.width, "rounds": sizes.rounds}
    for length in sizes.lengths:
        findings.attempt(f"{length}, no bias", partial(_without_bias, sizes, length))
        for way in ("eager", "compiled") if "kernels" in sizes.compiled else ("eager",):
            timed = partial(
                attention.measure, lengths=[length], dtype=torch.bfloat16, compiled=way == "compiled", **shape
            )
            report = findings.attempt(f"{length}, {way}", timed)
            for name, reason in report["failed"].items() if report else ():
                findings.fail(f"{name}, {way}", reason)


def _without_bias(sizes: Sizes, length: int) -> dict[str, Any]:
    """Seconds of PyTorch's causal attention without a bias, forward and backward."""
    rows = sizes.tokens // length
    shape = (rows, sizes.heads, length, sizes.width)
    q, k, v = (torch.randn(shape, device=device(), dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    d_out = torch.randn_like(q)
    rounds = []
    for _ in range(sizes.rounds + 2):
        forward, out = timed(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0))
        backward, _ = timed(partial(torch.autograd.grad, out, (q, k, v), d_out))
        rounds.append((forward, backward))
    forward, backward = (median(column) for column in zip(*rounds[2:], strict=True))
    flops = 3 * 2 * rows * sizes.heads * length**2 * sizes.width
    return {
        "seconds": {"forward": forward, "backward": backward},
        "teraflops_per_second": flops / (forward + backward) / 1e12,
    }
