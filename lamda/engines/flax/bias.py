"""T5's relative position bias in JAX; the equations stand in `lamda/model/attention/bias.py`.

Dimensions: legend in `lamda/model/decoder.py`; M keys, R buckets of distance.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from lamda.model.weights import BUCKETS

MAX_DISTANCE = 128


def causal_buckets(count: int) -> NDArray[np.int32]:
    """T5's bucket of each distance 0 to count - 1 from a key to a later query: [count], known when a program is made.

    Half of the buckets hold one distance each, the others grow by logarithm to MAX_DISTANCE; the last takes the rest.
    """
    exact = BUCKETS // 2
    distances = np.arange(count)
    beyond = np.log(np.maximum(distances, exact) / exact) / np.log(MAX_DISTANCE / exact)
    logarithmic = np.minimum(exact + (beyond * (BUCKETS - exact)).astype(np.int32), BUCKETS - 1)
    return np.where(distances < exact, distances, logarithmic).astype(np.int32)


def row_bias(table_RH: Array, length: int) -> Array:
    """The bias [H, L, L] of whole rows, -inf where the key is later; fp32 or wider.

    Row i is a window on the line of a head's values from the farthest distance to the nearest, then the future; it
    begins one place earlier than the row before. Copies of the line laid end to end and read back in rows one
    shorter than the line are exactly that, and their gradient is a sum, where that of an index would be a scatter.
    """
    by_distance_HM = _wide(table_RH)[causal_buckets(length)].T
    heads, future_HM = len(by_distance_HM), jnp.full_like(by_distance_HM, -jnp.inf)
    line_HN = jnp.concatenate([by_distance_HM[:, :1], future_HM, by_distance_HM[:, :0:-1]], axis=1)
    width = line_HN.shape[1]
    copies_HN = jnp.broadcast_to(line_HN[:, None], (heads, length, width)).reshape(heads, length * width)
    return copies_HN[:, : length * (width - 1)].reshape(heads, length, width - 1)[:, :, :length]


def bias_at(table_RH: Array, distances_BLM: Array, *, longest: int) -> Array:
    """The bias [B, H, L, M] at distances below `longest`, -inf where they are negative."""
    buckets_BLM = jnp.asarray(causal_buckets(longest))[jnp.maximum(distances_BLM, 0)]
    bias_BLMH = jnp.where((distances_BLM < 0)[..., None], -jnp.inf, _wide(table_RH)[buckets_BLM])
    return jnp.moveaxis(bias_BLMH, -1, 1)


def _wide(table_RH: Array) -> Array:
    return table_RH.astype(jnp.promote_types(table_RH.dtype, jnp.float32))
