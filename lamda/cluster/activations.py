"""What a forward pass keeps for the backward pass, layer by layer. Dimensions: legend in `lamda/model/decoder.py`.

Counted are the tensors that PyTorch saves when it runs operation by operation on a GPU; compiled
blocks keep less. Recomputation keeps a block's input (`block`), or all but what its feed-forward half
made of its own input (`ffn`), and makes the rest again, a block at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lamda.config import ModelConfig

Recompute = Literal["none", "ffn", "block"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
WIDE_ROWS = 256
"""Rows of logits that the loss widens to fp32 at a time (`lamda.model.loss`)."""
TILE = 128
"""Queries that `sdpa` takes at a time in its backward pass (`lamda.model.attention.sdpa`)."""


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch.

    kept: from forward to backward. logits: with their gradient, at the loss. block: what the last block's
    backward pass adds to what is kept, at its height.
    """

    kept: int
    logits: int
    block: int

    @property
    def peak(self) -> int:
        """The most that is there at a time."""
        return self.kept + max(self.logits, self.block)


def activations(
    model: ModelConfig, *, rows: int, length: int, width: int, recompute: Recompute, has_documents: bool
) -> Activations:
    """Of `rows` rows of `length` tokens, `width` bytes an element."""
    D, F, V, HK = model.d_model, model.d_ff, model.vocab_size, model.n_heads * model.d_head
    scores, attention_backward = _attention(model, length=length, width=width)
    norm = D * width + 4  # its input, and 1 / rms in fp32
    attention = norm + D * width + 4 * HK * width + scores
    feed_forward = norm + D * width + 4 * F * width
    layer = {"none": attention + feed_forward, "ffn": attention + D * width, "block": D * width}[recompute]
    ends = norm + D * width + 8 + 8 + 4  # the final norm, its output, token, target, logsumexp
    mask = length if has_documents and model.attention in ("math", "sdpa") else 0
    # The feed-forward half goes first, and what it held is free before attention's turn comes.
    block = max(feed_forward + 2 * F * width, attention_backward)
    block += {"none": -feed_forward, "ffn": 0, "block": attention}[recompute]
    tokens = rows * length
    return Activations(
        kept=tokens * (model.n_layers * layer + ends + mask),
        logits=tokens * 2 * V * width + 3 * min(WIDE_ROWS, tokens) * V * 4,
        block=tokens * block,
    )


def recomputed_flops(model: ModelConfig, *, length: int, recompute: Recompute) -> int:
    """FLOPs a token that recomputation adds to those of `lamda.model.counts.flops_per_token`.

    The last product of what is made again is left out: nothing needs its result.
    """
    D, F, HK = model.d_model, model.d_ff, model.n_heads * model.d_head
    gate_up, attention = 4 * D * F, 8 * D * HK + 2 * length * HK
    return model.n_layers * {"none": 0, "ffn": gate_up, "block": gate_up + attention}[recompute]


def _attention(model: ModelConfig, *, length: int, width: int) -> tuple[int, int]:
    """Bytes a token and layer of attention's own beyond query, key, value and output: kept, and at work backward.

    `math` keeps the softmax in fp32 and once more in the precision of the values; backward it has two such. The
    kernels keep a logsumexp. `sdpa` copies a gradient, adds gradients up in fp32 and has five tiles of scores;
    of the kernels `split` takes most: copies of what it reads, and gradients of near and far keys.
    """
    H, HK, HL = model.n_heads, model.n_heads * model.d_head, model.n_heads * length
    if model.attention == "math":
        return HL * (6 if width == 2 else 4), HL * (6 if width == 2 else 8)
    if model.attention == "sdpa":
        return 0, HK * (width + 12) + min(TILE, length) * H * (12 + 2 * width)
    return 4 * H, 9 * HK * width
