"""The attention backends on a device: the one that `model.attention` means there, and whether it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lamda.config.schema import Attention
from lamda.config.schema import Backend as BackendName
from lamda.model.backend_choice import Target, resolve


class Backend(Protocol):
    """A module of this package. All backends equal `math` up to rounding.

    Each has its own form of bias and mask, built once for all layers if they share the bias.
    """

    def bias(self, table_RH: Tensor, buckets_N: Tensor, *, queries: int, keys: int) -> Tensor:
        """The bias of the last `queries` of `keys` positions from a table and the buckets of all distances."""

    def mask(self, tokens_BL: Tensor, documents_BL: Tensor | None) -> Any:
        """The mask that hides keys of other documents."""

    def attend(self, q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, bias: Tensor, mask: Any) -> Tensor:
        """Attention [B, H, L, K]."""


def backend_for(name: BackendName) -> Backend:
    """The backend of this name."""
    return import_module(f"lamda.model.attention.{name}")


def choose_backend(
    attention: Attention, device: torch.device, *, dtype: torch.dtype, width: int, training: bool = False
) -> BackendName:
    """The backend that `model.attention` means on a device, for q, k and v of this dtype and width K.

    Raises UserError if it was named and does not compute (or, with `training`, train) there.
    """
    if attention == "auto" and device.type != "cuda":
        return "sdpa"
    if attention in ("math", "sdpa"):
        return attention
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    target = Target(capability, dtype.itemsize, width, missing=missing_for_triton(), interpreted=_is_interpreted())
    return resolve(attention, target, training=training)


def _is_interpreted() -> bool:
    if find_spec("triton") is None:
        return False
    from lamda.model.attention import kernels

    return kernels.INTERPRETED


@cache
def missing_for_triton() -> str | None:
    """What Triton needs and this machine lacks."""
    if find_spec("triton") is None:
        return "the package triton, which is not installed"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "a C compiler (gcc, clang or CC), which is not installed"
    if problem := _build_problem(compiler):
        return f"a C compiler that builds Python modules, and {compiler} does not ({problem})"
    return None


def _build_problem(compiler: str) -> str | None:
    """Why this compiler does not build a module of one line, as Triton builds the launcher of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "module.c")
        source.write_text("#include <Python.h>\n", "utf-8")
        command = [compiler, str(source), "-shared", "-fPIC", "-o", f"{folder}/module.so"]
        command.append(f"-I{sysconfig.get_path('include')}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return error.strerror
    said = [*done.stderr.splitlines(), f"exit code {done.returncode}"]
    return next((line for line in said if "error" in line), said[0]) if done.returncode else None
