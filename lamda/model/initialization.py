"""The weights before training, with the scales of Google's own model of this shape (Lingvo, `gshard_builder.py`).

Three differ; docs/learning.md has what they gain:

- The embedding's deviation is 0.5 instead of 1. It is tied, so that a token's own logit starts at about sqrt(D) std^2 /
  rms(final hidden). With 1 that reaches ln V in wide models (a first loss of 19 at D = 2560, where guessing
  costs 10.4). With 0.5, and `train.base_width` where the model is wide, the first loss is near ln V.
- Matrices that write to the residual stream are smaller by 1/sqrt(2N), so that it keeps its size (GPT-2).
- Bias tables begin as ALiBi's slopes. T5's begin at random and take hundreds of steps to find what is near.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lamda.config import ModelConfig
from lamda.model.attention.bias import MAX_DISTANCE, causal_buckets
from lamda.model.decoder import LaMDA
from lamda.model.weights import weight_shapes

EMBEDDING_STD = 0.5

Draw = Callable[[Tensor, torch.Generator], Tensor]
"""Fills a tensor from a generator."""


@torch.no_grad()
def initialise(
    model: LaMDA, *, seed: int, base_width: int | None = None, progress: Callable[[], object] = lambda: None
) -> None:
    """Give a model its `initial_weights`, rounded to its precision. progress: called after each."""
    weights = model.export_weights()
    for name, drawn in initial_weights(model.config, seed=seed, base_width=base_width):
        weights[name].copy_(drawn)
        progress()


def initial_weights(config: ModelConfig, *, seed: int, base_width: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Draw every weight, fp32 on the CPU, by name. Each has a generator of its own, seeded by (seed, its name).

    So the values depend on nothing else: not on ranks, device, precision or the order of modules. base_width: of the
    model whose rates are carried over (`lamda.engines.param_groups`); logits then fall with the width as muP asks
    (arXiv 2203.03466, table 8).
    """
    by_kind = draws(config)
    for name, shape in weight_shapes(config).items():
        draw = by_kind[name.removesuffix(".weight").rpartition(".")[2]]
        weight = draw(torch.empty(shape, device="cpu"), generator(seed, name))
        if name == "final_norm.scale" and base_width is not None:
            weight.mul_((base_width / config.d_model) ** 0.5)
        yield name, weight


def draws(config: ModelConfig) -> dict[str, Draw]:
    """The distribution of each kind of weight. There is no 1/sqrt(K) in attention: the query's scale stands for it."""
    D, F, HK = config.d_model, config.d_ff, config.n_heads * config.d_head
    residual = (2 * config.n_layers) ** -0.5
    return {
        "embedding": _normal(EMBEDDING_STD),
        "scale": lambda weight, _: weight.fill_(1.0),
        "query": _normal((D * config.d_head) ** -0.5),
        "key": _normal(D**-0.5),
        "value": _normal(D**-0.5),
        "output": _normal(residual * HK**-0.5),
        "relative_bias": lambda weight, _: slopes(weight),
        "gate": _uniform(D**-0.5),
        "up": _uniform(D**-0.5),
        "down": _uniform(residual * F**-0.5),
    }


def slopes(table: Tensor) -> Tensor:
    """Make a table [R, H] ALiBi's (Press et al., arXiv 2108.12409): head h of H falls by 2^(-8 h / H) per token."""
    buckets, heads = table.shape
    slopes_H = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
    first_R = torch.searchsorted(causal_buckets(MAX_DISTANCE), torch.arange(buckets))
    return table.copy_(-first_R[:, None] * slopes_H)


def _normal(std: float) -> Draw:
    return lambda weight, generator: weight.normal_(0.0, std, generator=generator)


def _uniform(std: float) -> Draw:
    limit = 3**0.5 * std
    return lambda weight, generator: weight.uniform_(-limit, limit, generator=generator)


def generator(seed: int, name: str) -> torch.Generator:
    """What draws the weight of that name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
