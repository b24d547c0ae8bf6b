"""T5's relative position bias in JAX; equations in `lamda/model/attention/bias.py`.

Dimensions: legend in `lamda/model/decoder.py`; M keys, R buckets of distance.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from lamda.model.attention.bias import causal_buckets


def row_bias(table_RH: Array, length: int) -> Array:
    """The bias [H, L, L] of whole rows, -inf where the key is later; fp32 or wider.

    Row i is a window on the line of a head's values from the farthest distance to the nearest, then the future; each
    window begins one element earlier than the one before it. Copies of the line laid end to end and read back as rows
    that are one element shorter give exactly these windows. The gradient is a sum, whereas an index would need a
    scatter.
    """
    by_distance_HM = at_least_fp32(table_RH)[causal_buckets(length).int().numpy()].T
    heads, future_HM = len(by_distance_HM), jnp.full_like(by_distance_HM, -jnp.inf)
    line_HN = jnp.concatenate([by_distance_HM[:, :1], future_HM, by_distance_HM[:, :0:-1]], axis=1)
    width = line_HN.shape[1]
    copies_HN = jnp.broadcast_to(line_HN[:, None], (heads, length, width)).reshape(heads, length * width)
    return copies_HN[:, : length * (width - 1)].reshape(heads, length, width - 1)[:, :, :length]


def bias_at(table_RH: Array, distances_BLM: Array, *, longest: int) -> Array:
    """The bias [B, H, L, M] at distances below `longest`, -inf where they are negative."""
    buckets_BLM = jnp.asarray(causal_buckets(longest).int().numpy())[jnp.maximum(distances_BLM, 0)]
    bias_BLMH = jnp.where((distances_BLM < 0)[..., None], -jnp.inf, at_least_fp32(table_RH)[buckets_BLM])
    return jnp.moveaxis(bias_BLMH, -1, 1)


def at_least_fp32(x: Array) -> Array:
    """Converted to fp32, unless it has a higher precision."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
