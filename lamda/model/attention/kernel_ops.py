"""The Triton kernels as PyTorch operators: shapes, tile sizes, launches. A compiled block sees one node per operator.

out and lse are [B, H, L, K] and [B, H, L]; band [H, BAND] fp32 or wider; documents_BL int32, or None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lamda.model.attention import kernels
from lamda.model.attention.bias import BAND, sum_by_distance

SPLITS = 8  # programs among which the tiles of one head and place are divided, in the gradient of the band


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch options.

    owned: rows of the tile that a program writes. walked: rows of the tiles that it loops over. band: rows and columns
    of a tile in the gradient of the band. warps, stages: Triton options of all kernels but that one.
    """

    owned: int
    walked: int
    band: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Launch options of Triton."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def tiles_for(capability: tuple[int, int], *, element_size: int) -> Tiles:
    """Tiles for a GPU of this compute capability, for q, k, v of `element_size` bytes and K up to 128.

    Checked by compiling for 8.0, 8.6, 8.9, 9.0, 10.0, 10.3 and 12.0: each kernel fits into shared memory, with at most
    194 of 227 KiB on 9.0 and 10.x, and 68 of 99 KiB elsewhere (tests/long/kernel_resources.py).
    """
    if element_size > 2:
        return Tiles(owned=32, walked=32, band=32, warps=4, stages=1)
    if capability[0] == 9:
        return Tiles(owned=128, walked=64, band=64, warps=8, stages=3)
    if capability[0] == 10:
        return Tiles(owned=128, walked=64, band=64, warps=8, stages=2)
    return Tiles(owned=64, walked=32, band=32, warps=4, stages=2)


@torch.library.custom_op("lamda::band_attention", mutates_args=())
def band_attention(
    q: Tensor, k: Tensor, v: Tensor, band: Tensor, documents: Tensor | None, near: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over all keys, or with `near` over keys at distances below BAND."""
    dtype = q.dtype
    q, k, v = _strided(*_in_interpreter_dtype(q, k, v))
    out, lse = _new_output(q, band)
    tiles = _tiles(q)
    kernels.forward[_grid(q, tiles.owned)](
        q, k, v, band, _ids(documents, q), out, lse, *_strides(q, k, out),
        **_sizes(q, band, documents), T=tiles.owned, S=tiles.walked, NEAR=near, ROUND=dtype != q.dtype, **tiles.options,
    )  # fmt: skip
    return out.to(dtype), lse


@band_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, band: Tensor, *_: object) -> tuple[Tensor, Tensor]:
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
    """Gradients of q, k and v over the same keys. With `near`, out and lse may be over more keys."""
    dtype = q.dtype
    q, k, v = _strided(*_in_interpreter_dtype(q, k, v))
    out, d_out = _rows_of_heads(*_in_interpreter_dtype(out, d_out))
    d_q, d_k, d_v = (torch.empty_like(out) for _ in range(3))
    delta = torch.empty_like(lse)
    tiles = _tiles(q)
    grid, ids, strides = _grid(q, tiles.owned), _ids(documents, q), _strides(q, k, out)
    how = _sizes(q, band, documents) | {"NEAR": near, "ROUND": dtype != q.dtype} | tiles.options
    kernels.backward_queries[grid](
        q, k, v, band, ids, out, lse, d_out, delta, d_q, *strides, **how, T=tiles.owned, S=tiles.walked
    )
    kernels.backward_keys[grid](
        q, k, v, band, ids, lse, d_out, delta, d_k, d_v, *strides, **how, T=tiles.walked, S=tiles.owned
    )
    return d_q.to(dtype), d_k.to(dtype), d_v.to(dtype)


@band_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (_new_output(q, band)[0] for _ in range(3))
    return d_q, d_k, d_v


@torch.library.custom_op("lamda::band_gradient", mutates_args=())
def band_gradient(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Tensor, documents: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """The gradient of the band, [H, BAND]; deterministic."""
    q, k, v = _strided(*_in_interpreter_dtype(q, k, v))
    out, d_out = _rows_of_heads(*_in_interpreter_dtype(out, d_out))
    B, H, L, _ = q.shape
    T = _tiles(q).band
    places = BAND // T + 1
    shares = min(SPLITS, B * triton.cdiv(L, T))
    tiles = band.new_empty(shares, H, places, T, T)
    kernels.band_tiles[shares, H, places](
        q, k, v, band, _ids(documents, q), out, lse.contiguous(), d_out, tiles, *_strides(q, k, out), B,
        **_sizes(q, band, documents), T=T, num_warps=4, num_stages=1,
    )  # fmt: skip
    near_HTN = tiles.sum(0).flip(1).permute(0, 2, 1, 3).flatten(2)
    return sum_by_distance(near_HTN, BAND).contiguous()


@band_gradient.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Tensor, *_: object) -> Tensor:
    return torch.empty_like(band, memory_format=torch.contiguous_format)


def _tiles(q: Tensor) -> Tiles:
    if kernels.INTERPRETED:
        return tiles_for((9, 0), element_size=2)
    return tiles_for(torch.cuda.get_device_capability(q.device), element_size=q.element_size())


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
    """A kernel accepts no None: without documents it gets a pointer that it never reads."""
    return q if documents is None else documents


def _new_output(q: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for an output, in the layout that the output projection reads ([B, L, H, K]); and for a log-sum-exp."""
    B, H, L, K = q.shape
    return q.new_empty(B, L, H, K).transpose(1, 2), q.new_empty(B, H, L, dtype=band.dtype)


def _in_interpreter_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """bf16 as fp32 for Triton's interpreter, which cannot compute with bf16; otherwise unchanged."""
    if kernels.INTERPRETED and tensors[0].dtype == torch.bfloat16:
        return tuple(each.float() for each in tensors)
    return tensors


def _rows_of_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the layout of `_new_output`; copies only tensors in another layout."""
    return tuple(each.transpose(1, 2).contiguous().transpose(1, 2) for each in tensors)


def _strided(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the kernels need them: contiguous along K, equal strides of k and v. Views of one projection fit."""
    if q.stride(-1) != 1:
        q = q.contiguous()
    if k.stride(-1) != 1 or k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return q, k, v


def _strides(q: Tensor, k: Tensor, out: Tensor) -> tuple[int, ...]:
    return q.stride()[:3] + k.stride()[:3] + out.stride()[:3]
