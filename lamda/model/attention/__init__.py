"""Causal self-attention with T5 relative position bias (Raffel et al., arXiv 1910.10683, section 2.1).

    softmax(q k^T + bias[distance]) v      without 1/sqrt(K), which is part of the initialization

`model.attention` selects the backend, a module of this package (docs/performance.md).
Dimensions: legend in `lamda/model/decoder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from einops import rearrange
from torch import Tensor, nn

from lamda.config import ModelConfig
from lamda.config.schema import Backend as BackendName
from lamda.model.attention.backends import Backend, backend_for
from lamda.model.attention.bias import BAND, causal_buckets
from lamda.model.layers import Linear, bias_table

__all__ = ["Attention", "KeyValues", "View"]


class KeyValues(Protocol):
    """The cached keys and values of one layer."""

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, table_RH: Tensor | None) -> Tensor:
        """Add L tokens and return their attention [B, H, L, K] to all tokens so far. table_RH: as in `View.attend`."""


@dataclass(frozen=True)
class View:
    """Bias and mask of L tokens, computed once per forward pass for all layers.

    buckets_N: the bucket of each distance. shared_bias: the bias, if all layers share one. mask: hides keys of other
    documents, if document ids were given. Bias and mask are in the form of the backend.
    """

    backend: Backend
    length: int
    buckets_N: Tensor
    shared_bias: Tensor | None
    mask: Any

    @classmethod
    def of(
        cls, tokens_BL: Tensor, documents_BL: Tensor | None, *, table_RH: Tensor | None, attention: BackendName
    ) -> View:
        """The view of `tokens_BL`. table_RH: the bias table that all layers share, if any. attention: the backend."""
        length = tokens_BL.shape[1]
        backend = backend_for(attention)
        buckets_N = causal_buckets(max(length, BAND), device=tokens_BL.device)
        bias = None if table_RH is None else backend.bias(table_RH, buckets_N, queries=length, keys=length)
        return cls(backend, length, buckets_N, bias, backend.mask(tokens_BL, documents_BL))

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, table_RH: Tensor | None) -> Tensor:
        """Attention [B, H, L, K]. table_RH: the bias table of this layer, if the layers do not share one."""
        bias = self.shared_bias
        if bias is None:
            assert table_RH is not None, "a layer has a table where none is shared"
            bias = self.backend.bias(table_RH, self.buckets_N, queries=self.length, keys=self.length)
        return self.backend.attend(q_BHLK, k_BHLK, v_BHLK, bias, self.mask)


class Attention(nn.Module):
    """Multi-head attention with its own bias table, or the one that all layers share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        D, HK = config.d_model, config.n_heads * config.d_head
        self.query, self.key, self.value = (Linear(D, HK) for _ in range(3))
        self.output = Linear(HK, D)
        self.relative_bias = bias_table(config) if config.bias_per_layer else None

    def forward(self, x_BLD: Tensor, view: View | KeyValues) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        q_BHLK, k_BHLK, v_BHLK = (
            rearrange(matrix(x_BLD), "b l (h k) -> b h l k", h=self.n_heads)
            for matrix in (self.query, self.key, self.value)
        )
        mixed_BHLK = view.attend(q_BHLK, k_BHLK, v_BHLK, self.relative_bias)
        return self.output(rearrange(mixed_BHLK, "b h l k -> b l (h k)"))
