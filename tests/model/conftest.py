"""Small models and the golden cases."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lamda.config import ModelConfig
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from tests.conftest import INTERPRETED

GOLDEN = Path(__file__).parent.parent / "golden"

needs_kernels = pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need the package triton")


@pytest.fixture(autouse=True)
def interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, kernels run in Triton's interpreter."""
    for name, value in INTERPRETED.items():
        monkeypatch.setenv(name, value)


@dataclass(frozen=True)
class GoldenCase:
    config: ModelConfig
    tensors: dict[str, torch.Tensor]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


@pytest.fixture(params=["bias-per-layer", "bias-shared", "documents"])
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    with safe_open(GOLDEN / f"{request.param}.safetensors", "pt") as file:
        config = ModelConfig(**json.loads(file.metadata()["config"]))
        return GoldenCase(config, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


@pytest.fixture(params=[True, False], ids=["bias-per-layer", "bias-shared"])
def model(request: pytest.FixtureRequest) -> LaMDA:
    """An initialized model of prime-ish sizes, in float64."""
    config = ModelConfig(
        vocab_size=53, d_model=22, n_layers=3, n_heads=3, d_head=7, d_ff=31, bias_per_layer=request.param
    )
    model = LaMDA(config).double()
    initialize_weights(model, seed=7)
    return model
