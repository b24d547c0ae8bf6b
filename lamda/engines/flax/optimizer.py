"""The optimizers of `lamda/engines/deepspeed/optimizer.py` in optax: the same groups, learning rates and decays.

`update(gradients, state, weights, rate=...)` takes the learning rate of its step: the schedule is a function of the
step and keeps no state. Muon and Adafactor work on whole matrices, so they see each layer's separately.
"""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax import GradientTransformation, GradientTransformationExtraArgs

from lamda.config.schema import ModelConfig, TrainConfig
from lamda.engines.flax.weights import Weights, stacked_shapes
from lamda.engines.param_groups import ADAFACTOR_EPS, ADAMW_RMS, MUON_MOMENTUM, lr_multipliers, weight_decays
from lamda.model.weights import MATRIX_GROUPS, ParamGroup, param_group_of


def make_optimizer(train: TrainConfig, model: ModelConfig) -> GradientTransformationExtraArgs:
    """The optimizer of a model's stacked weights; its `update` also takes the learning rate of the step, `rate`."""
    multipliers = lr_multipliers(train, model)
    decays = weight_decays(train, multipliers)

    def of_group(group: ParamGroup, *, is_stacked: bool) -> GradientTransformation:
        direction = _direction(train, group, multiplier=multipliers[group])
        return optax.chain(
            _each_layer(direction) if is_stacked else direction,
            optax.add_decayed_weights(decays[group]),
            _at_rate(multipliers[group]),
        )

    labels, transforms = {}, {}
    for name in stacked_shapes(model):
        group, is_stacked = param_group_of(name), name.startswith("layers.")
        labels[name] = f"{group} of layers" if is_stacked else group
        transforms[labels[name]] = of_group(group, is_stacked=is_stacked)
    return optax.partition(transforms, labels)


def _direction(train: TrainConfig, group: ParamGroup, *, multiplier: float) -> GradientTransformation:
    """An optimizer step at rate 1, uphill and without decay."""
    match train.optimizer:
        case "muon" if group in MATRIX_GROUPS:
            return optax.chain(
                optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=_dimensions), _to_adamws_rms()
            )
        case "adamw" | "muon":
            return optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.eps)
        case "adafactor":
            return _adafactor(multiplier)
        case _:
            assert_never(train.optimizer)


def _dimensions(updates: Any) -> Any:
    """Our matrices are [out, in]."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 0), updates)


def _to_adamws_rms() -> GradientTransformation:
    """An orthogonal [m, n] has an RMS of 1 / sqrt(max(m, n)); AdamW's is the usual ADAMW_RMS."""
    return optax.stateless_with_tree_map(lambda update, _: update * ADAMW_RMS * max(update.shape) ** 0.5)


def _adafactor(multiplier: float) -> GradientTransformation:
    """PyTorch's Adafactor (Shazeer and Stern, arXiv 1804.04235, algorithm 5), its rate at most 1/sqrt(step)."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(min_scale=ADAFACTOR_EPS[1]),
        _at_most_inverse_sqrt(multiplier),
    )


def _at_most_inverse_sqrt(multiplier: float) -> GradientTransformationExtraArgs:
    """Limits the learning rate, rate times multiplier, to 1/sqrt(step), by making the update smaller."""

    def update(updates: Any, count: Array, weights: Any = None, *, rate: Array, **_: Any) -> tuple[Any, Array]:
        del weights
        factor = jnp.minimum(1.0, (count + 1.0) ** -0.5 / jnp.maximum(rate * multiplier, 1e-30))
        return jax.tree.map(lambda each: each * factor, updates), count + 1

    return GradientTransformationExtraArgs(lambda _: jnp.zeros((), jnp.int32), update)


def _at_rate(multiplier: float) -> GradientTransformationExtraArgs:
    """Downhill at the step's rate times a multiplier."""

    def update(updates: Any, state: Any, weights: Any = None, *, rate: Array, **_: Any) -> tuple[Any, Any]:
        del weights
        return jax.tree.map(lambda each: each * (-multiplier * rate), updates), state

    return GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _each_layer(inner: GradientTransformation) -> GradientTransformationExtraArgs:
    """Apply a transformation to each layer of stacked weights [S, ...] separately."""
    inner = optax.with_extra_args_support(inner)

    def init(weights: Weights) -> Any:
        return jax.vmap(inner.init)(weights)

    def update(updates: Any, state: Any, weights: Any = None, **extra: Any) -> tuple[Any, Any]:
        def of_layer(updates: Any, state: Any, weights: Any) -> tuple[Any, Any]:
            return inner.update(updates, state, weights, **extra)

        return jax.vmap(of_layer)(updates, state, weights)

    return GradientTransformationExtraArgs(init, update)
