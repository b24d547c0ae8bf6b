"""How arrays are sharded over the mesh (data, fsdp, tensor).

    data    replicas of the model, each with different rows
    fsdp    different rows as well, but weights and optimizer state are sharded over its devices (ZeRO-3)
    tensor  heads, feed-forward width and vocabulary are cut: the devices compute parts of the same rows

XLA inserts the communication. Dimensions: legend in `lamda/engines/flax/model.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lamda.config.errors import UserError
from lamda.config.schema import FlaxConfig, ModelConfig
from lamda.engines.flax.model import Module, Placement

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that share a step's rows

WEIGHTS = {
    "embedding.weight": PartitionSpec("tensor", "fsdp"),
    "query.weight": PartitionSpec("tensor", "fsdp"),
    "key.weight": PartitionSpec("tensor", "fsdp"),
    "value.weight": PartitionSpec("tensor", "fsdp"),
    "output.weight": PartitionSpec("fsdp", "tensor"),
    "gate.weight": PartitionSpec("tensor", "fsdp"),
    "up.weight": PartitionSpec("tensor", "fsdp"),
    "down.weight": PartitionSpec("fsdp", "tensor"),
    "relative_bias": PartitionSpec(None, "tensor"),
    "scale": PartitionSpec(),
}
"""By the end of a weight's name; stacked weights of layers have one more dimension in front, which is not cut."""


def make_mesh(config: FlaxConfig, model: ModelConfig) -> Mesh:
    """A mesh of all devices; those that share rows are adjacent. Raises UserError if a degree does not divide."""
    devices, degree = jax.devices(), config.fsdp * config.tensor
    if len(devices) % degree:
        raise UserError(
            f"flax.fsdp {config.fsdp} x flax.tensor {config.tensor} is {degree}, which does not divide the "
            f"{len(devices)} devices; choose two numbers whose product does"
        )
    if jax.process_count() > 1 and jax.local_device_count() % config.tensor:
        raise UserError(
            f"flax.tensor {config.tensor} does not divide the {jax.local_device_count()} devices of a process: the "
            "devices that share a row must be in one process"
        )
    if problems := [*_misfits(model, config)]:
        raise UserError("\n".join(problems))
    shape = (len(devices) // degree, config.fsdp, config.tensor)
    return Mesh(np.array(devices).reshape(shape), AXES)


def _misfits(model: ModelConfig, config: FlaxConfig) -> Iterable[str]:
    for key, size, axis, parts in (
        ("n_heads", model.n_heads, "tensor", config.tensor),
        ("d_ff", model.d_ff, "tensor", config.tensor),
        ("vocab_size", model.vocab_size, "tensor", config.tensor),
        ("d_model", model.d_model, "fsdp", config.fsdp),
    ):
        if size % parts:
            yield f"flax.{axis} {parts} does not divide model.{key} {size}; choose one that does"


class MeshPlacement(Placement):
    """The placement on a mesh: rows are shared by the axes of ROWS, and a module's weights are gathered along fsdp."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def shard_rows(self, x_BLD: Array) -> Array:  # noqa: D102 - as above
        return jax.lax.with_sharding_constraint(x_BLD, NamedSharding(self._mesh, PartitionSpec(ROWS)))

    def replicate(self, logits_BV: Array) -> Array:  # noqa: D102 - as above
        return jax.lax.with_sharding_constraint(logits_BV, NamedSharding(self._mesh, PartitionSpec()))

    def gather(self, module: Module, name: str) -> Module:  # noqa: D102 - as above
        graph, state = nnx.split(module)
        gathered = [
            (path, weight.replace(self._gathered(".".join([name, *map(str, path)]), weight[...])))
            for path, weight in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(gathered))

    def _gathered(self, name: str, weight: Array) -> Array:
        """Constrain a weight to be gathered along fsdp: otherwise XLA may send activations or whole rows."""
        spec = [None if axis == "fsdp" else axis for axis in _spec(name)]
        return jax.lax.with_sharding_constraint(weight, NamedSharding(self._mesh, PartitionSpec(*spec)))


def weight_sharding(name: str, mesh: Mesh) -> NamedSharding:
    """The sharding of a stacked weight; optimizer state of the same shape has the same one."""
    spec = _spec(name)
    return NamedSharding(mesh, PartitionSpec(None, *spec) if name.startswith("layers.") else spec)


def _spec(name: str) -> PartitionSpec:
    return next(spec for ending, spec in WEIGHTS.items() if name.endswith(ending))


def shardings_like(tree: Any, mesh: Mesh, shapes: dict[str, tuple[int, ...]]) -> Any:
    """The shardings of a tree: an array with a weight's name and shape is sharded like it; others are replicated."""

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)
        if name in shapes and leaf.shape == shapes[name]:
            return weight_sharding(name, mesh)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)


def row_ranks(mesh: Mesh) -> int:
    """Devices, or groups of devices, that have different rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
