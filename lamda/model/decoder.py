"""LaMDA's decoder (arXiv 2201.08239, section 3).

B batch, L length, D model width, H heads, K head width, F feed-forward width, V vocabulary;
M keys, R buckets of distance.

The paper leaves details open. They follow Google's model of the same shape (Lingvo, `DenseLm128B8x8`):
RMSNorm before each half of a block, no biases, no scaling of scores, a tied embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lamda.config import ModelConfig
from lamda.config.schema import Backend, Recompute
from lamda.model.attention import Attention, KeyValues, View
from lamda.model.attention.backends import choose_backend
from lamda.model.layers import Embedding, Linear, RMSNorm, bias_table
from lamda.model.loss import head_losses, token_losses
from lamda.model.weights import check_shapes


class LaMDA(nn.Module):
    """Tokens to logits. Its weights are NaN until `load_weights` or `lamda.model.initialization.initialize_weights`.

    recompute: activations that the backward pass recomputes. "ffn": inside the feed-forward layers; "block": inside
    whole blocks; with either, also the logits if `targets_BL` is given.
    """

    def __init__(self, config: ModelConfig, *, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, recompute) for _ in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model)
        self.relative_bias = None if config.bias_per_layer else bias_table(config)

    @property
    def attention(self) -> Backend:
        """The backend that computes attention, on the device of the weights and in their precision.

        Raises UserError if `model.attention` names one that cannot compute there, or not the gradients that are needed.
        """
        weight = self.final_norm.scale
        needs_gradients = torch.is_grad_enabled() and weight.requires_grad
        return choose_backend(
            self.config.attention,
            weight.device,
            dtype=weight.dtype,
            width=self.config.d_head,
            training=needs_gradients,
        )

    def forward(
        self,
        tokens_BL: Tensor,
        documents_BL: Tensor | None = None,
        *,
        targets_BL: Tensor | None = None,
        cache: Sequence[KeyValues] | None = None,
        last_B: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, L, V] of the token after each token, in the weights' precision.

        documents_BL: one document id per token; attention stays inside a document. cache: keys and values of the
        previous tokens, one per layer; these L tokens are added to it. Raises ValueError if both are given.
        targets_BL: the next tokens; the result is then their loss in nats and logsumexp, [B, L] each.
        last_B: a position in each row; the result is then the logits [B, V] after that token only.
        """
        if documents_BL is not None and cache is not None:
            raise ValueError("give documents_BL or cache, not both: the documents of cached tokens are not known")
        x_BLD = self.embedding(tokens_BL)
        for layer, view in zip(self.layers, cache or self._views(tokens_BL, documents_BL), strict=True):
            x_BLD = layer(x_BLD, view)
        if last_B is not None:
            x_BLD = x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), last_B]
        x_BLD = self.final_norm(x_BLD) * self.config.d_model**-0.5
        if targets_BL is not None and self.recompute != "none":
            return head_losses(x_BLD, self.embedding.weight, targets_BL)
        logits_BLV = self.embedding.logits(x_BLD)
        return logits_BLV if targets_BL is None else token_losses(logits_BLV, targets_BL)

    def _views(self, tokens_BL: Tensor, documents_BL: Tensor | None) -> list[View]:
        """The same view for every layer."""
        view = View.of(tokens_BL, documents_BL, table_RH=self.relative_bias, attention=self.attention)
        return [view] * len(self.layers)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights in by plain name, in the precision of the parameters.

        Raises UserError naming every missing, unexpected and misshapen weight, before anything is changed.
        """
        parameters = self.export_weights()
        expected, given = (
            {name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (parameters, weights)
        )
        check_shapes(expected, given)
        for name, tensor in parameters.items():
            tensor.copy_(weights[name])

    def export_weights(self) -> dict[str, Tensor]:
        """The weights by plain name, as views of the parameters."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


class Block(nn.Module):
    """Attention, then the gated feed-forward layer, each on a normalized copy of the residual stream."""

    def __init__(self, config: ModelConfig, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BLD: Tensor, view: View | KeyValues) -> Tensor:
        """The residual stream [B, L, D] after this block."""
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BLD, view, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_BLD, view)

    def _forward(self, x_BLD: Tensor, view: View | KeyValues) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), view)
        if self.recompute == "ffn" and torch.is_grad_enabled():
            return x_BLD + checkpoint(self._gated, x_BLD, use_reentrant=False, preserve_rng_state=False)
        return x_BLD + self._gated(x_BLD)

    def _gated(self, x_BLD: Tensor) -> Tensor:
        return self.feed_forward(self.feed_forward_norm(x_BLD))


class FeedForward(nn.Module):
    """Gated GELU in its tanh form (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate, self.up = (Linear(config.d_model, config.d_ff) for _ in range(2))
        self.down = Linear(config.d_ff, config.d_model)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        return self.down(functional.gelu(self.gate(x_BLD), approximate="tanh") * self.up(x_BLD))
