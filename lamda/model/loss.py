"""Cross-entropy in nats and log Z for z-loss, in fp32 or wider for logits of any precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 256  # rows of logits converted to fp32 at a time

HEAD_ROWS = 4096  # rows whose logits `head_losses` keeps in memory at a time


def token_nll(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, [B, L]."""
    return token_losses(logits_BLV, targets_BL)[0]


def token_losses(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target in nats and the logsumexp of its logits, [B, L] each."""
    nll_N, log_z_N = _CrossEntropy.apply(logits_BLV.flatten(0, 1), targets_BL.flatten())
    return nll_N.view(targets_BL.shape), log_z_N.view(targets_BL.shape)


def head_losses(x_BLD: Tensor, weight_VD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses` of the logits x W^T, computed for HEAD_ROWS rows at a time, and again in the backward pass."""
    nll_N, log_z_N = _Head.apply(x_BLD.flatten(0, 1), weight_VD, targets_BL.flatten())
    return nll_N.view(targets_BL.shape), log_z_N.view(targets_BL.shape)


class _CrossEntropy(torch.autograd.Function):
    """(nats, logsumexp) of each of N rows. fp32 copies exist for ROWS rows at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        nll_N, log_z_N = _losses(logits_NV, targets_N)
        ctx.save_for_backward(logits_NV, targets_N, log_z_N)
        return nll_N, log_z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll_N: Tensor, d_log_z_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, log_z_N = ctx.saved_tensors
        return _d_logits(logits_NV, targets_N, log_z_N, d_nll_N, d_log_z_N), None


class _Head(torch.autograd.Function):
    """The same for x W^T. The gradient of W is accumulated in the precision of the loss."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(x_ND.split(HEAD_ROWS), targets_N.split(HEAD_ROWS), strict=True)
        losses = [_losses(x @ weight_VD.T, targets) for x, targets in pieces]
        nll_N, log_z_N = (torch.cat(parts) for parts in zip(*losses, strict=True))
        ctx.save_for_backward(x_ND, weight_VD, targets_N, log_z_N)
        return nll_N, log_z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll_N: Tensor, d_log_z_N: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_ND, weight_VD, targets_N, log_z_N = ctx.saved_tensors
        d_x_ND = torch.empty_like(x_ND)
        is_trained = ctx.needs_input_grad[1]
        d_weight_VD = torch.zeros_like(weight_VD, dtype=log_z_N.dtype) if is_trained else None
        parts = (x_ND, targets_N, log_z_N, d_nll_N, d_log_z_N, d_x_ND)
        for x, targets, log_z, d_nll, d_log_z, d_x in zip(*(part.split(HEAD_ROWS) for part in parts), strict=True):
            d_logits = _d_logits(x @ weight_VD.T, targets, log_z, d_nll, d_log_z)
            torch.mm(d_logits, weight_VD, out=d_x)
            if d_weight_VD is not None:
                d_weight_VD += d_logits.T @ x
        return d_x_ND, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype), None


def _losses(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    log_z_N = torch.cat([rows.to(dtype).logsumexp(-1) for rows in logits_NV.split(ROWS)])
    return log_z_N - logits_NV.gather(-1, targets_N[:, None])[:, 0], log_z_N


def _d_logits(logits_NV: Tensor, targets_N: Tensor, log_z_N: Tensor, d_nll_N: Tensor, d_log_z_N: Tensor) -> Tensor:
    """The gradient of log Z is the softmax; that of the nats is the softmax minus 1 at the target."""
    d_logits_NV = torch.empty_like(logits_NV)
    parts = (logits_NV, targets_N, log_z_N, d_nll_N, d_nll_N + d_log_z_N, d_logits_NV)
    for logits, targets, log_z, d_target, d_softmax, d_logits in zip(
        *(part.split(ROWS) for part in parts), strict=True
    ):
        gradient = (logits.to(log_z.dtype) - log_z[:, None]).exp_().mul_(d_softmax[:, None])
        d_logits.copy_(gradient.scatter_add_(-1, targets[:, None], -d_target[:, None]))
    return d_logits_NV
