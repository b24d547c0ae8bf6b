"""The weights of the JAX model: by plain name in files, and stacked over the layers in memory.

`layers.3.attention.query.weight` of a file is the fourth part of `layers.attention.query.weight`, [S, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from lamda.config import ModelConfig
from lamda.config.schema import Recompute
from lamda.durable import umask_mode
from lamda.engines.flax.model import LaMDA, Placement
from lamda.model.weights import check_shapes, weight_shapes

T = TypeVar("T")

Weights = dict[str, Array]  # stacked weights by name

Read = Callable[[str, tuple[slice, ...]], NDArray[np.generic]]  # (plain name, index) -> values


def stacked_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, stacked over the layers."""
    shapes = {}
    for name, shape in weight_shapes(config).items():
        stacked = stacked_name(name)
        shapes[stacked] = shape if stacked == name else (config.n_layers, *shape)
    return shapes


def stacked_name(plain: str) -> str:
    """`layers.attention.query.weight` of `layers.3.attention.query.weight`; other names are their own."""
    layers, _, rest = plain.partition(".")
    return f"layers.{rest.partition('.')[2]}" if layers == "layers" else plain


def make_weights(
    config: ModelConfig, read: Read, *, dtype: DTypeLike, shardings: Mapping[str, Sharding] | None = None
) -> Weights:
    """Stacked weights of what `read` returns; each device reads only its shard. shardings: by stacked name."""

    def device_part(name: str, index: tuple[slice, ...]) -> NDArray[np.generic]:
        if not name.startswith("layers."):
            return read(name, index).astype(dtype)
        parts = [
            read(f"layers.{layer}.{name.removeprefix('layers.')}", index[1:])
            for layer in range(config.n_layers)[index[0]]
        ]
        return np.stack(parts).astype(dtype)

    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.make_array_from_callback(
            shape, one_device if shardings is None else shardings[name], partial(device_part, name)
        )
        for name, shape in stacked_shapes(config).items()
    }


def in_stacks(plain: Mapping[str, T]) -> dict[str, T]:
    """The same in the order of `stacked_shapes`: the layers of a weight follow one another."""
    layers: dict[str, dict[str, T]] = {}
    for name, value in plain.items():
        layers.setdefault(stacked_name(name), {})[name] = value
    return {name: value for stack in layers.values() for name, value in stack.items()}


def place_weights(
    plain: Iterable[tuple[str, NDArray[np.generic]]], config: ModelConfig, shardings: Mapping[str, Sharding]
) -> Weights:
    """Stacked weights of plain ones, which come in the order of `in_stacks`; this process copies its devices' shards.

    So it needs one plain weight at a time.
    """
    shapes, weights = stacked_shapes(config), Weights()
    for name, layers in groupby(plain, key=lambda item: stacked_name(item[0])):
        sharding, shape = shardings[name], shapes[name]
        places = {device: index or () for device, index in sharding.addressable_devices_indices_map(shape).items()}
        shards = {device: np.empty(sharding.shard_shape(shape), np.float32) for device in places}
        for layer, (_, weight) in enumerate(layers):
            for device, index in places.items():
                if name.startswith("layers."):
                    shards[device][layer] = weight[index[1:]]
                else:
                    shards[device][...] = weight[index]
        on_devices = [jax.device_put(shard, device) for device, shard in shards.items()]
        weights[name] = jax.make_array_from_single_device_arrays(shape, sharding, on_devices)
    return weights


def load_weights(
    path: Path, config: ModelConfig, *, dtype: DTypeLike | None = None, shardings: Mapping[str, Sharding] | None = None
) -> Weights:
    """Stacked weights of a `model.safetensors`; dtype: by default the file's. Raises UserError naming mismatches."""
    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        check_shapes(weight_shapes(config), {name: tuple(each.get_shape()) for name, each in slices.items()})
        saved = file.get_tensor("final_norm.scale").dtype
        return make_weights(config, lambda name, index: slices[name][index], dtype=dtype or saved, shardings=shardings)


def plain_weights(weights: Mapping[str, Array]) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Host copies of full weights by plain name, gathered one at a time; every process iterates over all of them."""
    for name, array in weights.items():
        if name.startswith("layers."):
            rest = name.removeprefix("layers.")
            yield from ((f"layers.{layer}.{rest}", _full(_layer(array, layer))) for layer in range(len(array)))
        else:
            yield name, _full(array)


def save_weights(weights: Mapping[str, NDArray[np.generic]], path: Path) -> None:
    """Write a `model.safetensors`, byte for byte as the PyTorch engine does."""
    with umask_mode(path):
        save_file(dict(weights), path, metadata={"format": "pt"})


def bind(
    config: ModelConfig,
    weights: Mapping[str, Array],
    *,
    recompute: Recompute = "none",
    placement: Placement | None = None,
) -> LaMDA:
    """The model with these weights, which may be tracers. recompute, placement: as in `LaMDA`."""
    dtype = next(iter(weights.values())).dtype
    empty = nnx.eval_shape(lambda: LaMDA(config, dtype=dtype, recompute=recompute, placement=placement))
    graph, state = nnx.split(empty)
    flat = nnx.to_flat_state(state)
    filled = [(path, variable.replace(weights[".".join(map(str, path))])) for path, variable in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


@jax.jit
def _layer(array: Array, layer: int) -> Array:
    return array[layer]


def _full(array: Array) -> NDArray[np.generic]:
    """An array on the host, gathered where other processes hold shards of it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
