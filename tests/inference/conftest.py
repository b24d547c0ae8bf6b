"""A small model whose continuations are not all alike."""

from __future__ import annotations

import pytest
import torch

from lamda.config import ModelConfig
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights


def make_model(*, bias_per_layer: bool = True, dtype: torch.dtype = torch.float64, vocab_size: int = 53) -> LaMDA:
    """Three layers of prime-ish sizes, the weights doubled, so that the logits differ widely."""
    config = ModelConfig(
        vocab_size=vocab_size, d_model=22, n_layers=3, n_heads=3, d_head=7, d_ff=31, bias_per_layer=bias_per_layer
    )
    model = LaMDA(config).to(dtype)
    initialize_weights(model, seed=7)
    model.load_weights({name: 2 * weight for name, weight in model.export_weights().items()})
    return model.requires_grad_(False)


@pytest.fixture(params=[True, False], ids=["bias-per-layer", "bias-shared"])
def model(request: pytest.FixtureRequest) -> LaMDA:
    """`make_model` in float64."""
    return make_model(bias_per_layer=request.param)


@pytest.fixture
def prompts() -> list[list[int]]:
    """Three prompts, one longer than a chunk."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(53, (length,), generator=generator).tolist() for length in (9, 1, 300)]
