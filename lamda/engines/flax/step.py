"""One training step as one compiled program: gradients of all micro-batches, then the update, or none if not finite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lamda.config.schema import Config
from lamda.engines.flax.sharding import ROWS, MeshPlacement, shardings_like
from lamda.engines.flax.weights import Weights, bind, stacked_shapes


class TrainState(NamedTuple):
    """What training changes: fp32 weights by stacked name, and the optimizer state."""

    weights: Weights
    optimizer: Any


class Batch(NamedTuple):
    """A step's rows in A micro-batches of b rows over all devices.

    ids, documents: [A, b, L+1] int32, documents only where attention stays inside them. loss_mask, domains:
    [A, b, L], of the targets.
    """

    ids: Array
    loss_mask: Array
    domains: Array
    documents: Array | None


class StepOutput(NamedTuple):
    """sums: [2, domains], nats and target tokens. updated: whether loss and gradient were finite."""

    sums: Array
    grad_norm: Array
    updated: Array


Step = Callable[[TrainState, Batch, Array], tuple[TrainState, StepOutput]]


def make_step(
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    state: TrainState,
    mesh: Mesh,
    dtype: DTypeLike,
    domains: int,
) -> Step:
    """(state, batch, rate) -> (state, output); the input state is donated. dtype: of the computation, not the sums."""
    losses = partial(_losses, config, MeshPlacement(mesh), domains)
    state_sharding = shardings_like(state, mesh, stacked_shapes(config.model))
    replicated = NamedSharding(mesh, PartitionSpec())

    def step(state: TrainState, batch: Batch, rate: Array) -> tuple[TrainState, StepOutput]:
        low_precision = jax.tree.map(lambda weight: weight.astype(dtype), state.weights)
        num_tokens = batch.loss_mask.sum(dtype=jnp.float32)

        def add(total: tuple[Weights, Array, Array], part: Batch) -> tuple[tuple[Weights, Array, Array], None]:
            (loss, sums), gradients = jax.value_and_grad(losses, has_aux=True)(low_precision, part, num_tokens)
            fp32 = jax.tree.map(lambda gradient, weight: gradient.astype(weight.dtype), gradients, state.weights)
            return jax.tree.map(jnp.add, total, (fp32, loss, sums)), None

        zeros = jax.tree.map(jnp.zeros_like, state.weights)
        start = (zeros, jnp.zeros(()), jnp.zeros((2, domains)))
        (gradients, loss, sums), _ = jax.lax.scan(add, start, batch)
        norm = optax.tree.norm(gradients)
        is_finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        clipped = _clipped(gradients, norm, limit=config.train.gradient_clipping)
        updates, optimizer_state = optimizer.update(clipped, state.optimizer, state.weights, rate=rate)
        updated = TrainState(optax.apply_updates(state.weights, updates), optimizer_state)
        after = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, state)
        return after, StepOutput(sums, norm, is_finite)

    batch_sharding = NamedSharding(mesh, PartitionSpec(None, ROWS))
    return jax.jit(
        step,
        in_shardings=(state_sharding, batch_sharding, replicated),
        out_shardings=(state_sharding, replicated),
        donate_argnums=0,
    )


def _losses(
    config: Config, placement: MeshPlacement, domains: int, weights: Weights, part: Batch, num_tokens: Array
) -> tuple[Array, Array]:
    """This micro-batch's share of the step's loss, and [2, domains]: nats and target tokens."""
    model = bind(config.model, weights, recompute=config.train.recompute, placement=placement)
    documents_BL = None if part.documents is None else part.documents[:, :-1]
    nll_BL, log_z_BL = model.losses(part.ids[:, :-1], part.ids[:, 1:], documents_BL)
    losses_BL = nll_BL + config.train.z_loss * jnp.square(log_z_BL)
    of_domain_dN = jax.nn.one_hot(part.domains.reshape(-1), domains, axis=0) * part.loss_mask.reshape(-1)
    sums = jnp.stack([of_domain_dN @ nll_BL.reshape(-1), of_domain_dN.sum(axis=1)])
    return (losses_BL * part.loss_mask).sum() / num_tokens, sums


def _clipped(gradients: Weights, norm: Array, *, limit: float) -> Weights:
    """Clip as PyTorch does, with 1e-6 added to the norm; a limit of 0 means no clipping."""
    if not limit:
        return gradients
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda gradient: gradient * factor, gradients)
