"""`split`: far keys by a plain causal kernel, near ones by ours with the bias, merged by their log-sum-exp.

Queries from BAND on see the keys at least BAND before them without any bias: plain causal attention of
q[BAND:] on k[:-BAND]. With the softmax's parts weighed,

    out = exp(lse_near - lse) out_near + exp(lse_far - lse) out_far      lse = log(exp lse_near + exp lse_far)

and backward each part's own kernel gets the merged out and lse. Documents are no plain causal pattern:
with them one kernel of ours takes near and far keys, as `fused` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamda.model.attention import fused, kernel_ops
from lamda.model.attention.bias import BAND
from lamda.model.attention.fused import bias, mask, with_band_gradient
from lamda.model.attention.plain import check_plain, plain_attention, plain_attention_backward

__all__ = ["attend", "bias", "mask"]


def attend(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, band_HN: Tensor, documents_BL: Tensor | None) -> Tensor:
    """Attention [B, H, L, K] of all L positions. Raises UserError where no plain kernel takes the precision or K."""
    check_plain(q_BHLK)
    if documents_BL is not None:
        return fused.attend(q_BHLK, k_BHLK, v_BHLK, band_HN, documents_BL)
    out_BHLK, lse_BHL = _Attention.apply(q_BHLK, k_BHLK, v_BHLK, band_HN.detach())
    return with_band_gradient(out_BHLK, lse_BHL, q_BHLK, k_BHLK, v_BHLK, band_HN, None)


class _Attention(torch.autograd.Function):
    """(out, lse); lse has no gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernel_ops.band_attention(q, k, v, band, None, near=True)
        if q.shape[2] > BAND:
            far_out, far_lse = plain_attention(q[:, :, BAND:], k[:, :, :-BAND], v[:, :, :-BAND])
            near_out, near_lse = out[:, :, BAND:], lse[:, :, BAND:].clone()
            lse[:, :, BAND:] = torch.logaddexp(near_lse, far_lse)
            near_share, far_share = ((each - lse[:, :, BAND:]).exp()[..., None] for each in (near_lse, far_lse))
            near_out.copy_(near_share * near_out + far_share * far_out)
        ctx.save_for_backward(q, k, v, band, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, band, out, lse = ctx.saved_tensors
        d_q, d_k, d_v = kernel_ops.band_attention_backward(d_out, q, k, v, band, None, out, lse, near=True)
        if q.shape[2] > BAND:
            d_out, q, out, lse = (each[:, :, BAND:].contiguous() for each in (d_out, q, out, lse))
            far = plain_attention_backward(d_out, q, k[:, :, :-BAND], v[:, :, :-BAND], out, lse)
            d_q[:, :, BAND:] += far[0]
            d_k[:, :, :-BAND] += far[1]
            d_v[:, :, :-BAND] += far[2]
        return d_q, d_k, d_v, None
