"""Parameter counts, FLOPs and the peak FLOP/s of devices, without torch.

Dimensions: legend in `lamda/model/decoder.py`.
"""

from __future__ import annotations

from lamda.config import ModelConfig
from lamda.model.weights import BUCKETS

PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "A100": 312e12,
    "GB200": 2500e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
}  # fmt: skip
"""Dense bf16 peak in FLOP/s from data sheets, by a part of the device name; the first match counts."""

OTHER_CHIPS = ("Laptop", "MIG", "RTX 4090 D", "TPU v4 lite")  # slower chips, or slices, that match above


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Parameters of the embedding, attention and feed-forward matrices, bias tables and norms."""
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
    """All parameters; the tied embedding counts once."""
    return sum(parameters_by_part(config).values())


def flops_per_token(config: ModelConfig, sequence_length: int, *, lora_rank: int = 0) -> int:
    """FLOPs of a training step per target token, forward and backward, in rows of L = sequence_length.

    6 x (matrices, with the embedding once, as output projection) + 3 x layers x 4 L H K / 2: a multiply-add is 2 FLOPs,
    the backward pass costs twice the forward, and causal attention counts half. Norms, softmax, bias and recomputation
    are not counted. With LoRA of `lora_rank` the matrices are frozen and have no gradient, so they count 4 instead of
    6; the adapters count 6.
    """
    part = parameters_by_part(config)
    matrices = part["embedding"] + part["attention"] + part["feed_forward"]
    attention = 6 * config.n_layers * sequence_length * config.n_heads * config.d_head
    if lora_rank:
        return 4 * matrices + 6 * adapter_parameters(config, lora_rank=lora_rank) + attention
    return 6 * matrices + attention


def adapter_parameters(config: ModelConfig, *, lora_rank: int) -> int:
    """Parameters of the LoRA adapters (`lamda.engines.deepspeed.lora`)."""
    D, F, HK = config.d_model, config.d_ff, config.n_heads * config.d_head
    return config.n_layers * lora_rank * (4 * (D + HK) + 3 * (D + F))


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None if unknown, and then no MFU is reported."""
    if any(name in device_name for name in OTHER_CHIPS):
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
