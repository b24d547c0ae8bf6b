"""Detects silent corruption of weights: any single flipped bit in one device's copy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from lamda.distributed import minority_ranks
from lamda.engines.flax.sharding import AXES, weight_sharding
from lamda.engines.flax.weights import Weights


def corrupted_processes(weights: Weights, mesh: Mesh) -> list[int]:
    """The processes with a device whose copy (along the mesh's data axis) is in the minority; all processes call it."""
    if mesh.shape["data"] == 1:
        return []
    specs = {name: weight_sharding(name, mesh).spec for name in weights}
    hashed = jax.shard_map(_hash, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(AXES), check_vma=False)
    replicated = jax.sharding.NamedSharding(mesh, PartitionSpec())
    hashes = np.asarray(jax.jit(hashed, out_shardings=replicated)(weights)).reshape(mesh.devices.shape)
    corrupted = {
        mesh.devices[copy, fsdp, tensor].process_index
        for fsdp, tensor in np.ndindex(hashes.shape[1:])
        for copy in minority_ranks(hashes[:, fsdp, tensor].tolist())
    }
    return sorted(corrupted)


def _hash(weights: Weights) -> Array:
    """[1], the sum modulo 2^32 of each element's bits times an odd number: any one changed element changes it."""
    return sum(map(_hash_one, weights.values()), start=jnp.zeros(1, jnp.uint32))


def _hash_one(weight: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(weight.reshape(-1), jnp.uint32)
    positions = jax.lax.iota(jnp.uint32, bits.shape[0])
    return (bits * (2 * positions + 1)).sum(keepdims=True, dtype=jnp.uint32)
