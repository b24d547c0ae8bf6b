"""Counts by arithmetic against the paper's shapes and PyTorch's own counting."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lamda.config import ModelConfig
from lamda.engines.deepspeed import lora
from lamda.model import LaMDA
from lamda.model.counts import adapter_parameters, flops_per_token, parameters, parameters_by_part
from tests.losses import cross_entropy


@pytest.mark.parametrize(("preset", "count"), [("2b", 2_179_138_560), ("8b", 8_721_174_528), ("137b", 137_702_416_384)])
def test_parameters_are_exactly_those_of_the_published_shape(preset, count):
    config = ModelConfig(preset=preset)
    with torch.device("meta"):
        model = LaMDA(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert parameters(config) == count


def test_a_shared_bias_is_counted_once():
    by_part = parameters_by_part(ModelConfig(preset="2b", bias_per_layer=False))
    assert by_part["relative_bias"] == 32 * 40
    assert sum(by_part.values()) == 2_179_138_560 - 9 * 32 * 40


def test_flops_equal_pytorchs_count_with_causal_attention_halved(model):
    model.config = model.config.model_copy(update={"attention": "math"})  # whose products PyTorch sees

    def counted(length: int) -> int:
        with FlopCounterMode(display=False) as counter:
            nats, _ = cross_entropy(
                model(torch.zeros(1, length, dtype=torch.long)), torch.zeros(1, length, dtype=torch.long)
            )
            nats.backward()
        return counter.get_total_flops()

    # A row costs a L + b L^2: matrices and full attention.
    b = (counted(20) / 20 - counted(10) / 10) / 10
    a = counted(10) / 10 - 10 * b
    assert flops_per_token(model.config, 24) == pytest.approx(a + b * 24 / 2, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 8])
def test_flops_with_adapters_equal_pytorchs_count_of_products(rank):
    """Frozen matrices have no gradient; what the first block's queries, keys and values are made of has none either."""
    sizes = {"vocab_size": 97, "d_model": 32, "n_layers": 3, "n_heads": 2, "d_head": 8, "d_ff": 48}
    length, config = 16, ModelConfig(**sizes, attention="math")
    model = LaMDA(config)
    lora.adapt(model, rank=rank)
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter_parameters(config, lora_rank=rank) == adapters
    with FlopCounterMode(display=False) as counter:
        nats, _ = cross_entropy(
            model(torch.zeros(1, length, dtype=torch.long)), torch.zeros(1, length, dtype=torch.long)
        )
        nats.backward()
    half_of_attention = 6 * config.n_layers * length * config.n_heads * config.d_head
    counted = counter.get_total_flops() / length - half_of_attention
    not_needed = 2 * 32 * 3 * (2 * 8 + rank)
    assert flops_per_token(config, length, lora_rank=rank) - not_needed == pytest.approx(counted, rel=1e-9)


def test_counting_imports_no_torch():
    code = "import sys, lamda.model.counts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
