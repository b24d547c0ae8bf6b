"""Key-value cache for sequences with a shared prefix, which is stored once for any number of sequences.

A query of a row sees the shared prefix and the tokens of the row after it. The scores of both parts enter one softmax:

    softmax([q k_prefix^T, q k_row^T] + bias[distance]) [v_prefix; v_row]

The prefix part is one product for all rows of a head, and the prefix is never copied (Athiwaratkun et al.,
arXiv 2403.08845). Rows may differ in length; positions beyond the tokens of a row are masked.
Dimensions: legend in `lamda/model/decoder.py`; N rows, P tokens of the prefix, M of the longest row, R buckets,
S layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from lamda.model import LaMDA
from lamda.model.attention.bias import causal_buckets
from lamda.model.weights import BUCKETS

CHUNK = 256
"""Tokens of a row per forward pass, which bounds the size of the scores for long prompts."""


@dataclass(frozen=True)
class Prefix:
    """A computed prompt.

    ids: its tokens. key_values_SNHPK: keys and values of every layer, [S, 2, H, P, K]. logits_V: of the next token.
    cached: how many of the tokens were not computed for it, but taken from an earlier prompt.
    """

    ids: tuple[int, ...]
    key_values_SNHPK: Tensor
    logits_V: Tensor
    cached: int = 0


class Rows:
    """N sequences after one prefix.

    lengths: tokens of each row after the prefix, advanced by the caller of `feed`; tokens that were fed but not counted
    are overwritten. Memory grows by half each time, at first up to `most` tokens per row, so a request with a high
    limit and a short result takes little memory.
    """

    def __init__(self, model: LaMDA, *, count: int, most: int, prefix: Prefix | None = None) -> None:
        config, weight = model.config, model.final_norm.scale
        heads = (config.n_heads, 0, config.d_head)
        self.lengths = [0] * count
        self._prefix = weight.new_empty(config.n_layers, 2, *heads) if prefix is None else prefix.key_values_SNHPK
        self._own = weight.new_empty(config.n_layers, 2, count, config.n_heads, min(most, CHUNK), config.d_head)
        self._most, self._cleared = most, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def copy(self, prefix: Prefix, length: int) -> None:
        """Begin the only row with the first tokens of a prefix."""
        self._reserve(length)
        self._own[:, :, 0, :, :length] = prefix.key_values_SNHPK[..., :length, :]
        self.lengths[0] = length

    def as_prefix(self, ids: Sequence[int], logits_V: Tensor, *, cached: int) -> Prefix:
        """The only row, as a prefix for others."""
        return Prefix(tuple(ids), self._own[:, :, 0, :, : len(ids)], logits_V, cached)

    def places(self, new: int) -> Places:
        """Slots and distances of the next `new` tokens of each row; reserves memory for them."""
        device = self._own.device
        longest = max(self.lengths) + new
        self._reserve(longest)
        before = self._prefix.shape[-2]
        slots_NL = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(new, device=device)
        queries_NL = before + (slots_NL[:1] if len({*self.lengths}) == 1 else slots_NL)
        distances_NLM = queries_NL[:, :, None] - torch.arange(before + longest, device=device)
        buckets_NLM = causal_buckets(before + longest, device=device)[distances_NLM.clamp(min=0)]
        return Places(self, slots_NL, buckets_NLM.masked_fill(distances_NLM < 0, BUCKETS), longest)

    def attend(
        self, layer: int, q_NHLK: Tensor, k_NHLK: Tensor, v_NHLK: Tensor, *, places: Places, by_bucket_HR: Tensor
    ) -> Tensor:
        """Write keys and values; the attention [N, H, L, K] of the queries. by_bucket_HR: -inf for masked positions."""
        rows, length = q_NHLK.shape[0], q_NHLK.shape[2]
        own, numbers = self._own[layer], torch.arange(rows, device=q_NHLK.device)[:, None]
        for cached, new in zip(own, (k_NHLK, v_NHLK), strict=True):
            cached.transpose(1, 2)[numbers, places.slots_NL] = new.transpose(1, 2)
        k_NHMK, v_NHMK = own[:, :, :, : places.longest]
        k_HPK, v_HPK = self._prefix[layer]
        q_HNK = q_NHLK.transpose(0, 1).flatten(1, 2)
        prefix_HNLP = (q_HNK @ k_HPK.mT).unflatten(1, (rows, length))
        scores_HNLM = torch.cat([prefix_HNLP, (q_NHLK @ k_NHMK.mT).transpose(0, 1)], dim=-1)
        bias_HNLM = by_bucket_HR[:, places.buckets_NLM]
        shares_HNLM = (scores_HNLM.to(bias_HNLM.dtype) + bias_HNLM).softmax(dim=-1).to(v_NHLK.dtype)
        prefix_HNLP, own_HNLM = shares_HNLM.split([k_HPK.shape[1], places.longest], dim=-1)
        mixed_HNLK = (prefix_HNLP.flatten(1, 2) @ v_HPK).unflatten(1, (rows, length))
        return (mixed_HNLK + (own_HNLM.transpose(0, 1) @ v_NHMK).transpose(0, 1)).transpose(0, 1)

    def _reserve(self, longest: int) -> None:
        """Reserve zeroed memory for `longest` tokens per row: masked values have weight 0, but 0 times NaN is NaN."""
        if longest > self._own.shape[-2]:
            shape = list(self._own.shape)
            grown = longest + longest // 2
            shape[-2] = grown if longest > self._most else min(grown, self._most)
            larger = self._own.new_empty(shape)
            larger[..., : self._cleared, :] = self._own[..., : self._cleared, :]
            self._own = larger
        if longest > self._cleared:
            self._own[..., self._cleared : longest, :] = 0
            self._cleared = longest


@dataclass(frozen=True)
class Places:
    """Slots and distances of the next L tokens of the rows of a group, the same for every layer.

    slots_NL: positions among the tokens of a row. buckets_NLM: bucket of the distance of each key, BUCKETS if it is
    masked; one entry for all rows if they have equal lengths. longest: tokens of the longest row, including new ones.
    """

    rows: Rows
    slots_NL: Tensor
    buckets_NLM: Tensor
    longest: int


@dataclass(frozen=True)
class _Layer:
    """One layer of the cache of several groups of rows, in one forward pass."""

    number: int
    groups: Sequence[Places]
    shared_RH: Tensor | None

    def attend(self, q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, table_RH: Tensor | None) -> Tensor:
        """See `lamda.model.attention.KeyValues`."""
        table_RH = self.shared_RH if table_RH is None else table_RH
        assert table_RH is not None, "a table is shared where a layer has none"
        wide_RH = table_RH.to(torch.promote_types(table_RH.dtype, torch.float32))
        by_bucket_HR = torch.cat([wide_RH, wide_RH.new_full((1, wide_RH.shape[1]), -inf)]).T.contiguous()
        counts = [len(places.rows) for places in self.groups]
        parts = zip(self.groups, *(each.split(counts) for each in (q_BHLK, k_BHLK, v_BHLK)), strict=True)
        return torch.cat(
            [
                places.rows.attend(self.number, q, k, v, places=places, by_bucket_HR=by_bucket_HR)
                for places, q, k, v in parts
            ]
        )


def layers(model: LaMDA, groups: Sequence[Rows], *, new: int) -> list[_Layer]:
    """The `cache` of `LaMDA.forward` to feed `new` tokens to every row of all groups."""
    places = [rows.places(new) for rows in groups]
    return [_Layer(number, places, model.relative_bias) for number in range(model.config.n_layers)]


def feed(model: LaMDA, groups: Sequence[Rows], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Feed each row of all groups its next tokens; returns the logits after the last token of each row, [N, V].

    Rows may get different numbers of tokens, but at least one each. `lengths` are not advanced.
    """
    device, new = model.final_norm.scale.device, max(map(len, tokens))
    padded = [[*row, *[0] * (new - len(row))] for row in tokens]
    last_N = torch.tensor([len(row) - 1 for row in tokens], device=device)
    return model(torch.tensor(padded, device=device), cache=layers(model, groups, new=new), last_B=last_N)
