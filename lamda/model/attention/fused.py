"""`fused`: one forward and two backward Triton kernels, which read the bias only where it is not 0.

The bias enters without a gradient; `with_band_gradient` computes it with a separate kernel that reads only the band.
Memory grows with L, time with L^2. Needs a GPU (or Triton's interpreter).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamda.model.attention import kernel_ops
from lamda.model.attention.bias import bias_band as bias

__all__ = ["attend", "bias", "mask", "with_band_gradient"]


def mask(_: Tensor, documents_BL: Tensor | None) -> Tensor | None:
    """The document ids as int32."""
    return None if documents_BL is None else documents_BL.int().contiguous()


def attend(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, band_HN: Tensor, documents_BL: Tensor | None) -> Tensor:
    """Attention [B, H, L, K] of all L positions."""
    out_BHLK, lse_BHL = _Attention.apply(q_BHLK, k_BHLK, v_BHLK, band_HN.detach(), documents_BL)
    return with_band_gradient(out_BHLK, lse_BHL, q_BHLK, k_BHLK, v_BHLK, band_HN, documents_BL)


def with_band_gradient(
    out_BHLK: Tensor,
    lse_BHL: Tensor,
    q_BHLK: Tensor,
    k_BHLK: Tensor,
    v_BHLK: Tensor,
    band_HN: Tensor,
    documents_BL: Tensor | None,
) -> Tensor:
    """`out`, computed by any kernel with the band detached; the backward pass adds the gradient of the band."""
    return _BandGradient.apply(
        out_BHLK, lse_BHL, q_BHLK.detach(), k_BHLK.detach(), v_BHLK.detach(), band_HN, documents_BL
    )


class _Attention(torch.autograd.Function):
    """(out, lse); lse has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = kernel_ops.band_attention(q, k, v, band, documents, near=False)
        ctx.save_for_backward(q, k, v, band, documents, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, band, documents, out, lse = ctx.saved_tensors
        d_q, d_k, d_v = kernel_ops.band_attention_backward(d_out, q, k, v, band, documents, out, lse, near=False)
        return d_q, d_k, d_v, None, None


class _BandGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Tensor, documents: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, band, documents, out, lse)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_band = kernel_ops.band_gradient(d_out, *ctx.saved_tensors)
        return d_out, None, None, None, None, d_band, None
