"""Cross-entropy in nats and the log-partition for z-loss, in fp32 or wider whatever the logits are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

ROWS = 256
"""Rows of logits that are widened at a time."""


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


class _CrossEntropy(torch.autograd.Function):
    """(nats, logsumexp) of each of N rows. Wide copies exist for a few rows at a time, in both directions."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        partition_N = torch.cat([rows.to(wide).logsumexp(-1) for rows in logits_NV.split(ROWS)])
        ctx.save_for_backward(logits_NV, targets_N, partition_N)
        return partition_N - logits_NV.gather(-1, targets_N[:, None])[:, 0], partition_N

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_nats_N: Tensor, d_partition_N: Tensor) -> tuple[Tensor, None]:
        """The partition's gradient is softmax; that of nats is softmax less 1 at the target."""
        logits_NV, targets_N, partition_N = ctx.saved_tensors
        d_logits_NV = torch.empty_like(logits_NV)
        parts = (logits_NV, targets_N, partition_N, d_nats_N, d_nats_N + d_partition_N, d_logits_NV)
        pieces = zip(*(part.split(ROWS) for part in parts), strict=True)
        for logits, targets, partition, d_target, d_softmax, d_logits in pieces:
            wide = (logits.to(partition.dtype) - partition[:, None]).exp_().mul_(d_softmax[:, None])
            d_logits.copy_(wide.scatter_add_(-1, targets[:, None], -d_target[:, None]))
        return d_logits_NV, None
