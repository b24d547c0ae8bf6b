"""The GEMM rate that the device sustains on the 2B's own matrix products."""

from __future__ import annotations

from pathlib import Path

import torch

from lamda.model.counts import peak_flops
from lamda.proof.findings import Findings
from lamda.proof.models import choose_config
from lamda.proof.sizes import Sizes
from lamda.proof.step import matrix_rate


def measure(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Record the rate over time: it falls where the device gets hot."""
    config = choose_config(sizes, sizes.lengths[0])
    products = matrix_rate(config)
    findings.record("over_time", [products.measure(sizes.gemm_seconds / 5) for _ in range(5)])
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    findings.record("rate", {**products.report(), "data_sheet": peak})
