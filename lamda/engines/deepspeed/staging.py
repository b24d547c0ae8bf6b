"""Copies between host and device that nobody waits for: through pinned memory, in order with the device's work.

PyTorch keeps pinned memory that was freed, and hands it out again only when the copies that use it have ended. So each
copy has a buffer of its own, and after the first steps none is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamda.data.loader import MicroBatch

ALIGNMENT = 16
"""Bytes: every array begins where any type of element may."""


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on the device, by one copy."""
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // ALIGNMENT) * ALIGNMENT)
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for array, start in zip(arrays, starts, strict=False):
        part = host.numpy()[start : start + array.nbytes]
        part.view(array.dtype).reshape(array.shape)[...] = array
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_dtype_of(array)).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def _dtype_of(array: NDArray[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


class ToHost:
    """A tensor on its way to the host. It waits for the work before the copy, not for later work."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy, self._done = tensor, None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> NDArray[Any]:
        """The values, once they are here."""
        if self._done is not None:
            self._done.synchronize()
        values: NDArray[Any] = self._copy.numpy()
        return values


def arrays_of(rows: MicroBatch) -> list[NDArray[Any]]:
    """What the device needs of a micro-batch: ids, loss mask, domains, and documents if there are any."""
    found: list[NDArray[Any]] = [rows.ids.astype(np.int64), rows.loss_mask.astype(np.float32)]
    found.append(rows.domains.astype(np.int64))
    if rows.documents is not None:
        found.append(rows.documents[:, :-1].astype(np.int64))
    return found


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch on the device.

    inputs, targets: [b, L] int64. documents: [b, L], where attention stays inside a document. loss_mask:
    [b, L] fp32, 1 where the target counts. domains: [b, L] int64, of the targets.
    """

    inputs_BL: torch.Tensor
    targets_BL: torch.Tensor
    documents_BL: torch.Tensor | None
    loss_mask_BL: torch.Tensor
    domains_BL: torch.Tensor

    @classmethod
    def of(
        cls, ids: torch.Tensor, loss_mask: torch.Tensor, domains: torch.Tensor, documents: torch.Tensor | None = None
    ) -> DeviceBatch:
        """Of the tensors of `arrays_of`."""
        return cls(ids[:, :-1], ids[:, 1:], documents, loss_mask, domains)

    def sums(self, nll_BL: torch.Tensor, *, domains: int) -> torch.Tensor:
        """[2, domains] float64: nats and target tokens by domain, the same on any number of ranks.

        A matrix product in fp32 sums in one order on every device; float64 then adds the sums of ranks exactly.
        """
        numbers = torch.arange(domains, device=nll_BL.device)
        of_domain_dN = (self.domains_BL.flatten() == numbers[:, None]).float() * self.loss_mask_BL.flatten()
        return torch.stack([of_domain_dN @ nll_BL.float().flatten(), of_domain_dN.sum(dim=1)]).double()
