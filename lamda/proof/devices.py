"""The device that is measured, and how to wait for it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from lamda import distributed
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


@cache
def deepspeed_obstacle() -> str | None:
    """Why DeepSpeed cannot be used here: it is not installed, or its import fails, as without a CUDA compiler."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    distributed.choose_accelerator()
    try:
        importlib.import_module("deepspeed")
    except Exception as error:  # whatever it looks for on this machine
        return f"deepspeed cannot be imported ({type(error).__name__}: {error})"
    return None


def loop_name() -> str:
    """What trains here."""
    obstacle = deepspeed_obstacle()
    return f"a plain loop: {obstacle}" if obstacle else "the engine (DeepSpeed)"


def require_deepspeed() -> None:
    """Raise LeftOutError where DeepSpeed cannot be used."""
    if obstacle := deepspeed_obstacle():
        raise LeftOutError(f"{obstacle}, and this part measures the engine")
