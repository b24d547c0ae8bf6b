"""The weights before training."""

from __future__ import annotations

from math import exp, log, pi, sqrt, tanh

import pytest
import torch

from lamda.config import ModelConfig
from lamda.model import LaMDA
from lamda.model.attention.bias import causal_buckets
from lamda.model.initialization import generator, initial_weights, initialize_weights
from tests.losses import cross_entropy


def initialized(*, seed: int = 0, dtype: torch.dtype = torch.float32, **dimensions: int) -> LaMDA:
    model = LaMDA(ModelConfig(**dimensions)).to(dtype)
    initialize_weights(model, seed=seed)
    return model


FIXED = ("scale", "relative_bias")
SMALL = {"vocab_size": 11, "d_model": 6, "n_layers": 2, "n_heads": 2, "d_head": 3, "d_ff": 5}


def test_weights_depend_on_the_seed_and_the_plain_name_alone():
    torch.manual_seed(0)
    first = initialized(**SMALL).export_weights()
    torch.manual_seed(1)
    torch.testing.assert_close(initialized(**SMALL).export_weights(), first, rtol=0, atol=0)
    deeper = initialized(**{**SMALL, "n_layers": 8}).export_weights()
    halved = ("output.weight", "down.weight")  # 1 / sqrt(2N), four times the layers
    torch.testing.assert_close(
        {name: deeper[name] * (2 if name.endswith(halved) else 1) for name in first}, first, rtol=1e-6, atol=0
    )
    drawn = {name: weight for name, weight in deeper.items() if not name.endswith(FIXED)}
    assert len({tuple(weight.flatten()[:4].tolist()) for weight in drawn.values()}) == len(drawn)
    other = initialized(**SMALL, seed=1).export_weights()
    assert all((other[name] != first[name]).any() == (not name.endswith(FIXED)) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_get_the_same_weights_rounded(dtype):
    exact = initialized(**SMALL).export_weights()
    found = initialized(**SMALL, dtype=dtype).export_weights()
    torch.testing.assert_close(found, {name: weight.to(dtype) for name, weight in exact.items()}, rtol=0, atol=0)


def test_weights_have_the_published_scales():
    D, H, K, F = 96, 6, 40, 150
    weights = initialized(vocab_size=500, d_model=D, n_layers=1, n_heads=H, d_head=K, d_ff=F).export_weights()
    expected = {
        "embedding.weight": 0.5,
        "layers.0.attention.query.weight": (D * K) ** -0.5,
        "layers.0.attention.key.weight": D**-0.5,
        "layers.0.attention.value.weight": D**-0.5,
        "layers.0.attention.output.weight": (2 * H * K) ** -0.5,
        "layers.0.feed_forward.gate.weight": D**-0.5,
        "layers.0.feed_forward.up.weight": D**-0.5,
        "layers.0.feed_forward.down.weight": (2 * F) ** -0.5,
    }
    fixed = {name for name in weights if name.endswith(FIXED)}
    assert set(weights) - fixed == set(expected)
    assert all((weights[name] == 1).all() for name in fixed if name.endswith("scale"))
    for name, std in expected.items():
        drawn = weights[name]
        assert drawn.std().item() == pytest.approx(std, rel=5 / sqrt(2 * drawn.numel())), name
        assert abs(drawn.mean().item()) < 5 * std / sqrt(drawn.numel()), name
    for part in ("gate", "up", "down"):
        drawn = weights[f"layers.0.feed_forward.{part}.weight"]
        assert drawn.abs().max() <= sqrt(3) * drawn.std() * 1.05, "uniform: nothing beyond sqrt(3) deviations"


def test_bias_tables_begin_as_alibis_slopes():
    """As far as buckets hold one distance each; beyond, a bucket has the bias of its nearest distance."""
    table_RH = initialized(**{**SMALL, "n_heads": 8}).layers[1].attention.relative_bias
    distances = torch.arange(16)[:, None]
    torch.testing.assert_close(table_RH[:16].detach(), -distances * 0.5 ** torch.arange(1, 9))
    bias_HN = table_RH[causal_buckets(500)].T.detach()
    assert (bias_HN.diff() <= 0).all(), "it never rises with the distance"
    assert (bias_HN[:, -1] == -113 * 0.5 ** torch.arange(1, 9)).all()


@pytest.mark.parametrize(
    ("base_width", "dimensions"),
    [
        (None, {"preset": "tiny"}),
        (192, {"vocab_size": 8000, "d_model": 1024, "n_layers": 6, "n_heads": 2, "d_head": 64, "d_ff": 1024}),
    ],
    ids=["tiny", "wide"],
)
@torch.no_grad()
def test_the_first_loss_is_near_that_of_guessing(base_width, dimensions):
    model = LaMDA(ModelConfig(**dimensions))
    initialize_weights(model, seed=0, base_width=base_width)
    tokens_BL = torch.randint(model.config.vocab_size, (2, 129), generator=torch.Generator().manual_seed(0))
    nats, _ = cross_entropy(model(tokens_BL[:, :-1]), tokens_BL[:, 1:])
    assert nats.item() / 256 == pytest.approx(log(model.config.vocab_size), rel=0.03)


@torch.no_grad()
def test_every_layer_adds_the_scale_that_theory_gives():
    """A gate and an up of unit variance give E[gelu(z)^2] through `down`, attention at most 1; over 2N of each."""
    model = initialized(vocab_size=500, d_model=256, n_layers=24, n_heads=8, d_head=32, d_ff=512)
    attention, feed_forward = [], []
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda _, __, out: attention.append(out.square().mean().item()))
        layer.feed_forward.register_forward_hook(lambda _, __, out: feed_forward.append(out.square().mean().item()))
    model(torch.randint(500, (2, 64), generator=torch.Generator().manual_seed(0)))

    def gelu(z: float) -> float:
        return z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z**3)))

    grid = [i / 100 for i in range(-800, 801)]
    expected = sum(gelu(z) ** 2 * exp(-z * z / 2) / sqrt(2 * pi) / 100 for z in grid)
    assert all(48 * power == pytest.approx(expected, rel=0.2) for power in feed_forward)
    assert all(0.01 < 48 * power < 1 for power in attention)


def test_logits_fall_with_the_width_from_the_base_on():
    """Times 1/D instead of 1/sqrt(D), by the final norm alone."""
    model = LaMDA(ModelConfig(vocab_size=97, d_model=96, n_layers=1, n_heads=2, d_head=8, d_ff=40))
    initialize_weights(model, seed=7)
    before = {name: weight.clone() for name, weight in model.export_weights().items()}
    initialize_weights(model, seed=7, base_width=24)
    for name, weight in model.export_weights().items():
        torch.testing.assert_close(weight, before[name] * (0.5 if name == "final_norm.scale" else 1), rtol=0, atol=0)


@pytest.mark.parametrize("base_width", [None, 3])
@pytest.mark.parametrize("bias_per_layer", [False, True])
def test_the_drawn_weights_are_those_of_an_initialized_module(bias_per_layer, base_width):
    config = ModelConfig(**SMALL, bias_per_layer=bias_per_layer)
    model = LaMDA(config)
    initialize_weights(model, seed=5, base_width=base_width)
    drawn = {name: each.draw() for name, each in initial_weights(config, seed=5, base_width=base_width).items()}
    assert drawn.keys() == model.export_weights().keys()
    torch.testing.assert_close(drawn, dict(model.export_weights()), rtol=0, atol=0)
    query = generator(5, "layers.1.attention.query.weight")
    expected = torch.empty(6, 6).normal_(0.0, 18**-0.5, generator=query)
    torch.testing.assert_close(drawn["layers.1.attention.query.weight"], expected, rtol=0, atol=0)
    assert (drawn["final_norm.scale"] == (1 if base_width is None else 0.5**0.5)).all()
