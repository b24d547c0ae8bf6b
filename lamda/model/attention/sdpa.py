"""`sdpa`: PyTorch scaled_dot_product_attention in the forward pass, with our own backward pass.

A mask that requires a gradient forces SDPA into its slowest kernel, and its gradient is as large as the scores. So the
mask enters without a gradient, and the backward pass computes it. Both passes process one tile of queries at a time,
with the keys up to it; near keys have the bias, far keys have none. Runs on every device; only the document mask has
the shape [B, L, L].

The bias stays in fp32: rounded to bf16, a large bias makes the error of output and gradients several times that of
`math`. SDPA kernels for GPUs accept only a mask of the dtype of the queries, so bf16 on a GPU uses the probabilities of
the backward pass instead of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lamda.model.attention.bias import BAND, band_bias, sum_by_distance
from lamda.model.attention.bias import bias_band as bias
from lamda.model.attention.math import mask

__all__ = ["attend", "bias", "mask"]

TILE = 128  # queries per tile

KERNEL_WIDENS_MASK = ("cpu",)  # devices whose kernel accepts an fp32 mask with bf16 queries


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
    """The output. One node in a compiled block: the code that Inductor generates for it is slower."""
    out = _new_output(q)
    takes_mask = q.dtype == band.dtype or q.device.type in KERNEL_WIDENS_MASK
    mix = _mix_by_kernel if takes_mask else _mix
    for tile in _tiles(q, k):
        out[:, :, tile.rows] = mix(tile, q, k, v, band, hidden)
    return out


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None) -> Tensor:
    return _new_output(q)


def _new_output(q: Tensor) -> Tensor:
    """Memory for an output, in the layout that the output projection reads ([B, L, H, K])."""
    B, H, L, K = q.shape
    return q.new_empty(B, L, H, K).transpose(1, 2)


class _Tile(NamedTuple):
    """A tile of queries and the keys up to it.

    rows, seen: positions of the queries and the keys. near: keys that may be nearer than BAND. band: these rows and
    keys in [H, TILE, BAND + TILE], the bias that `_near` returns.
    """

    rows: slice
    seen: slice
    near: slice
    band: tuple[Any, ...]


def _tiles(q: Tensor, k: Tensor) -> Iterator[_Tile]:
    queries, past = q.shape[2], k.shape[2] - q.shape[2]
    for first in range(0, queries, TILE):
        rows = slice(first, min(first + TILE, queries))
        count, seen = rows.stop - rows.start, past + rows.stop
        border = max(seen - count - BAND, 0)
        band = (..., slice(0, count), slice(BAND + count - (seen - border), BAND + count))
        yield _Tile(rows, slice(0, seen), slice(border, seen), band)


def _near(band: Tensor) -> Tensor:
    return band_bias(band, queries=TILE, keys=BAND + TILE)


def _mix_by_kernel(tile: _Tile, q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None) -> Tensor:
    queries, seen = q[:, :, tile.rows], k[:, :, tile.seen]
    added = band_bias(band, queries=queries.shape[2], keys=seen.shape[2])[None]
    if hidden is not None:
        added = added.masked_fill(hidden[:, None, tile.rows, tile.seen], -inf)
    return functional.scaled_dot_product_attention(queries, seen, v[:, :, tile.seen], attn_mask=added, scale=1.0)


def _mix(tile: _Tile, q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None) -> Tensor:
    """The output of a tile from the probabilities of the backward pass."""
    return _probabilities(tile, q, k, _near(band), hidden).to(v.dtype) @ v[:, :, tile.seen]


def _probabilities(tile: _Tile, q: Tensor, k: Tensor, near_HTN: Tensor, hidden: Tensor | None) -> Tensor:
    """[B, H, rows, seen] in the precision of the bias. Each row sums to 1, even if bf16 rounds large scores."""
    scores = (q[:, :, tile.rows] @ k[:, :, tile.seen].mT).to(near_HTN.dtype)
    scores[..., tile.near] += near_HTN[tile.band]
    if hidden is not None:
        scores.masked_fill_(hidden[:, None, tile.rows, tile.seen], -inf)
    return scores.softmax(-1)


@torch.library.custom_op("lamda::sdpa_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the band."""
    near_HTN = _near(band)
    d_near_HTN = torch.zeros_like(near_HTN, memory_format=torch.contiguous_format)
    d_q, d_k, d_v = (torch.zeros_like(each, dtype=band.dtype) for each in (q, k, v))
    for tile in _tiles(q, k):
        rows, seen = tile.rows, tile.seen
        # Not from a log-sum-exp of the forward pass: with large scores rounded to bf16, rows would not sum to 1.
        p = _probabilities(tile, q, k, near_HTN, hidden)
        d_p = (d_out[:, :, rows] @ v[:, :, seen].mT).to(band.dtype)
        d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, band.dtype)
        d_near_HTN[tile.band] += d_scores[..., tile.near].sum(0)
        p, d_scores = p.to(q.dtype), d_scores.to(q.dtype)
        d_q[:, :, rows] = d_scores @ k[:, :, seen]
        d_k[:, :, seen] += d_scores.mT @ q[:, :, rows]
        d_v[:, :, seen] += p.mT @ d_out[:, :, rows]
    d_q, d_k, d_v = (each.to(q.dtype) for each in (d_q, d_k, d_v))
    return d_q, d_k, d_v, sum_by_distance(d_near_HTN, BAND).contiguous()


@_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(each) for each in (q, k, v, band))
