"""LaMDA's decoder in Flax NNX: the equations, weights and names of `lamda/model/decoder.py`.

B batch, L length, D model width, H heads, K head width, F feed-forward width, V vocabulary;
M keys, R buckets of distance, S layers.

The blocks are one block whose weights have a first dimension S, which `nnx.scan` iterates over, so only one block is
compiled. Matrices are [out, in] as in the files, so that no weight is transposed; XLA chooses their layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx, struct
from jax import Array
from jax.typing import DTypeLike

from lamda.config import ModelConfig
from lamda.config.schema import Recompute
from lamda.engines.flax.bias import at_least_fp32, bias_at, row_bias
from lamda.model.weights import BUCKETS

Module = TypeVar("Module", bound=nnx.Module)

PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
"""Products of weights and activations: expensive to compute, and small next to the scores [B, H, L, M]."""


class Placement:
    """One device; `lamda.engines.flax.sharding` has the placement on a mesh."""

    def shard_rows(self, x_BLD: Array) -> Array:
        """The residual stream, sharded by rows."""
        return x_BLD

    def replicate(self, logits_BV: Array) -> Array:
        """Logits that every process reads."""
        return logits_BV

    def gather(self, module: Module, name: str) -> Module:
        """A module with its full weights. name: the prefix of their names."""
        return module


class KeyValues(NamedTuple):
    """Keys and values [S, B, M, H, K] of the previous tokens, and their number per row, [B]."""

    keys_SBMHK: Array
    values_SBMHK: Array
    lengths_B: Array


class LaMDA(nnx.Module):
    """Tokens to logits. Its weights are NaN until `lamda.engines.flax.weights` fills them.

    dtype: of the weights, and so of the computation. recompute: as in the PyTorch model, by `jax.checkpoint`; "none"
    still recomputes what is cheap: scores, probabilities and elementwise operations.
    placement: how arrays are sharded over devices.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        recompute: Recompute = "none",
        placement: Placement | None = None,
    ) -> None:
        self.config, self.recompute = config, recompute
        self.placement = placement or Placement()
        self.embedding = Embedding(config.vocab_size, config.d_model, dtype)
        self.layers = nnx.vmap(
            lambda: Block(config, dtype, recompute, self.placement), in_axes=(), axis_size=config.n_layers
        )()
        self.final_norm = RMSNorm(config.d_model, dtype)
        self.relative_bias = None if config.bias_per_layer else _bias_table(config, dtype)

    def __call__(self, tokens_BL: Array, documents_BL: Array | None = None) -> Array:
        """Logits [B, L, V] of the token after each. documents_BL: document ids; attention stays inside a document."""
        return self.embedding.logits(self._hidden(tokens_BL, documents_BL))

    def losses(self, tokens_BL: Array, targets_BL: Array, documents_BL: Array | None = None) -> tuple[Array, Array]:
        """Nats of each target and the logsumexp of its logits, [B, L] each, in fp32 or wider."""
        x_BLD, embedding = self._hidden(tokens_BL, documents_BL), self.placement.gather(self.embedding, "embedding")

        def of_head(embedding: Embedding, x_BLD: Array) -> tuple[Array, Array]:
            return token_losses(embedding.logits(x_BLD), targets_BL)

        return (of_head if self.recompute == "none" else nnx.remat(of_head))(embedding, x_BLD)

    def extend(self, tokens_BL: Array, cache: KeyValues, *, last_B: Array) -> tuple[Array, KeyValues]:
        """Process tokens that follow the cached ones: logits [B, V] after token `last_B` of each row, and the cache.

        Tokens after `last_B` are padding and are not added to the cache.
        """
        embedding = self.placement.gather(self.embedding, "embedding")
        positions_BL = cache.lengths_B[:, None] + jnp.arange(tokens_BL.shape[1])
        view = _CachedView(cache.keys_SBMHK.shape[2], positions_BL)
        if self.relative_bias is not None:
            view = replace(view, shared=view.bias(self.relative_bias[...]))

        @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def run_layers(block: Block, x_BLD: Array, past: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            return block.extend(x_BLD, view, past)

        x_BLD, keys_values = run_layers(self.layers, embedding(tokens_BL), (cache.keys_SBMHK, cache.values_SBMHK))
        last_B1D = jnp.take_along_axis(x_BLD, last_B[:, None, None], axis=1)
        logits_BV = self.placement.replicate(embedding.logits(self._scaled(last_B1D))[:, 0])
        return logits_BV, KeyValues(*keys_values, cache.lengths_B + last_B + 1)

    def _hidden(self, tokens_BL: Array, documents_BL: Array | None) -> Array:
        """The input of the output projection, [B, L, D]."""
        hidden_BLM = None if documents_BL is None else documents_BL[:, :, None] != documents_BL[:, None, :]
        placement, view = self.placement, _RowView(tokens_BL.shape[1], hidden_BLM)
        if self.relative_bias is not None:
            view = replace(view, shared=view.bias(self.relative_bias[...]))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run_layers(block: Block, x_BLD: Array) -> Array:
            return placement.shard_rows(block(x_BLD, view))

        return self._scaled(
            run_layers(self.layers, placement.shard_rows(placement.gather(self.embedding, "embedding")(tokens_BL)))
        )

    def _scaled(self, x_BLD: Array) -> Array:
        return self.final_norm(x_BLD) * self.config.d_model**-0.5


class Block(nnx.Module):
    """Attention, then the gated feed-forward layer, each on a normalized copy of the residual stream."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, recompute: Recompute, placement: Placement) -> None:
        self.recompute, self.placement = recompute, placement
        self.attention_norm = RMSNorm(config.d_model, dtype)
        self.attention = Attention(config, dtype)
        self.feed_forward_norm = RMSNorm(config.d_model, dtype)
        self.feed_forward = FeedForward(config, dtype)

    def __call__(self, x_BLD: Array, view: _RowView) -> Array:
        """The residual stream [B, L, D] after this block."""
        forward = _remat(Block._forward) if self.recompute == "block" else Block._forward
        return forward(self, x_BLD, view)

    def extend(self, x_BLD: Array, view: _CachedView, past: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        """The same for tokens that follow cached ones, and this layer's keys and values including theirs."""
        attention = self.placement.gather(self.attention, "attention")
        q_BLHK, k_BLHK, v_BLHK = attention.project(self.attention_norm(x_BLD))
        rows = jnp.arange(len(x_BLD))[:, None]
        k_BMHK, v_BMHK = (
            cached.at[rows, view.positions_BL].set(new) for cached, new in zip(past, (k_BLHK, v_BLHK), strict=True)
        )
        x_BLD = x_BLD + attention.mix(q_BLHK, k_BMHK, v_BMHK, view)
        return x_BLD + self._gated(x_BLD), (k_BMHK, v_BMHK)

    def _forward(self, x_BLD: Array, view: _RowView) -> Array:
        # JAX uses only the outermost of nested checkpoint policies, so the two halves are not nested.
        mixed = _remat(Block._mixed, keep=PRODUCTS)
        gated = _remat(Block._gated, keep=None if self.recompute == "ffn" else PRODUCTS)
        x_BLD = x_BLD + mixed(self, x_BLD, view)
        return x_BLD + gated(self, x_BLD)

    def _mixed(self, x_BLD: Array, view: _RowView) -> Array:
        return self.placement.gather(self.attention, "attention")(self.attention_norm(x_BLD), view)

    def _gated(self, x_BLD: Array) -> Array:
        return self.placement.gather(self.feed_forward, "feed_forward")(self.feed_forward_norm(x_BLD))


class Attention(nnx.Module):
    """softmax(q k^T + bias[distance]) v, with a bias table per layer or one shared by all layers."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike) -> None:
        width = config.n_heads * config.d_head
        self.n_heads = config.n_heads
        self.query = Linear(config.d_model, width, dtype)
        self.key = Linear(config.d_model, width, dtype)
        self.value = Linear(config.d_model, width, dtype)
        self.output = Linear(width, config.d_model, dtype)
        self.relative_bias = _bias_table(config, dtype) if config.bias_per_layer else None

    def __call__(self, x_BLD: Array, view: _RowView) -> Array:
        """[B, L, D] to [B, L, D]."""
        return self.mix(*self.project(x_BLD), view)

    def project(self, x_BLD: Array) -> tuple[Array, Array, Array]:
        """Query, key and value of each token, [B, L, H, K]."""
        q_BLHK, k_BLHK, v_BLHK = (
            rearrange(matrix(x_BLD), "b l (h k) -> b l h k", h=self.n_heads)
            for matrix in (self.query, self.key, self.value)
        )
        return q_BLHK, k_BLHK, v_BLHK

    def mix(self, q_BLHK: Array, k_BMHK: Array, v_BMHK: Array, view: _RowView | _CachedView) -> Array:
        """The output of attention, [B, L, D]; scores and softmax in the precision of the bias."""
        bias = view.shared
        if bias is None:
            assert self.relative_bias is not None, "without a shared table each layer has one"
            bias = view.bias(self.relative_bias[...])
        scores_BHLM = jnp.einsum("blhk,bmhk->bhlm", q_BLHK, k_BMHK, preferred_element_type=bias.dtype) + bias
        if view.hidden_BLM is not None:
            scores_BHLM = jnp.where(view.hidden_BLM[:, None], -jnp.inf, scores_BHLM)
        probs_BHLM = jax.nn.softmax(scores_BHLM, axis=-1).astype(v_BMHK.dtype)
        return self.output(rearrange(jnp.einsum("bhlm,bmhk->blhk", probs_BHLM, v_BMHK), "b l h k -> b l (h k)"))


class FeedForward(nnx.Module):
    """Gated GELU in its tanh form (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike) -> None:
        self.gate = Linear(config.d_model, config.d_ff, dtype)
        self.up = Linear(config.d_model, config.d_ff, dtype)
        self.down = Linear(config.d_ff, config.d_model, dtype)

    def __call__(self, x_BLD: Array) -> Array:
        """[B, L, D] to [B, L, D]."""
        return self.down(jax.nn.gelu(self.gate(x_BLD), approximate=True) * self.up(x_BLD))


class Linear(nnx.Module):
    """A matrix [outputs, inputs] without bias."""

    def __init__(self, inputs: int, outputs: int, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.full((outputs, inputs), jnp.nan, dtype))

    def __call__(self, x_BLN: Array) -> Array:
        """[B, L, inputs] to [B, L, outputs]."""
        return jnp.einsum("bli,oi->blo", x_BLN, self.weight[...])


class Embedding(nnx.Module):
    """One vector [D] per token, for both the input and the output projection (tied)."""

    def __init__(self, size: int, width: int, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.full((size, width), jnp.nan, dtype))

    def __call__(self, tokens_BL: Array) -> Array:
        """[B, L] to [B, L, D]."""
        return self.weight[...][tokens_BL]

    def logits(self, x_BLD: Array) -> Array:
        """[B, L, D] to [B, L, V]: the product with every token's vector."""
        return jnp.einsum("bld,vd->blv", x_BLD, self.weight[...])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in fp32 or wider (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.full((width,), jnp.nan, dtype))

    def __call__(self, x_BLD: Array) -> Array:
        """[B, L, D] to [B, L, D]."""
        fp32_BLD = at_least_fp32(x_BLD)
        scale_BL1 = jax.lax.rsqrt(jnp.square(fp32_BLD).mean(axis=-1, keepdims=True) + 1e-6)
        return (fp32_BLD * scale_BL1 * self.scale[...]).astype(x_BLD.dtype)


@struct.dataclass
class _RowView:
    """The keys that tokens of full rows attend to. hidden_BLM: True at keys of other documents.

    shared: the bias, where all layers have the same one.
    """

    length: int = struct.field(pytree_node=False)
    hidden_BLM: Array | None
    shared: Array | None = None

    def bias(self, table_RH: Array) -> Array:
        """The bias of a layer, -inf at future keys; broadcasts to [B, H, L, M]."""
        return row_bias(table_RH, self.length)


@struct.dataclass
class _CachedView:
    """The same for tokens after cached ones. positions_BL: of the new tokens. longest: length of the cache."""

    longest: int = struct.field(pytree_node=False)
    positions_BL: Array
    hidden_BLM: Array | None = None
    shared: Array | None = None

    def bias(self, table_RH: Array) -> Array:
        distances_BLM = self.positions_BL[:, :, None] - jnp.arange(self.longest)
        return bias_at(table_RH, distances_BLM, longest=self.longest)


def token_losses(logits_BLV: Array, targets_BL: Array) -> tuple[Array, Array]:
    """Cross-entropy of each target in nats and the logsumexp of its logits, [B, L] each, in fp32 or wider."""
    logits_BLV = at_least_fp32(logits_BLV)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    chosen_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return log_z_BL - chosen_BL, log_z_BL


def empty_cache(config: ModelConfig, *, rows: int, longest: int, dtype: DTypeLike) -> KeyValues:
    """An empty cache for `longest` tokens per row."""
    shape = (config.n_layers, rows, longest, config.n_heads, config.d_head)
    return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32))


def _bias_table(config: ModelConfig, dtype: DTypeLike) -> nnx.Param[Array]:  # [R, H]
    return nnx.Param(jnp.full((BUCKETS, config.n_heads), jnp.nan, dtype))


def _remat(method: Callable[..., Array], keep: Callable[..., bool] | None = None) -> Callable[..., Array]:
    """Add activation checkpointing: the backward pass recomputes all except `keep`, and gathers weights again.

    Inside a scan XLA cannot merge it with the forward pass, so prevent_cse is not needed.
    """
    return nnx.remat(method, policy=keep, prevent_cse=False)
