"""Causal self-attention with T5's relative position bias (Raffel et al., arXiv 1910.10683, section 2.1).

    softmax(q k^T + bias[distance]) v      without 1/sqrt(K), which sits in the initialisation

Dimensions: legend in `lamda/model/decoder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from lamda.config import ModelConfig
from lamda.model.layers import Linear, bias_table
from lamda.model.weights import BUCKETS

MAX_DISTANCE = 128


class KeyValues(Protocol):
    """The keys and values of the tokens so far, in one layer."""

    length: int

    def extend(self, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Add L tokens; return k and v of all M, [B, H, M, K] each."""
        ...


@dataclass(frozen=True)
class View:
    """What the L queries see of the M keys; worked out once a forward pass for all layers.

    buckets_M: the bucket of each distance. bias_HLM: the bias, where all layers share one.
    hidden_BLL: keys of other documents, where there are documents.
    """

    queries: int
    buckets_M: Tensor
    bias_HLM: Tensor | None
    hidden_BLL: Tensor | None

    @classmethod
    def of(cls, tokens_BL: Tensor, documents_BL: Tensor | None, *, past: int, table_RH: Tensor | None) -> View:
        """The view from `tokens_BL`, after `past` cached tokens. table_RH: the bias that all layers share, if one."""
        queries = tokens_BL.shape[1]
        buckets_M = causal_buckets(past + queries, device=tokens_BL.device)
        bias_HLM = None if table_RH is None else relative_bias(table_RH, buckets_M, queries=queries)
        hidden_BLL = None if documents_BL is None else documents_BL[:, :, None] != documents_BL[:, None, :]
        return cls(queries, buckets_M, bias_HLM, hidden_BLL)


class Attention(nn.Module):
    """Multi-head attention with a bias table of its own, or the one that all layers share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.query_key_value = Linear(config.d_model, 3 * config.n_heads * config.d_head)
        self.output = Linear(config.n_heads * config.d_head, config.d_model)
        self.relative_bias = bias_table(config) if config.bias_per_layer else None

    def forward(self, x_BLD: Tensor, view: View, past: KeyValues | None) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        packed = rearrange(self.query_key_value(x_BLD), "b l (n h k) -> n b h l k", n=3, h=self.n_heads)
        q_BHLK, k_BHMK, v_BHMK = packed.unbind()
        if past is not None:
            k_BHMK, v_BHMK = past.extend(k_BHMK, v_BHMK)
        bias_HLM = view.bias_HLM
        if bias_HLM is None:
            bias_HLM = relative_bias(self.relative_bias, view.buckets_M, queries=view.queries)
        mixed_BHLK = attend(q_BHLK, k_BHMK, v_BHMK, bias_HLM=bias_HLM, hidden_BLM=view.hidden_BLL)
        return self.output(rearrange(mixed_BHLK, "b h l k -> b l (h k)"))


def attend(
    q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, *, bias_HLM: Tensor, hidden_BLM: Tensor | None = None
) -> Tensor:
    """Attention [B, H, L, K] as the equation says; scores and softmax in the bias's precision.

    bias_HLM: added to the scores, -inf at future keys. hidden_BLM: True at further keys that must not be seen.
    """
    scores_BHLM = (q_BHLK @ k_BHMK.mT).to(bias_HLM.dtype) + bias_HLM
    if hidden_BLM is not None:
        scores_BHLM = scores_BHLM.masked_fill(hidden_BLM[:, None], -inf)
    return scores_BHLM.softmax(dim=-1).to(v_BHMK.dtype) @ v_BHMK


def relative_bias(table_RH: Tensor, buckets_M: Tensor, *, queries: int) -> Tensor:
    """The bias [H, L, M] of the last `queries` of M positions, -inf where the key is later; fp32 or wider.

    Row i of a head is one window on the line of its biases from the farthest distance to the
    nearest, then the future: a gather by distance and a view, whose gradient is a sum over windows.
    """
    wide = torch.promote_types(table_RH.dtype, torch.float32)
    by_distance_HM = functional.embedding(buckets_M, table_RH.to(wide)).T
    line = functional.pad(by_distance_HM.flip(-1), (0, queries - 1), value=-inf)
    return line.unfold(-1, len(buckets_M), 1).flip(-2)


def causal_buckets(count: int, *, device: torch.device | None = None) -> Tensor:
    """T5's bucket of each distance 0 to count - 1 from a key to a later query: [count] int64.

    Half of the buckets hold one distance each, the others grow by logarithm to MAX_DISTANCE; the last takes the rest.
    """
    exact = BUCKETS // 2
    distances = torch.arange(count, device=device)
    beyond = (distances.clamp(min=exact).double() / exact).log() / log(MAX_DISTANCE / exact)
    logarithmic = exact + (beyond * (BUCKETS - exact)).long()
    return torch.where(distances < exact, distances, logarithmic.clamp(max=BUCKETS - 1))
