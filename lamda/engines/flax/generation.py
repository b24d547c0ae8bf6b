"""Continuing prompts with cached keys and values.

The logits come from JAX; what is chosen from them is chosen by `lamda.inference.sampling`, so that the same seed
draws the same tokens as with the PyTorch model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
import torch
from jax import Array

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.engines.flax.model import KeyValues, Placement, empty_cache
from lamda.engines.flax.weights import bind
from lamda.inference.sampling import Sampler, Sampling

STRIDE = 64  # lengths are rounded up to multiples of this: each other shape is another program to compile


def generate(
    config: ModelConfig,
    weights: Mapping[str, Array],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    placement: Placement | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths as one batch; the new ids of each do not depend on the others.

    weights: stacked. placement: of weights on a mesh; every process of the mesh calls this. Raises UserError if a
    prompt is empty.
    """
    if not all(prompts):
        raise UserError("the prompt is empty: give at least one token")
    longest = max(map(len, prompts))
    room = _rounded(_rounded(longest) + sampling.max_new_tokens)
    dtype = next(iter(weights.values())).dtype
    cache = empty_cache(config, rows=len(prompts), longest=room, dtype=dtype)
    extend = partial(_extend, config, dict(weights), placement)
    logits_NV, cache = _feed(extend, prompts, cache, width=_rounded(longest))
    samplers = [Sampler(sampling, prompt=ids, count=1, logits=logits_NV[:1]) for ids in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for step in range(sampling.max_new_tokens):
        for number in sorted(unfinished):
            (chosen,), _ = samplers[number].choose(logits_NV[number : number + 1], step)
            if chosen in sampling.stop_ids:
                unfinished.discard(number)
            else:
                new[number].append(chosen)
        if not unfinished or step + 1 == sampling.max_new_tokens:
            break
        last = [ids[-1:] if number in unfinished else [0] for number, ids in enumerate(new)]
        logits_NV, cache = _feed(extend, last, cache, width=1)
    return new


def _feed(
    extend: Callable[..., tuple[Array, KeyValues]], tokens: Sequence[Sequence[int]], cache: KeyValues, *, width: int
) -> tuple[torch.Tensor, KeyValues]:
    """Logits [N, V] after each row's tokens, which are filled up to `width`, in fp32 or wider on the host."""
    padded = np.zeros((len(tokens), width), np.int32)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = ids
    last_N = np.array([len(ids) - 1 for ids in tokens], np.int32)
    logits_NV, cache = extend(padded, last_N, cache)
    host_NV = np.asarray(logits_NV)
    return torch.from_numpy(host_NV.astype(np.promote_types(host_NV.dtype, np.float32))), cache


@partial(jax.jit, static_argnames=("config", "placement"), donate_argnames="cache")
def _extend(
    config: ModelConfig,
    weights: dict[str, Array],
    placement: Placement | None,
    tokens_NL: Array,
    last_N: Array,
    cache: KeyValues,
) -> tuple[Array, KeyValues]:
    return bind(config, weights, placement=placement).extend(tokens_NL, cache, last_B=last_N)


def _rounded(length: int) -> int:
    return -(-length // STRIDE) * STRIDE
