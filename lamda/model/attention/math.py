"""`math`: the equation as written. The reference for all other backends; runs on every device."""

from __future__ import annotations

from math import inf

from torch import Tensor

from lamda.model.attention.bias import relative_bias


def bias(table_RH: Tensor, buckets_N: Tensor, *, queries: int, keys: int) -> Tensor:
    """[H, L, M], -inf at future keys."""
    return relative_bias(table_RH, buckets_N[:keys], queries=queries)


def mask(_: Tensor, documents_BL: Tensor | None) -> Tensor | None:
    """[B, L, L], True at keys of other documents; None without documents."""
    return None if documents_BL is None else documents_BL[:, :, None] != documents_BL[:, None, :]


def attend(q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, bias_HLM: Tensor, hidden_BLM: Tensor | None) -> Tensor:
    """Attention [B, H, L, K]; scores and softmax in the precision of the bias."""
    scores_BHLM = (q_BHLK @ k_BHMK.mT).to(bias_HLM.dtype) + bias_HLM
    if hidden_BLM is not None:
        scores_BHLM = scores_BHLM.masked_fill(hidden_BLM[:, None], -inf)
    return scores_BHLM.softmax(dim=-1).to(v_BHMK.dtype) @ v_BHMK
