"""What a step needs on each device of a mesh, by XLA's own account: compiled, and not run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lamda.config import ds_config
from lamda.config.batches import micro_batches_per_rank
from lamda.config.schema import Config
from lamda.engines.flax.optimizer import make_optimizer
from lamda.engines.flax.sharding import ROWS, make_mesh, row_ranks, shardings_like, weight_sharding
from lamda.engines.flax.step import Batch, TrainState, make_step
from lamda.engines.flax.weights import stacked_shapes
from lamda.model.counts import parameters


def measure(config: Config) -> dict[str, Any]:
    """Bytes on a device: of the state, and of all else that is there at some moment of a step. Raises UserError."""
    mesh = make_mesh(config.flax, config.model)
    is_bf16 = ds_config.is_bf16(ds_config.read(config))
    state, batch = _state(config, mesh), _batch(config, mesh)
    step: Any = make_step(
        config, make_optimizer(config.train, config.model), state=state, mesh=mesh,
        dtype=jnp.bfloat16 if is_bf16 else jnp.float32, domains=1,
    )  # fmt: skip
    needed = step.lower(state, batch, ShapeDtypeStruct((), jnp.float32)).compile().memory_analysis()
    return {
        "mesh": dict(mesh.shape),
        "parameters": parameters(config.model),
        "micro_batch": config.train.micro_batch_size,
        "length": config.data.sequence_length,
        "recompute": config.train.recompute,
        "bf16": is_bf16,
        "state_bytes": needed.argument_size_in_bytes,
        "step_bytes": needed.temp_size_in_bytes,
    }


def _state(config: Config, mesh: Mesh) -> Any:
    """The shapes of a state and where they lie."""
    shapes = stacked_shapes(config.model)
    weights: dict[str, Any] = {
        name: ShapeDtypeStruct(shape, jnp.float32, sharding=weight_sharding(name, mesh))
        for name, shape in shapes.items()
    }
    kept = jax.eval_shape(make_optimizer(config.train, config.model).init, weights)
    lies = shardings_like(kept, mesh, shapes)
    return TrainState(
        weights, jax.tree.map(lambda each, lie: ShapeDtypeStruct(each.shape, each.dtype, sharding=lie), kept, lies)
    )


def _batch(config: Config, mesh: Mesh) -> Batch:
    """The shapes of a step's rows, with document ids where attention stays inside documents."""
    train, length = config.train, config.data.sequence_length
    shape = (micro_batches_per_rank(train, world_size=row_ranks(mesh)), train.micro_batch_size * row_ranks(mesh))

    def rows(length: int, dtype: Any) -> Any:
        return ShapeDtypeStruct((*shape, length), dtype, sharding=NamedSharding(mesh, PartitionSpec(None, ROWS)))

    documents = rows(length + 1, jnp.int32) if config.data.separates_documents else None
    return Batch(rows(length + 1, jnp.int32), rows(length, jnp.bool_), rows(length, jnp.int32), documents)
