"""Which way of computing attention runs where; what does not run is an error that names what does."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from lamda.config.errors import UserError

_KERNELS = ("fused", "split")

OLDEST = (8, 0)
"""The oldest compute capability that the kernels were compiled for; older ones have no bf16."""


class Backend(Protocol):
    """A module of this package. Every one gives the numbers of `math`, up to rounding.

    The bias and the mask are in a form of its own, made once for all layers where they share it.
    """

    def bias(self, table_RH: Tensor, buckets_N: Tensor, *, queries: int, keys: int) -> Tensor:
        """The bias of the last `queries` of `keys` positions from a table and the buckets of all distances."""
        ...

    def mask(self, tokens_BL: Tensor, documents_BL: Tensor | None) -> Any:
        """What hides keys of other documents."""
        ...

    def attend(self, q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, bias: Tensor, mask: Any) -> Tensor:
        """Attention [B, H, L, K]."""
        ...


def backend_for(name: str, device: torch.device) -> Backend:
    """The backend of that name. Raises UserError where it does not run on the device."""
    check_backend(name, device)
    return import_module(f"lamda.model.attention.{name}")


def check_backend(name: str, device: torch.device, *, training: bool = False) -> None:
    """Raise UserError where `name` does not run on the device, or cannot train there, with what does."""
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
