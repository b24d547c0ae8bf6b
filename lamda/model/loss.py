"""Cross-entropy in nats and the log-partition for z-loss, in fp32 or wider whatever the logits are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 256
"""Rows of logits that are widened at a time."""
HEAD_ROWS = 4096
"""Rows whose logits `head_losses` holds at a time."""


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor, weights_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over the targets: (nats, logsumexp²), scalars; the caller divides by the number of targets.

    weights_BL: factor of each target, 0 where it has no loss. z-loss is a small factor times the
    second sum: it keeps the softmax's normaliser near 1 (Lingvo: 1e-4).
    """
    nats_BL, partition_BL = token_losses(logits_BLV, targets_BL)
    squares_BL = partition_BL.square()
    if weights_BL is not None:
        nats_BL, squares_BL = nats_BL * weights_BL, squares_BL * weights_BL
    return nats_BL.sum(), squares_BL.sum()


def token_nats(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, [B, L]."""
    return token_losses(logits_BLV, targets_BL)[0]


def token_losses(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target in nats and the logsumexp of its logits, [B, L] each."""
    nats_N, partition_N = _CrossEntropy.apply(logits_BLV.flatten(0, 1), targets_BL.flatten())
    return nats_N.view(targets_BL.shape), partition_N.view(targets_BL.shape)


def head_losses(x_BLD: Tensor, weight_VD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses` of the logits x W^T, which exist for HEAD_ROWS rows at a time and are computed twice."""
    nats_N, partition_N = _Head.apply(x_BLD.flatten(0, 1), weight_VD, targets_BL.flatten())
    return nats_N.view(targets_BL.shape), partition_N.view(targets_BL.shape)


class _CrossEntropy(torch.autograd.Function):
    """(nats, logsumexp) of each of N rows. Wide copies exist for a few rows at a time, in both directions."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        nats_N, partition_N = _losses(logits_NV, targets_N)
        ctx.save_for_backward(logits_NV, targets_N, partition_N)
        return nats_N, partition_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nats_N: Tensor, d_partition_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, partition_N = ctx.saved_tensors
        return _d_logits(logits_NV, targets_N, partition_N, d_nats_N, d_partition_N), None


class _Head(torch.autograd.Function):
    """The same of x W^T. The gradient of W adds up in the loss's precision."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(x_ND.split(HEAD_ROWS), targets_N.split(HEAD_ROWS), strict=True)
        losses = [_losses(x @ weight_VD.T, targets) for x, targets in pieces]
        nats_N, partition_N = (torch.cat(parts) for parts in zip(*losses, strict=True))
        ctx.save_for_backward(x_ND, weight_VD, targets_N, partition_N)
        return nats_N, partition_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nats_N: Tensor, d_partition_N: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_ND, weight_VD, targets_N, partition_N = ctx.saved_tensors
        d_x_ND = torch.empty_like(x_ND)
        is_trained = ctx.needs_input_grad[1]
        d_weight_VD = torch.zeros_like(weight_VD, dtype=partition_N.dtype) if is_trained else None
        parts = (x_ND, targets_N, partition_N, d_nats_N, d_partition_N, d_x_ND)
        for x, targets, partition, d_nats, d_partition, d_x in zip(
            *(part.split(HEAD_ROWS) for part in parts), strict=True
        ):
            d_logits = _d_logits(x @ weight_VD.T, targets, partition, d_nats, d_partition)
            torch.mm(d_logits, weight_VD, out=d_x)
            if d_weight_VD is not None:
                d_weight_VD += d_logits.T @ x
        return d_x_ND, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype), None


def _losses(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    partition_N = torch.cat([rows.to(wide).logsumexp(-1) for rows in logits_NV.split(ROWS)])
    return partition_N - logits_NV.gather(-1, targets_N[:, None])[:, 0], partition_N


def _d_logits(
    logits_NV: Tensor, targets_N: Tensor, partition_N: Tensor, d_nats_N: Tensor, d_partition_N: Tensor
) -> Tensor:
    """The partition's gradient is softmax; that of nats is softmax less 1 at the target."""
    d_logits_NV = torch.empty_like(logits_NV)
    parts = (logits_NV, targets_N, partition_N, d_nats_N, d_nats_N + d_partition_N, d_logits_NV)
    for logits, targets, partition, d_target, d_softmax, d_logits in zip(
        *(part.split(ROWS) for part in parts), strict=True
    ):
        wide = (logits.to(partition.dtype) - partition[:, None]).exp_().mul_(d_softmax[:, None])
        d_logits.copy_(wide.scatter_add_(-1, targets[:, None], -d_target[:, None]))
    return d_logits_NV
