"""The optimizers from optax against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from lamda.config.schema import ModelConfig, TrainConfig
from lamda.engines.flax.optimizer import make_optimizer
from lamda.engines.flax.weights import stacked_shapes
from lamda.engines.param_groups import ADAFACTOR_EPS, lr_multipliers, weight_decays

MODEL = ModelConfig(vocab_size=19, d_model=12, n_layers=3, n_heads=2, d_head=5, d_ff=14)
RATES = [0.3, 0.2, 0.4, 0.05]
STACKED, SINGLE = "layers.feed_forward.down.weight", "embedding.weight"


def train_config(optimizer: str) -> TrainConfig:
    return TrainConfig(steps=9, optimizer=optimizer, base_width=3, embedding_lr_scale=4, weight_decay=0.2)


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@cache
def moved_by_optax(name: str, size: float = 1.0) -> dict[str, np.ndarray]:
    optimizer = make_optimizer(train_config(name), MODEL)
    weights = {name: jnp.asarray(normal(shape, 0)) for name, shape in stacked_shapes(MODEL).items()}
    state = optimizer.init(weights)
    update = jax.jit(lambda gradients, state, weights, rate: optimizer.update(gradients, state, weights, rate=rate))
    for step, rate in enumerate(RATES):
        gradients = {name: size * jnp.asarray(normal(weight.shape, 1 + step)) for name, weight in weights.items()}
        updates, state = update(gradients, state, weights, rate)
        weights = optax.apply_updates(weights, updates)
    return {name: np.asarray(weight) for name, weight in weights.items()}


def moved_by_torch(
    shape: tuple[int, ...], make: Callable, *, scale: float, layer: int | None, size: float = 1.0
) -> np.ndarray:
    def of_layer(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array if layer is None else array[layer])

    weight = torch.nn.Parameter(of_layer(normal(shape, 0)).clone())
    optimizer = make([weight])
    for step, rate in enumerate(RATES):
        weight.grad = size * of_layer(normal(shape, 1 + step))
        optimizer.param_groups[0]["lr"] = rate * scale
        optimizer.step()
    return weight.detach().numpy()


@pytest.mark.parametrize(
    ("optimizer", "size"), [("adamw", 1.0), ("adamw", 1e-8), *(("adafactor", size) for size in (1.0, 1e-6, 1e-7, 1e-9))]
)
@pytest.mark.parametrize(
    ("name", "group", "layer"),
    [(SINGLE, "embedding", None), (STACKED, "matrices", 2), ("layers.attention.query.weight", "query", 1),
     ("layers.attention.relative_bias", "bias", 0), ("layers.attention_norm.scale", "norms", 1),
     ("final_norm.scale", "final_norm", None)],
)  # fmt: skip
def test_each_group_moves_as_with_pytorch(optimizer, size, name, group, layer):
    train = train_config(optimizer)
    multipliers = lr_multipliers(train, MODEL)
    decay = weight_decays(train, multipliers)[group]

    def make(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if optimizer == "adafactor":
            return torch.optim.Adafactor(weights, eps=ADAFACTOR_EPS, weight_decay=decay)
        return torch.optim.AdamW(weights, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=decay)

    shape = stacked_shapes(MODEL)[name]
    expected = moved_by_torch(shape, make, scale=multipliers[group], layer=layer, size=size)
    found = moved_by_optax(optimizer, size)[name]
    np.testing.assert_allclose(found if layer is None else found[layer], expected, rtol=1e-4, atol=1e-5)


def test_muon_moves_each_layers_matrix_by_a_nearly_orthogonal_step_of_adamws_size():
    train = train_config("muon").model_copy(update={"weight_decay": 0.0})
    optimizer = make_optimizer(train, MODEL)
    weights = {name: jnp.zeros(shape) for name, shape in stacked_shapes(MODEL).items()}
    gradients = {name: jnp.asarray(normal(weight.shape, 3)) for name, weight in weights.items()}
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(weights), weights, rate=1.0)
    scale = lr_multipliers(train, MODEL)["matrices"]
    for update, gradient in zip(updates[STACKED], gradients[STACKED], strict=True):
        assert np.sqrt(np.square(update).mean()) == pytest.approx(0.2 * scale, rel=0.2)
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        nearest = left @ right * 0.2 * scale * max(gradient.shape) ** 0.5
        cosine = -(update * nearest).sum() / (np.linalg.norm(update) * np.linalg.norm(nearest))
        assert cosine > 0.95


def test_muon_leaves_embedding_and_norms_to_adamw():
    muon, adamw = (moved_by_optax(name) for name in ("muon", "adamw"))
    assert np.array_equal(muon[SINGLE], adamw[SINGLE])
    assert np.array_equal(muon["layers.attention_norm.scale"], adamw["layers.attention_norm.scale"])
    assert not np.array_equal(muon[STACKED], adamw[STACKED])
