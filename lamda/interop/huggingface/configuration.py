"""LaMDA's dimensions as a configuration of transformers (config.json)."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from lamda.config import ModelConfig


@strict
class LamdaConfig(PreTrainedConfig):
    """The decoder's dimensions under this project's names; transformers' usual names are aliases.

    max_position_embeddings: L, targets per row in training. It is not a limit: all distances from 113 on share
    a bucket of the relative bias. is_dialogue_model: whether it was fine-tuned on conversations, so that `lamda chat`
    lets it rate its candidates.
    """

    model_type = "lamda"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 - transformers' own attribute
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "head_dim": "d_head",
        "intermediate_size": "d_ff",
    }

    vocab_size: int = 32000
    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 6
    d_head: int = 64
    d_ff: int = 1536
    bias_per_layer: bool = True
    max_position_embeddings: int = 1024
    is_dialogue_model: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 1
    tie_word_embeddings: bool = True

    @property
    def dimensions(self) -> ModelConfig:
        """The same as this project's configuration. Raises pydantic's ValidationError for invalid dimensions."""
        return ModelConfig(**{name: getattr(self, name) for name in ModelConfig().dimensions})
