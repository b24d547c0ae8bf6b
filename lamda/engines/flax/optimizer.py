"""The optimizers of `lamda/engines/deepspeed/optimizer.py` in optax: the same parts, rates and decays.

An update is asked for with its step's rate, `update(gradients, state, weights, rate=...)`: the schedule is a function
of the step and keeps no state. Muon and Adafactor work on whole matrices, so they get each layer's separately.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax import GradientTransformation, GradientTransformationExtraArgs

from lamda.config.schema import ModelConfig, TrainConfig
from lamda.engines.flax.weights import Weights, stacked_shapes
from lamda.engines.param_groups import ADAFACTOR_EPS, ADAMW_RMS, MUON_MOMENTUM, rate_scales, weight_decays
from lamda.model.weights import ParamGroup, part_of


def make_optimizer(train: TrainConfig, model: ModelConfig) -> GradientTransformationExtraArgs:
    """The optimizer of a model's stacked weights; its `update` takes the step's `rate` besides gradients and state."""
    scales = rate_scales(train, model)
    decays = weight_decays(train, scales)

    def of_part(part: ParamGroup, *, is_stacked: bool) -> GradientTransformation:
        direction = _direction(train, part, scale=scales[part])
        return optax.chain(
            _each_layer(direction) if is_stacked else direction,
            optax.add_decayed_weights(decays[part]),
            _at_rate(scales[part]),
        )

    labels, kinds = {}, {}
    for name in stacked_shapes(model):
        part, is_stacked = part_of(name), name.startswith("layers.")
        labels[name] = f"{part} of layers" if is_stacked else part
        kinds[labels[name]] = of_part(part, is_stacked=is_stacked)
    return optax.partition(kinds, labels)


def _direction(train: TrainConfig, part: ParamGroup, *, scale: float) -> GradientTransformation:
    """An optimizer step at rate 1, uphill and without decay."""
    if train.optimizer == "adafactor":
        return _adafactor(scale)
    if train.optimizer == "muon" and part in ("query", "matrices"):
        return optax.chain(
            optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=_dimensions), _to_adamws_rms()
        )
    return optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.eps)


def _dimensions(updates: Any) -> Any:
    """Our matrices are [out, in]."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 0), updates)


def _to_adamws_rms() -> GradientTransformation:
    """An orthogonal [m, n] has an RMS of 1 / sqrt(max(m, n)); AdamW's is the usual ADAMW_RMS."""
    return optax.stateless_with_tree_map(lambda update, _: update * ADAMW_RMS * max(update.shape) ** 0.5)


def _adafactor(scale: float) -> GradientTransformation:
    """PyTorch's Adafactor (Shazeer and Stern, arXiv 1804.04235, algorithm 5), its rate at most 1/sqrt(step)."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(min_scale=ADAFACTOR_EPS[1]),
        _at_most_inverse_sqrt(scale),
    )


def _at_most_inverse_sqrt(scale: float) -> GradientTransformationExtraArgs:
    """Makes an update smaller where rate times scale, by which it will be multiplied, is more than 1/sqrt(step)."""

    def update(updates: Any, count: Array, weights: Any = None, *, rate: Array, **_: Any) -> tuple[Any, Array]:
        del weights
        factor = jnp.minimum(1.0, (count + 1.0) ** -0.5 / jnp.maximum(rate * scale, 1e-30))
        return jax.tree.map(lambda each: each * factor, updates), count + 1

    return GradientTransformationExtraArgs(lambda _: jnp.zeros((), jnp.int32), update)


def _at_rate(scale: float) -> GradientTransformationExtraArgs:
    """Downhill at the step's rate times a scale."""

    def update(updates: Any, state: Any, weights: Any = None, *, rate: Array, **_: Any) -> tuple[Any, Any]:
        del weights
        return jax.tree.map(lambda each: each * (-scale * rate), updates), state

    return GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _each_layer(inner: GradientTransformation) -> GradientTransformationExtraArgs:
    """Of weights [S, ...], each of the S as if it were alone."""
    inner = optax.with_extra_args_support(inner)

    def init(weights: Weights) -> Any:
        return jax.vmap(inner.init)(weights)

    def update(updates: Any, state: Any, weights: Any = None, **extra: Any) -> tuple[Any, Any]:
        def of_layer(updates: Any, state: Any, weights: Any) -> tuple[Any, Any]:
            return inner.update(updates, state, weights, **extra)

        return jax.vmap(of_layer)(updates, state, weights)

    return GradientTransformationExtraArgs(init, update)
