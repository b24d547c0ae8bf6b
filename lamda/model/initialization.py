"""Weight initialization, with the scales of Google's model of this shape (Lingvo, `gshard_builder.py`).

Three scales differ; docs/learning.md shows the gain of each:

- The standard deviation of the embedding is 0.5 instead of 1. The embedding is tied, so a token's own logit starts at
  about sqrt(D) std^2 / rms(final hidden). With 1 this exceeds ln V in wide models: the first loss is 19 at D = 2560,
  where a uniform guess costs 10.4. With 0.5, and `train.base_width` in wide models, the first loss is near ln V.
- Matrices that write to the residual stream are smaller by 1/sqrt(2N), so that its size stays constant (GPT-2).
- Bias tables start as ALiBi slopes. T5's random tables need hundreds of steps to learn which keys are near.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lamda.config import ModelConfig
from lamda.model.attention.bias import MAX_DISTANCE, causal_buckets
from lamda.model.decoder import LaMDA
from lamda.model.weights import weight_shapes

EMBEDDING_STD = 0.5

Draw = Callable[[Tensor, torch.Generator], Tensor]  # fills a tensor from a generator


@torch.no_grad()
def initialize_weights(model: LaMDA, *, seed: int, base_width: int | None = None) -> None:
    """Fill a model with its `initial_weights`, rounded to its precision."""
    weights = model.export_weights()
    for name, initial in initial_weights(model.config, seed=seed, base_width=base_width).items():
        weights[name].copy_(initial.draw())


class InitialWeight(NamedTuple):
    """A weight that is not drawn yet. draw: returns it in fp32 on the CPU, the same each time."""

    shape: tuple[int, ...]
    draw: Callable[[], Tensor]


def initial_weights(config: ModelConfig, *, seed: int, base_width: int | None = None) -> dict[str, InitialWeight]:
    """Every weight by name. Each has its own generator, seeded by (seed, name).

    So the values do not depend on ranks, device, precision or the order of drawing. base_width: width of the model
    whose learning rates are transferred (`lamda.engines.param_groups`); logits are then scaled down with the width, as
    muP prescribes (arXiv 2203.03466, table 8).
    """
    by_kind = draws(config)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        weight = by_kind[kind_of(name)](torch.empty(shape, device="cpu"), generator(seed, name))
        if name == "final_norm.scale" and base_width is not None:
            weight.mul_((base_width / config.d_model) ** 0.5)
        return weight

    return {name: InitialWeight(shape, partial(drawn, name, shape)) for name, shape in weight_shapes(config).items()}


def kind_of(name: str) -> str:
    """The kind of a weight, a key of `draws`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def draws(config: ModelConfig) -> dict[str, Draw]:
    """The distribution of each kind of weight. The 1/sqrt(K) of attention is part of the scale of the query."""
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
    """Fill [R, H] with ALiBi slopes (Press et al., arXiv 2108.12409): head h falls by 2^(-8 h / H) per token."""
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
    """The random generator of the weight of this name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
