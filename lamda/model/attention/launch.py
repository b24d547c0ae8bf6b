"""The kernels as PyTorch operators: shapes, tiles, launches. A compiled block sees one node for each.

out and lse are [B, H, L, K] and [B, H, L]; band [H, BAND] fp32 or wider; documents_BL int32, or None.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from lamda.model.attention import band_kernel, kernels
from lamda.model.attention.bias import BAND, sum_by_distance

SHARES = 8
"""Programs that share the tiles of one head and place in the gradient of the band."""


@torch.library.custom_op("lamda::band_attention", mutates_args=())
def band_attention(
    q: Tensor, k: Tensor, v: Tensor, band: Tensor, documents: Tensor | None, near: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over all keys, or with `near` over those at distances below BAND."""
    dtype = q.dtype
    q, k, v = _strided(*_held(q, k, v))
    out, lse = _new_output(q, band)
    queries, keys, options = _tiles(q)
    kernels.forward[_grid(q, queries)](
        q, k, v, band, _ids(documents, q), out, lse, *_strides(q, k, out),
        **_sizes(q, band, documents), T=queries, S=keys, NEAR=near, ROUND=dtype != q.dtype, **options,
    )  # fmt: skip
    return out.to(dtype), lse


@band_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, band: Tensor, documents: Tensor | None, near: bool) -> tuple[Tensor, Tensor]:
    return _new_output(q, band)


@torch.library.custom_op("lamda::band_attention_backward", mutates_args=())
def band_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Tensor,
    documents: Tensor | None,
    out: Tensor,
    lse: Tensor,
    near: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v over the same keys. With `near`, out and lse may be those over more keys."""
    dtype = q.dtype
    q, k, v = _strided(*_held(q, k, v))
    out, d_out = _rows_of_heads(*_held(out, d_out))
    d_q, d_k, d_v = (torch.empty_like(out) for _ in range(3))
    delta = torch.empty_like(lse)
    queries, keys, options = _tiles(q)
    ids, strides = _ids(documents, q), _strides(q, k, out)
    sizes = _sizes(q, band, documents) | {"NEAR": near, "ROUND": dtype != q.dtype}
    kernels.backward_queries[_grid(q, queries)](
        q, k, v, band, ids, out, lse, d_out, delta, d_q, *strides, **sizes, T=queries, S=keys, **options
    )
    queries, keys = keys, queries
    kernels.backward_keys[_grid(q, keys)](
        q, k, v, band, ids, lse, d_out, delta, d_k, d_v, *strides, **sizes, T=queries, S=keys, **options
    )
    return d_q.to(dtype), d_k.to(dtype), d_v.to(dtype)


@band_attention_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Tensor,
    documents: Tensor | None,
    out: Tensor,
    lse: Tensor,
    near: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (_new_output(q, band)[0] for _ in range(3))
    return d_q, d_k, d_v


@torch.library.custom_op("lamda::band_gradient", mutates_args=())
def band_gradient(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Tensor,
    documents: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """The gradient of the band, [H, BAND]; the same bits every time."""
    q, k, v = _strided(*_held(q, k, v))
    out, d_out = _rows_of_heads(*_held(out, d_out))
    B, H, L, _ = q.shape
    T = 64 if kernels.INTERPRETED or q.element_size() == 2 else 32
    places = BAND // T + 1
    shares = min(SHARES, B * triton.cdiv(L, T))
    tiles = band.new_empty(shares, H, places, T, T)
    band_kernel.band_tiles[shares, H, places](
        q, k, v, band, _ids(documents, q), out, lse.contiguous(), d_out, tiles, *_strides(q, k, out), B,
        **_sizes(q, band, documents), T=T, num_warps=4, num_stages=1,
    )  # fmt: skip
    near_HTN = tiles.sum(0).flip(1).permute(0, 2, 1, 3).flatten(2)
    return sum_by_distance(near_HTN, BAND)


@band_gradient.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Tensor,
    documents: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    return torch.empty_like(band, memory_format=torch.contiguous_format)


def _tiles(q: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows of the tile that a program owns, rows of those it walks along, and how Triton shall compile it.

    The first is for Hopper: 194 KiB of shared memory at most, and no spilled registers but a few for
    the gradients of keys at K = 128. The others fit into 99 KiB.
    """
    small = q.element_size() == 2
    if kernels.INTERPRETED or (small and q.shape[-1] <= 128 and _is_hopper(q.device)):
        return 128, 64, {"num_warps": 8, "num_stages": 3}
    return (64, 32, {"num_warps": 4, "num_stages": 2}) if small else (32, 32, {"num_warps": 4, "num_stages": 1})


def _is_hopper(device: torch.device) -> bool:
    """A data centre's GPU, Hopper or Blackwell; 12.0, of smaller shared memory, is none."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _sizes(q: Tensor, band: Tensor, documents: Tensor | None) -> dict[str, Any]:
    _, H, L, K = q.shape
    return {
        "H": H,
        "L": L,
        "K": K,
        "K2": max(16, triton.next_power_of_2(K)),
        "BAND": BAND,
        "DOCUMENTS": documents is not None,
        "WIDE": triton.language.float64 if band.dtype == torch.float64 else triton.language.float32,
    }


def _grid(q: Tensor, rows: int) -> tuple[int, int]:
    return triton.cdiv(q.shape[2], rows), q.shape[0] * q.shape[1]


def _ids(documents: Tensor | None, q: Tensor) -> Tensor:
    """A kernel takes no None: without documents it gets a pointer that it never reads."""
    return q if documents is None else documents


def _new_output(q: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for an output, head by head within a row, as the output projection reads it; and for a log-sum-exp."""
    B, H, L, K = q.shape
    return q.new_empty(B, L, H, K).transpose(1, 2), q.new_empty(B, H, L, dtype=band.dtype)


def _held(*tensors: Tensor) -> tuple[Tensor, ...]:
    """bf16 in fp32 for Triton's interpreter, which cannot compute with it; else unchanged."""
    if kernels.INTERPRETED and tensors[0].dtype == torch.bfloat16:
        return tuple(each.float() for each in tensors)
    return tensors


def _rows_of_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Laid out as `_new_output` does; copies only of what is laid out in another way."""
    return tuple(each.transpose(1, 2).contiguous().transpose(1, 2) for each in tensors)


def _strided(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the kernels take them: whole along K, and k and v alike. Views of one projection need no copy."""
    if q.stride(-1) != 1:
        q = q.contiguous()
    if k.stride(-1) != 1 or k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return q, k, v


def _strides(q: Tensor, k: Tensor, out: Tensor) -> tuple[int, ...]:
    return q.stride()[:3] + k.stride()[:3] + out.stride()[:3]
