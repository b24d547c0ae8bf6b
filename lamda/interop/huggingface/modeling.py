"""The decoder as a model of transformers, with its modules, cache, masks and outputs.

Query, key and value, gate and up are separate matrices here, so that modules have the names of the weights in files,
for adapters. Distances are those between cache slots, which padding on the left shifts equally. Dimensions: legend in
`lamda/model/decoder.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from lamda.interop.huggingface.configuration import LamdaConfig
from lamda.model.attention.bias import MAX_DISTANCE, causal_buckets
from lamda.model.initialization import draws
from lamda.model.layers import Embedding, Linear, RMSNorm, bias_table


def eager_attention(
    module: nn.Module,
    q_BHLK: Tensor,
    k_BHMK: Tensor,
    v_BHMK: Tensor,
    mask_BHLM: Tensor | None,
    *,
    position_bias: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention output [B, L, H, K] and probabilities [B, H, L, M]; scores and softmax in the bias's precision."""
    scores_BHLM = (q_BHLK @ k_BHMK.mT).to(position_bias.dtype) + position_bias
    if mask_BHLM is not None:
        scores_BHLM = scores_BHLM + mask_BHLM
    probs_BHLM = scores_BHLM.softmax(dim=-1).to(v_BHMK.dtype)
    return (probs_BHLM @ v_BHMK).transpose(1, 2), probs_BHLM


def position_bias(table_RH: Tensor, buckets_BLM: Tensor) -> Tensor:
    """The bias [B, H, L, M] of a table, in fp32 or wider."""
    wide_RH = table_RH.to(torch.promote_types(table_RH.dtype, torch.float32))
    return rearrange(functional.embedding(buckets_BLM, wide_RH), "b l m h -> b h l m")


class LamdaAttention(nn.Module):
    """Multi-head attention with its own bias table, or the shared one."""

    is_causal = True

    def __init__(self, config: LamdaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width = config.n_heads * config.d_head
        self.query = Linear(config.d_model, width)
        self.key = Linear(config.d_model, width)
        self.value = Linear(config.d_model, width)
        self.output = Linear(width, config.d_model)
        self.relative_bias = bias_table(config.dimensions) if config.bias_per_layer else None

    def forward(
        self,
        x_BLD: Tensor,
        shared_bias: Tensor | None,
        buckets_BLM: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] to [B, L, D], and the probabilities if the implementation returns them."""
        q_BHLK, k_BHLK, v_BHLK = (
            rearrange(matrix(x_BLD), "b l (h k) -> b h l k", k=self.config.d_head)
            for matrix in (self.query, self.key, self.value)
        )
        if past_key_values is not None:
            k_BHLK, v_BHLK = past_key_values.update(k_BHLK, v_BHLK, self.layer_idx)
        bias = shared_bias if self.relative_bias is None else position_bias(self.relative_bias, buckets_BLM)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed_BLHK, probs_BHLM = attend(
            self, q_BHLK, k_BHLK, v_BHLK, attention_mask, scaling=1.0, dropout=0.0, position_bias=bias, **kwargs
        )
        return self.output(rearrange(mixed_BLHK, "b l h k -> b l (h k)")), probs_BHLM


class LamdaFeedForward(nn.Module):
    """Gated GELU in its tanh form."""

    def __init__(self, config: LamdaConfig) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff)
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        return self.down(functional.gelu(self.gate(x_BLD), approximate="tanh") * self.up(x_BLD))


class LamdaBlock(GradientCheckpointingLayer):
    """Attention, then the gated feed-forward layer, each on a normed copy of the residual stream."""

    def __init__(self, config: LamdaConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = LamdaAttention(config, layer_idx)
        self.feed_forward_norm = RMSNorm(config.d_model)
        self.feed_forward = LamdaFeedForward(config)

    def forward(self, x_BLD: Tensor, shared_bias: Tensor | None, **kwargs: Any) -> Tensor:
        """The residual stream [B, L, D] after this block. Inputs with gradients are positional, for checkpointing."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), shared_bias, **kwargs)[0]
        return x_BLD + self.feed_forward(self.feed_forward_norm(x_BLD))


class LamdaPreTrainedModel(PreTrainedModel):
    """The settings of both models for transformers."""

    config: LamdaConfig
    config_class = LamdaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LamdaBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _input_embed_layer = "embedding"
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LamdaBlock, "attentions": LamdaAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize weights that no file provides, as `lamda.model.initialization` does."""
        by_kind = draws(self.config.dimensions)
        for name, weight in module.named_parameters(recurse=False):
            kind = getattr(module, "kind", "embedding") if name == "weight" else name
            drawn = by_kind[kind](torch.empty(weight.shape, device="cpu"), torch.default_generator)
            initialization.copy_(weight, drawn)

    def _name_kinds(self) -> None:
        """Store each matrix's kind on its module, for `_init_weights`."""
        for name, module in self.named_modules():
            module.kind = name.rpartition(".")[2]


class LamdaModel(LamdaPreTrainedModel):
    """Tokens to the inputs of the head: hidden states after the final norm, scaled."""

    def __init__(self, config: LamdaConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(LamdaBlock(config, number) for number in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model)
        self.relative_bias = None if config.bias_per_layer else bias_table(config.dimensions)
        self.gradient_checkpointing = False
        self._name_kinds()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The interface of transformers' decoders. attention_mask: [B, M], 0 at padding, or a 4D mask.

        position_ids: without a cache, they separate the documents of a packed row if there is no mask (each document
        restarts them), and give the distances if the mask is 4D. Otherwise cache slots give the distances.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x_BLD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        # With a caller's 4D mask a row may branch: then slots do not give the distances.
        has_branches = attention_mask is not None and attention_mask.ndim == 4 and past_key_values is None
        branches_BL = position_ids if has_branches else None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BLD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        places = _slots(x_BLD, past_key_values) if branches_BL is None else (branches_BL, branches_BL)
        buckets_BLM = _buckets(*places)
        shared_bias = None if self.relative_bias is None else position_bias(self.relative_bias, buckets_BLM)
        cache = {"past_key_values": past_key_values, "use_cache": use_cache}
        for layer in self.layers:
            x_BLD = layer(x_BLD, shared_bias, buckets_BLM=buckets_BLM, attention_mask=mask, **cache, **kwargs)
        # Scaled here and not in the head: fused losses (trl's, Liger's) multiply this by the head's weight.
        x_BLD = self.final_norm(x_BLD) * self.config.d_model**-0.5
        return BaseModelOutputWithPast(last_hidden_state=x_BLD, past_key_values=past_key_values)


def _slots(x_BLD: Tensor, past_key_values: Cache | None) -> tuple[Tensor, Tensor]:
    """The slots [1, L] of the tokens and [1, M] of the keys, from the first in the cache."""
    length, device = x_BLD.shape[1], x_BLD.device
    past, keys = 0, length
    if past_key_values is not None:
        past, (keys, _) = past_key_values.get_seq_length(), past_key_values.get_mask_sizes(length, 0)
    return (past + torch.arange(length, device=device))[None], torch.arange(keys, device=device)[None]


def _buckets(places_BL: Tensor, places_BM: Tensor) -> Tensor:
    """The bucket [B, L, M] of each distance from a key to a query; those of later, masked keys are arbitrary."""
    distances_BLM = places_BL[:, :, None] - places_BM[:, None, :]
    return causal_buckets(MAX_DISTANCE + 1, device=places_BM.device)[distances_BLM.clamp(0, MAX_DISTANCE)]


class LamdaForCausalLM(LamdaPreTrainedModel, GenerationMixin):
    """Tokens to next-token logits. Files hold `LamdaModel`'s names; the head is tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LamdaConfig) -> None:
        super().__init__(config)
        self.model = LamdaModel(config)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The interface of transformers' decoders. labels: the ids themselves, -100 for no loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits_BLV = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BLV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BLV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
