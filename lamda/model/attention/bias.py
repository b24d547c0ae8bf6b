"""T5's relative position bias, and the band that is left of it.

All distances from `BAND` on (from 113, in truth) share the last bucket, and softmax ignores what a
whole row has in common. Less the last bucket's value the bias is 0 but on a band along the diagonal,

    band[h, d] = table[bucket(d), h] - table[last, h]      0 <= d < BAND

and so is its gradient; the last bucket's own is minus the sum of the others', by this same equation.
Dimensions: legend in `lamda/model/decoder.py`; N distances, BAND of them.
"""

from __future__ import annotations

from math import inf, log
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lamda.model.weights import BUCKETS

MAX_DISTANCE = 128
BAND = MAX_DISTANCE


def causal_buckets(count: int, *, device: torch.device | None = None) -> Tensor:
    """T5's bucket of each distance 0 to count - 1 from a key to a later query: [count] int64.

    Half of the buckets hold one distance each, the others grow by logarithm to MAX_DISTANCE; the last takes the rest.
    """
    exact = BUCKETS // 2
    distances = torch.arange(count, device=device)
    beyond = (distances.clamp(min=exact).double() / exact).log() / log(MAX_DISTANCE / exact)
    logarithmic = exact + (beyond * (BUCKETS - exact)).long()
    return torch.where(distances < exact, distances, logarithmic.clamp(max=BUCKETS - 1))


def relative_bias(table_RH: Tensor, buckets_M: Tensor, *, queries: int) -> Tensor:
    """The bias [H, L, M] of the last `queries` of M positions, -inf where the key is later; fp32 or wider."""
    return _windows(functional.embedding(buckets_M, _wide(table_RH)).T, queries=queries)


def bias_band(table_RH: Tensor, buckets_N: Tensor) -> Tensor:
    """The band [H, BAND] of a table, contiguous, fp32 or wider. buckets_N: of the first BAND distances or more."""
    wide_RH = _wide(table_RH)
    return (functional.embedding(buckets_N[:BAND], wide_RH) - wide_RH[-1]).T.contiguous()


def band_bias(band_HN: Tensor, *, queries: int, keys: int) -> Tensor:
    """The bias [H, L, M] of the last `queries` of M = `keys` positions from its band, -inf where the key is later."""
    beyond = max(keys - BAND, 0)
    return _windows(functional.pad(band_HN[:, :keys], (0, beyond)), queries=queries)


def sum_by_distance(bias_HLM: Tensor, count: int) -> Tensor:
    """The adjoint of `band_bias` and `relative_bias`: sums along diagonals, [H, L, M] to the first `count` distances.

    Rows are laid end to end with a row's length one longer than read back, so that diagonals become columns.
    """
    _, queries, keys = bias_HLM.shape
    skewed = functional.pad(bias_HLM.flip(-1), (0, queries)).flatten(1)[:, :-queries]
    by_distance = skewed.unflatten(1, (queries, keys + queries - 1)).sum(1)
    return by_distance[:, queries - 1 : queries - 1 + count]


class _Windows(torch.autograd.Function):
    """[H, M] by distance to [H, L, M] by query and key.

    Row i of a head is one window on the line of its values from the farthest distance to the nearest,
    then the future. PyTorch's own gradient of windows adds up number by number, and crashes where it is compiled.
    """

    @staticmethod
    def forward(ctx: Any, by_distance_HM: Tensor, queries: int) -> Tensor:
        ctx.distances = by_distance_HM.shape[-1]
        line = functional.pad(by_distance_HM.flip(-1), (0, queries - 1), value=-inf)
        return line.unfold(-1, by_distance_HM.shape[-1], 1).flip(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_bias_HLM: Tensor) -> tuple[Tensor, None]:
        return sum_by_distance(d_bias_HLM, ctx.distances), None


def _windows(by_distance_HM: Tensor, *, queries: int) -> Tensor:
    return _Windows.apply(by_distance_HM, queries)


def _wide(table_RH: Tensor) -> Tensor:
    return table_RH.to(torch.promote_types(table_RH.dtype, torch.float32))
