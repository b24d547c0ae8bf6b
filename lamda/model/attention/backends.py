"""The attention backends, and which devices each of them supports."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from lamda.config.errors import UserError

_KERNELS = ("fused", "split")

OLDEST = (8, 0)  # the lowest compute capability that the kernels were compiled for; older GPUs have no bf16


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


def backend_for(name: str, device: torch.device) -> Backend:
    """The backend of this name. Raises UserError if it does not run on the device."""
    check_backend(name, device)
    return import_module(f"lamda.model.attention.{name}")


def check_backend(name: str, device: torch.device, *, training: bool = False) -> None:
    """Raise UserError if backend `name` does not run (or, with `training`, train) on the device."""
    if name == "flex" and training and device.type == "cpu":
        raise UserError(
            "model.attention is flex: FlexAttention has no backward pass on the CPU; train with `math` or `sdpa`"
        )
    if name in _KERNELS or (name == "flex" and training):
        missing = _missing_for_kernels(device)
        if missing:
            raise UserError(
                f"model.attention is {name}, whose kernels need {missing}; `math` and `sdpa` run on every device"
            )


def _missing_for_kernels(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "the package triton, which is not installed"
    from lamda.model.attention.kernels import INTERPRETED

    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"a GPU, and the model is on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        return f"a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer, and this one's is {major}.{minor}"
    return None
