"""Sampling continuations with cached keys and values. Dimensions: legend in `lamda/model/decoder.py`."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lamda.config.errors import UserError
from lamda.model import LaMDA


class LayerCache:
    """One layer's keys and values, in memory for `capacity` tokens that is taken once."""

    def __init__(self, *, rows: int, heads: int, capacity: int, width: int, like: Tensor) -> None:
        self.length = 0
        self._kv_BHMK = like.new_empty((2, rows, heads, capacity, width))

    def extend(self, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Add L tokens; return views of k and v of all M so far, [B, H, M, K] each."""
        start, self.length = self.length, self.length + k_BHLK.shape[2]
        self._kv_BHMK[:, :, :, start : self.length] = torch.stack([k_BHLK, v_BHLK])
        return self._kv_BHMK[:, :, :, : self.length].unbind()


def new_cache(model: LaMDA, *, rows: int, capacity: int) -> list[LayerCache]:
    """An empty cache of every layer for `rows` sequences of up to `capacity` tokens."""
    config = model.config
    return [
        LayerCache(rows=rows, heads=config.n_heads, capacity=capacity, width=config.d_head, like=model.embedding.weight)
        for _ in range(config.n_layers)
    ]


@torch.no_grad()
def generate(
    model: LaMDA,
    prompt_BL: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 40,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> list[list[int]]:
    """Continue each row of `prompt_BL`: its new ids, up to and without the first of `stop_ids`.

    Samples among the `top_k` likeliest (the paper's 40) at `temperature`; 0 takes the likeliest one
    each time. The same seed gives the same ids. Raises UserError on settings that cannot be sampled with.
    """
    _check(prompt_BL, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    rows, length = prompt_BL.shape
    generator = torch.Generator().manual_seed(seed)
    cache = new_cache(model, rows=rows, capacity=length + max_new_tokens)
    continuations: list[list[int]] = [[] for _ in range(rows)]
    running, tokens_BL = set(range(rows)), prompt_BL
    for _ in range(max_new_tokens):
        logits_BV = model(tokens_BL, cache=cache)[:, -1]
        tokens_BL = _choose(logits_BV, temperature=temperature, top_k=top_k, generator=generator)
        chosen = tokens_BL[:, 0].tolist()
        running = {row for row in running if chosen[row] not in stop_ids}
        for row in running:
            continuations[row].append(chosen[row])
        if not running:
            break
    return continuations


def _choose(logits_BV: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """An id a row, [B, 1]; drawn on the CPU, whose generator is the same everywhere."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    best = logits_BV.float().topk(min(top_k, logits_BV.shape[-1]), dim=-1)
    places = torch.multinomial((best.values / temperature).softmax(dim=-1).cpu(), 1, generator=generator)
    return best.indices.gather(-1, places.to(logits_BV.device))


def _check(prompt_BL: Tensor, *, max_new_tokens: int, temperature: float, top_k: int) -> None:
    problems = [
        message
        for is_wrong, message in (
            (prompt_BL.shape[1] < 1, "the prompt is empty: give at least one token"),
            (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}: give at least 1"),
            (not temperature >= 0, f"temperature is {temperature}: give 0 (likeliest) or more"),
            (top_k < 1, f"top_k is {top_k}: give at least 1"),
        )
        if is_wrong
    ]
    if problems:
        raise UserError("generate: " + "; ".join(problems))
