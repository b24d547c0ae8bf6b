"""Plain causal attention with its log-sum-exp, by the fastest of PyTorch's kernels that gives one.

That is cuDNN on Hopper and newer, FlashAttention on older GPUs, and on the CPU its flash kernel. The
backward pass takes the output and the log-sum-exp of a softmax over these keys and others: probabilities
are then those of that softmax, and the gradients are what these keys contribute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamda.config.errors import UserError

_aten = torch.ops.aten


def check_plain(q: Tensor) -> None:
    """Raise UserError where no kernel takes these queries."""
    K = q.shape[-1]
    if q.device.type == "cuda" and (q.element_size() != 2 or K % 8 or K > 128):
        raise UserError(
            "model.attention is split, whose plain kernels take 16 bits and a model.d_head of 8, 16, ... 128 on a "
            f"GPU, not {q.dtype} and {K}: choose `fused`"
        )


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
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op("lamda::plain_attention_backward", mutates_args=())
def plain_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; out and lse as the module says."""
    no_lengths = (None, None, q.shape[2], k.shape[2])
    # Where dropout's random numbers begin, in each kernel's own form; without dropout no kernel reads them.
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
