"""T5 relative position bias, reduced to a band along the diagonal.

All distances from `BAND` on (in fact from 113) share the last bucket, and softmax ignores a constant added to a whole
row. After subtracting the value of the last bucket, the bias is 0 except on a band along the diagonal,

    band[h, d] = table[bucket(d), h] - table[last, h]      0 <= d < BAND

and so is its gradient. By the same equation, the gradient of the last bucket is minus the sum of the others. A row of
at most BAND keys needs no subtraction.
Dimensions: legend in `lamda/model/decoder.py`; N distances, at least BAND.
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
    """The T5 bucket of each distance 0 to count - 1 from a key to a later query: [count] int64.

    Half of the buckets hold one distance each; the others grow logarithmically up to MAX_DISTANCE, and the last one
    takes all larger distances.
    """
    exact = BUCKETS // 2
    distances = torch.arange(count, device=device)
    beyond = (distances.clamp(min=exact).double() / exact).log() / log(MAX_DISTANCE / exact)
    logarithmic = exact + (beyond * (BUCKETS - exact)).long()
    return torch.where(distances < exact, distances, logarithmic.clamp(max=BUCKETS - 1))


def relative_bias(table_RH: Tensor, buckets_M: Tensor, *, queries: int) -> Tensor:
    """The bias [H, L, M] of the last `queries` of M positions, -inf if the key is later; fp32 or wider."""
    return _Windows.apply(functional.embedding(buckets_M, _at_least_fp32(table_RH)).T, queries)


def bias_band(table_RH: Tensor, buckets_N: Tensor, *, queries: int, keys: int) -> Tensor:
    """The band [H, BAND] of a table, contiguous, fp32 or wider: `bias` of all backends but `math`.

    If no key is beyond the band, nothing is subtracted: the last bucket, which is then unused, would get a gradient of
    rounding errors in place of 0, and Adam makes full steps of them.
    """
    fp32_RH = _at_least_fp32(table_RH)
    band_NH = functional.embedding(buckets_N[:BAND], fp32_RH)
    return (band_NH - fp32_RH[-1] if keys > BAND else band_NH).T.contiguous()


def band_bias(band_HN: Tensor, *, queries: int, keys: int) -> Tensor:
    """The bias [H, L, M] of the last `queries` of M = `keys` positions from its band, -inf if the key is later."""
    beyond = max(keys - BAND, 0)
    return _Windows.apply(functional.pad(band_HN[:, :keys], (0, beyond)), queries)


def sum_by_distance(bias_HLM: Tensor, count: int) -> Tensor:
    """The adjoint of `band_bias` and `relative_bias`: sums along diagonals, [H, L, M] to the first `count` distances.

    Rows are padded, laid end to end and read back as rows that are one element shorter: diagonals become columns.
    """
    _, queries, keys = bias_HLM.shape
    skewed = functional.pad(bias_HLM.flip(-1), (0, queries)).flatten(1)[:, :-queries]
    by_distance = skewed.unflatten(1, (queries, keys + queries - 1)).sum(1)
    return by_distance[:, queries - 1 : queries - 1 + count]


class _Windows(torch.autograd.Function):
    """[H, M] by distance to [H, L, M] by query and key.

    Row i of a head is one window on a line of values: from the farthest distance to the nearest, then -inf for the
    future. PyTorch's own gradient of `unfold` adds element by element, and crashes when compiled.
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


def _at_least_fp32(table_RH: Tensor) -> Tensor:
    return table_RH.to(torch.promote_types(table_RH.dtype, torch.float32))
