"""The attention backends on a device: the one that `model.attention` means there, and whether it runs."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib import import_module
from importlib.util import find_spec
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
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    target = Target(capability, dtype.itemsize, width, missing=_missing(), interpreted=_is_interpreted())
    return resolve(attention, target, training=training)


def _is_interpreted() -> bool:
    if find_spec("triton") is None:
        return False
    from lamda.model.attention import kernels

    return kernels.INTERPRETED


@cache
def _missing() -> str | None:
    """What Triton needs and this machine lacks."""
    if find_spec("triton") is None:
        return "the package triton, which is not installed"
    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang or CC), which is not installed"
    return None
