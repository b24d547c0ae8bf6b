"""`flex`: PyTorch FlexAttention, which adds the band to its scores and skips blocks of hidden keys.

It is compiled once per shape, even if the blocks of the model are not: uncompiled it would need [B, H, L, L] in fp32.
The band enters without a gradient, since FlexAttention would accumulate one score by score with atomics;
`with_band_gradient` computes it, so training needs Triton and a GPU. FlexAttention has no backward pass on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from lamda.model.attention.bias import BAND
from lamda.model.attention.bias import bias_band as bias

__all__ = ["attend", "bias", "mask"]


def mask(tokens_BL: Tensor, documents_BL: Tensor | None) -> tuple[BlockMask, Tensor | None]:
    """The mask of key blocks that some query sees, and the document ids as int32."""
    B, L = tokens_BL.shape
    if documents_BL is None:
        return create_block_mask(_causal, None, None, L, L, device=tokens_BL.device), None
    ids_BL = documents_BL.int().contiguous()

    def within(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _causal(b, h, query, key) & (ids_BL[b, query] == ids_BL[b, key])

    return create_block_mask(within, B, None, L, L, device=tokens_BL.device), ids_BL


def attend(
    q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, band_HN: Tensor, seen: tuple[BlockMask, Tensor | None]
) -> Tensor:
    """Attention [B, H, L, K] of all L positions."""
    blocks, documents_BL = seen
    band = band_HN.detach()

    def biased(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        return score + torch.where(distance < BAND, band[h, distance.clamp(0, BAND - 1)], 0.0)

    if not (torch.is_grad_enabled() and q_BHLK.requires_grad):
        return _flex(q_BHLK, k_BHLK, v_BHLK, biased, blocks, scale=1.0)
    from lamda.model.attention.fused import with_band_gradient

    out_BHLK, aux = _flex(q_BHLK, k_BHLK, v_BHLK, biased, blocks, scale=1.0, return_aux=AuxRequest(lse=True))
    return with_band_gradient(out_BHLK, aux.lse, q_BHLK, k_BHLK, v_BHLK, band_HN, documents_BL)


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _flex(*inputs: Any, **options: Any) -> Any:
    """FlexAttention, compiled: as part of the calling block, or by itself under any surrounding compiler stance."""
    if torch.compiler.is_compiling():
        return flex_attention(*inputs, **options)
    with torch.compiler.set_stance("default"):
        return _compiled()(*inputs, **options)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
