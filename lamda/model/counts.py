"""Parameters and FLOPs by arithmetic, without torch. Dimensions: legend in `lamda/model/decoder.py`."""

from __future__ import annotations

from lamda.config import ModelConfig
from lamda.model.weights import BUCKETS


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Parameters of the embedding, the attention and feed-forward matrices, the bias tables and the norms."""
    D, layers = config.d_model, config.n_layers
    tables = layers if config.bias_per_layer else 1
    return {
        "embedding": config.vocab_size * D,
        "attention": layers * 4 * D * config.n_heads * config.d_head,
        "feed_forward": layers * 3 * D * config.d_ff,
        "relative_bias": tables * BUCKETS * config.n_heads,
        "norms": (2 * layers + 1) * D,
    }


def parameters(config: ModelConfig) -> int:
    """All parameters; the embedding, which is also the output projection, once."""
    return sum(parameters_by_part(config).values())


def flops_per_token(config: ModelConfig, sequence_length: int, *, lora_rank: int = 0) -> int:
    """FLOPs of a training step for each target, forward and backward, in rows of L = sequence_length.

    6 x (matrices, the embedding once as output projection) + 3 x layers x 4 L H K / 2: a
    multiply-add is 2, the backward pass twice the forward, and causal attention counts half.
    Norms, softmax, bias and recomputation count nothing. With adapters of `lora_rank` a matrix is frozen and has no
    gradient of its own, so it counts 4; the adapters count 6.
    """
    part = parameters_by_part(config)
    matrices = part["embedding"] + part["attention"] + part["feed_forward"]
    attention = 6 * config.n_layers * sequence_length * config.n_heads * config.d_head
    if lora_rank:
        return 4 * matrices + 6 * adapter_parameters(config, lora_rank=lora_rank) + attention
    return 6 * matrices + attention


def adapter_parameters(config: ModelConfig, *, lora_rank: int) -> int:
    """Parameters of the adapters beside the blocks' matrices (`lamda.engines.deepspeed.lora`)."""
    D, F, HK = config.d_model, config.d_ff, config.n_heads * config.d_head
    return config.n_layers * lora_rank * (4 * (D + HK) + 3 * (D + F))
