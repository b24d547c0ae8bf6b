"""The machine: GPU, driver, libraries, and the rates at which bytes come and go."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lamda import __version__
from lamda.cluster.checks.environment import writing_rate
from lamda.proof.devices import device, timed
from lamda.proof.findings import Findings, LeftOutError
from lamda.proof.sizes import Sizes
from lamda.training.provenance import cpu_name, versions

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "einops", "pydantic", "safetensors", "sentencepiece")
SMI_FIELDS = (
    "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current,mig.mode.current"
)


def measure(sizes: Sizes, findings: Findings, folder: Path) -> None:
    """Record the machine and its libraries."""
    findings.record("packages", {"python": platform.python_version(), "lamda": __version__} | versions(PACKAGES))
    findings.attempt("gpu", _gpu)
    findings.attempt("driver", _driver)
    findings.record("host", {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_bytes": _host_memory()})
    findings.attempt("copies", lambda: _copies(sizes.transfer_bytes))
    findings.attempt("disk", lambda: {"written": writing_rate(folder), "free_bytes": shutil.disk_usage(folder).free})


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise LeftOutError("there is no GPU")
    properties = torch.cuda.get_device_properties(0)
    free, _ = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability()),
        "memory_bytes": properties.total_memory,
        "free_bytes": free,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        raise LeftOutError("there is no nvidia-smi")
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return dict(zip(SMI_FIELDS.split(","), map(str.strip, done.stdout.split(",")), strict=True))


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _copies(size: int) -> dict[str, float]:
    """Bytes per second between host and device, from pinned memory and from ordinary memory."""
    if not torch.cuda.is_available():
        raise LeftOutError("there is no GPU")
    there = torch.empty(size, dtype=torch.uint8, device=device())
    rates = {}
    for kind in ("pinned", "pageable"):
        seconds, here = timed(partial(torch.zeros, size, dtype=torch.uint8, pin_memory=kind == "pinned"))
        rates[f"{kind}, allocated"] = size / seconds
        rates[f"{kind}, to the device"] = size / min(timed(partial(there.copy_, here))[0] for _ in range(3))
        rates[f"{kind}, to the host"] = size / min(timed(partial(here.copy_, there))[0] for _ in range(3))
    return rates
