"""Weights pass between the frameworks through one file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.engines.flax.weights import load_weights, plain_weights, save_weights
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights

CONFIG = ModelConfig(vocab_size=53, d_model=22, n_layers=3, n_heads=3, d_head=7, d_ff=31)


@pytest.mark.parametrize("bias_per_layer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_comes_back_from_jax_to_the_last_byte(tmp_path, dtype, bias_per_layer):
    config = CONFIG.model_copy(update={"bias_per_layer": bias_per_layer})
    model = LaMDA(config)
    initialize_weights(model, seed=5)
    save_file(model.to(dtype).export_weights(), tmp_path / "torch.safetensors", metadata={"format": "pt"})

    weights = load_weights(tmp_path / "torch.safetensors", config)
    save_weights(dict(plain_weights(weights)), tmp_path / "jax.safetensors")
    assert (tmp_path / "jax.safetensors").read_bytes() == (tmp_path / "torch.safetensors").read_bytes()

    again = LaMDA(config).to(dtype)
    again.load_weights(load_file(tmp_path / "jax.safetensors"))
    save_file(again.export_weights(), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "torch.safetensors").read_bytes()


def test_a_file_of_another_model_is_refused_by_name(tmp_path):
    save_file({"final_norm.scale": torch.ones(21)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"final_norm.scale is \[21\], not \[22\]") as refusal:
        load_weights(tmp_path / "model.safetensors", CONFIG)
    assert "embedding.weight" in str(refusal.value)
