"""`split`: a plain causal kernel for far keys, our Triton kernel for near ones, merged by log-sum-exp.

Keys at least BAND before their query have no bias: this is plain causal attention of q[BAND:] on k[:-BAND]. The two
parts of the softmax are merged by

    out = exp(lse_near - lse) out_near + exp(lse_far - lse) out_far      lse = log(exp lse_near + exp lse_far)

In the backward pass each part's kernel gets the merged out and lse: its probabilities are then those of the whole
softmax, and its gradients are the contribution of its keys. Documents are not a plain causal pattern; with them one
Triton kernel handles near and far keys, as in `fused`.

The plain kernel is the fastest in PyTorch that also returns the log-sum-exp: cuDNN on Hopper and newer, FlashAttention
on older GPUs, and the flash kernel on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamda.model.attention import fused, kernel_ops
from lamda.model.attention.bias import BAND
from lamda.model.attention.fused import bias, mask, with_band_gradient

__all__ = ["attend", "bias", "mask"]

_aten = torch.ops.aten


def attend(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, band_HN: Tensor, documents_BL: Tensor | None) -> Tensor:
    """Attention [B, H, L, K] of all L positions."""
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


@torch.library.custom_op("lamda::plain_attention", mutates_args=())
def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, K] and log-sum-exp [B, H, L]."""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=1.0)
    elif _prefers_cudnn(q):
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=1.0)
    else:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=1.0)
    return out.contiguous(), lse.reshape(q.shape[:3]).contiguous()


@plain_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("lamda::plain_attention_backward", mutates_args=())
def plain_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. out and lse: of the merged softmax (see the module)."""
    no_lengths = (None, None, q.shape[2], k.shape[2])
    # The dropout seed and offset, in the form each kernel expects; without dropout they are not read.
    if q.device.type == "cpu":
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, True, scale=1.0
        )
    elif _prefers_cudnn(q):
        seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
        gradients = _aten._scaled_dot_product_cudnn_attention_backward(
            d_out, q, k, v, out, lse[..., None], seed, offset, None, *no_lengths, 0.0, True, scale=1.0
        )
    else:
        seed, offset = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in (2, ()))
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, *no_lengths, 0.0, True, seed, offset, scale=1.0
        )
    d_q, d_k, d_v = (each.contiguous() for each in gradients)
    return d_q, d_k, d_v


@plain_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _prefers_cudnn(q: Tensor) -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(q.device) >= (9, 0)
