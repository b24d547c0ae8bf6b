"""The device that is measured, and how to wait for it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from lamda.proof.findings import LeftOutError

T = TypeVar("T")


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def wait() -> None:
    """Wait for all work of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds from an idle device to an idle device, and the result."""
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - began, result


def has_deepspeed() -> bool:
    """Whether DeepSpeed is installed."""
    return importlib.util.find_spec("deepspeed") is not None


def require_deepspeed() -> None:
    """Raise LeftOutError where DeepSpeed is not installed."""
    if not has_deepspeed():
        raise LeftOutError("deepspeed is not installed, and this part measures the engine")
