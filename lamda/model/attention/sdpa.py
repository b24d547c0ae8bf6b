"""`sdpa`: PyTorch's scaled_dot_product_attention forward, and a backward pass that builds what it needs.

A mask that requires a gradient drives SDPA into its slowest kernel, and its gradient is as large as the
scores. So the mask enters without one, and the backward pass is ours. Both take a tile of queries at a time with
the keys up to it; near keys have the bias, far keys have none. Runs on every device; nothing of
[B, H, L, L] is built but the mask of documents.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lamda.model.attention.bias import BAND, band_bias, bias_band, sum_by_distance
from lamda.model.attention.math import mask

__all__ = ["attend", "bias", "mask"]

TILE = 128
"""Queries at a time."""


def bias(table_RH: Tensor, buckets_N: Tensor, *, queries: int, keys: int) -> Tensor:
    """The band [H, BAND]."""
    return bias_band(table_RH, buckets_N)


def attend(q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, band_HN: Tensor, hidden_BLM: Tensor | None) -> Tensor:
    """Attention [B, H, L, K] of the last L of M positions."""
    return _Attention.apply(q_BHLK.contiguous(), k_BHMK.contiguous(), v_BHMK.contiguous(), band_HN, hidden_BLM)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, band, hidden)
        return _forward(q, k, v, band, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(d_out.contiguous(), *ctx.saved_tensors), None


@torch.library.custom_op("lamda::sdpa_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None) -> Tensor:
    """The output. One node of a compiled block: Inductor's code of it is slower."""
    out = _new_output(q)
    past = k.shape[2] - q.shape[2]
    for first in range(0, q.shape[2], TILE):
        rows = slice(first, min(first + TILE, q.shape[2]))
        seen = past + rows.stop
        added = band_bias(band, queries=rows.stop - rows.start, keys=seen)[None]
        if hidden is not None:
            added = added.masked_fill(hidden[:, None, rows, :seen], -inf)
        out[:, :, rows] = functional.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, :seen], v[:, :, :seen], attn_mask=added, scale=1.0
        )
    return out


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None) -> Tensor:
    return _new_output(q)


def _new_output(q: Tensor) -> Tensor:
    """Memory for an output, head by head within a row, as the output projection reads it."""
    B, H, L, K = q.shape
    return q.new_empty(B, L, H, K).transpose(1, 2)


@torch.library.custom_op("lamda::sdpa_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the band."""
    queries, past = q.shape[2], k.shape[2] - q.shape[2]
    near_HTN = band_bias(band, queries=TILE, keys=BAND + TILE)
    d_near_HTN = torch.zeros_like(near_HTN, memory_format=torch.contiguous_format)
    d_q, d_k, d_v = (torch.zeros_like(each, dtype=band.dtype) for each in (q, k, v))
    for first in range(0, queries, TILE):
        rows = slice(first, min(first + TILE, queries))
        count, seen = rows.stop - rows.start, past + rows.stop
        border = max(seen - count - BAND, 0)
        near, tile = slice(border, seen), (..., slice(0, count), slice(BAND + count - (seen - border), BAND + count))
        scores = (q[:, :, rows] @ k[:, :, :seen].mT).to(band.dtype)
        scores[..., near] += near_HTN[tile]
        if hidden is not None:
            scores.masked_fill_(hidden[:, None, rows, :seen], -inf)
        # From the forward pass's log-sum-exp they would not add up to 1, as far as bf16 rounds large scores here.
        p = scores.softmax(-1)
        d_p = (d_out[:, :, rows] @ v[:, :, :seen].mT).to(band.dtype)
        d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, band.dtype)
        d_near_HTN[tile] += d_scores[..., near].sum(0)
        p, d_scores = p.to(q.dtype), d_scores.to(q.dtype)
        d_q[:, :, rows] = d_scores @ k[:, :, :seen]
        d_k[:, :, :seen] += d_scores.mT @ q[:, :, rows]
        d_v[:, :, :seen] += p.mT @ d_out[:, :, rows]
    d_q, d_k, d_v = (each.to(q.dtype) for each in (d_q, d_k, d_v))
    return d_q, d_k, d_v, sum_by_distance(d_near_HTN, BAND).contiguous()


@_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(band)
