"""`sdpa`: PyTorch's scaled_dot_product_attention forward, and a backward pass that builds what it needs.

A mask that requires a gradient drives SDPA into its slowest kernel, and its gradient is as large as the
scores. So the mask enters without one, and the backward pass is ours: a tile of queries at a time
against the keys up to it, from which the gradient of the bias is kept on the band alone.
Runs on every device; nothing of [B, H, L, L] is built backward, and forward only for documents.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from lamda.model.attention.bias import BAND, band_bias, bias_band, sum_by_distance
from lamda.model.attention.math import mask

__all__ = ["attend", "bias", "mask"]

TILE = 128
"""Queries at a time in the backward pass."""


def bias(table_RH: Tensor, buckets_N: Tensor, *, queries: int, keys: int) -> Tensor:
    """The band [H, BAND]."""
    return bias_band(table_RH, buckets_N)


def attend(q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, band_HN: Tensor, hidden_BLM: Tensor | None) -> Tensor:
    """Attention [B, H, L, K] of the last L of M positions."""
    return _Attention.apply(q_BHLK, k_BHMK, v_BHMK, band_HN, hidden_BLM)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q_BHLK: Tensor,
        k_BHMK: Tensor,
        v_BHMK: Tensor,
        band_HN: Tensor,
        hidden_BLM: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(q_BHLK, k_BHMK, v_BHMK, band_HN, hidden_BLM)
        added = band_bias(band_HN.to(q_BHLK.dtype), queries=q_BHLK.shape[2], keys=k_BHMK.shape[2])[None]
        if hidden_BLM is not None:
            added = added.masked_fill(hidden_BLM[:, None], -inf)
        return functional.scaled_dot_product_attention(q_BHLK, k_BHMK, v_BHMK, attn_mask=added, scale=1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out_BHLK: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLK, k_BHMK, v_BHMK, band_HN, hidden_BLM = ctx.saved_tensors
        q_BHLK, k_BHMK, v_BHMK, d_out_BHLK = (each.contiguous() for each in (q_BHLK, k_BHMK, v_BHMK, d_out_BHLK))
        queries, keys = q_BHLK.shape[2], k_BHMK.shape[2]
        near_HTN = band_bias(band_HN, queries=TILE, keys=BAND + TILE)
        d_near_HTN = torch.zeros_like(near_HTN, memory_format=torch.contiguous_format)
        d_q, d_k, d_v = (torch.zeros_like(each, dtype=band_HN.dtype) for each in (q_BHLK, k_BHMK, v_BHMK))
        for start in range(0, queries, TILE):
            rows = slice(start, min(start + TILE, queries))
            seen = keys - queries + rows.stop
            first = seen - (rows.stop - rows.start) - BAND
            tile = (..., slice(0, rows.stop - rows.start), slice(max(-first, 0), seen - first))
            near = slice(max(first, 0), seen)
            q, d_out, k, v = q_BHLK[:, :, rows], d_out_BHLK[:, :, rows], k_BHMK[:, :, :seen], v_BHMK[:, :, :seen]

            scores = (q @ k.mT).to(band_HN.dtype)
            scores[..., near] += near_HTN[tile]
            if hidden_BLM is not None:
                scores.masked_fill_(hidden_BLM[:, None, rows, :seen], -inf)
            p = scores.softmax(dim=-1)
            d_scores = (d_out @ v.mT).to(band_HN.dtype)
            d_scores -= (d_scores * p).sum(dim=-1, keepdim=True)
            d_scores *= p

            d_near_HTN[tile] += d_scores[..., near].sum(0)
            p, d_scores = p.to(q.dtype), d_scores.to(q.dtype)
            d_q[:, :, rows] = d_scores @ k
            d_k[:, :, :seen] += d_scores.mT @ q
            d_v[:, :, :seen] += p.mT @ d_out
        d_q, d_k, d_v = (each.to(q_BHLK.dtype) for each in (d_q, d_k, d_v))
        return d_q, d_k, d_v, sum_by_distance(d_near_HTN), None
