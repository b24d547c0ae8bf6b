"""Cached sampling against full forward passes."""

from __future__ import annotations

import pytest
import torch

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.inference.generation import generate, new_cache
from lamda.model import LaMDA
from lamda.model.initialisation import initialise


@pytest.fixture(params=[True, False], ids=["bias-per-layer", "bias-shared"])
def model(request: pytest.FixtureRequest) -> LaMDA:
    config = ModelConfig(
        vocab_size=53, d_model=22, n_layers=3, n_heads=3, d_head=7, d_ff=31, bias_per_layer=request.param
    )
    model = LaMDA(config).double()
    initialise(model, seed=7)
    model.load_weights({name: 2 * weight for name, weight in model.export_weights().items()})
    return model


@pytest.fixture
def prompt_BL() -> torch.Tensor:
    return torch.randint(53, (3, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_cached_logits_equal_a_full_forward_pass(model):
    tokens_BL = torch.randint(53, (2, 130), generator=torch.Generator().manual_seed(0))
    cache = new_cache(model, rows=2, capacity=130)
    parts = [model(part, cache=cache) for part in tokens_BL.split([100, 1, 7, 1, 21], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens_BL), rtol=0, atol=1e-9)


@torch.no_grad()
def test_greedy_tokens_equal_those_without_a_cache(model, prompt_BL):
    tokens_BL = prompt_BL
    for _ in range(12):
        tokens_BL = torch.cat([tokens_BL, model(tokens_BL)[:, -1:].argmax(dim=-1)], dim=1)
    expected = tokens_BL[:, 9:].tolist()
    assert len({*expected[0]}) > 1
    assert generate(model, prompt_BL, max_new_tokens=12, temperature=0) == expected
    assert generate(model, prompt_BL, max_new_tokens=12, top_k=1) == expected


def test_the_seed_decides_the_sample(model, prompt_BL):
    first, again, other = (generate(model, prompt_BL, max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_row_ends_before_its_stop_id_and_the_others_go_on(model, prompt_BL):
    free = generate(model, prompt_BL, max_new_tokens=12, seed=1)
    stop = free[0][4]
    assert stop not in free[0][:4]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert len({len(ids) for ids in expected}) > 1
    assert generate(model, prompt_BL, max_new_tokens=12, seed=1, stop_ids=[stop]) == expected


@torch.no_grad()
def test_samples_follow_the_top_k_distribution_at_its_temperature(model, prompt_BL):
    rows = prompt_BL[:1].expand(4000, -1)
    sampled = torch.tensor(generate(model, rows, max_new_tokens=1, temperature=0.7, top_k=4)).flatten()
    best = (model(prompt_BL[:1])[0, -1] / 0.7).topk(4)
    expected = torch.zeros(53, dtype=torch.float64).scatter(0, best.indices, best.values.softmax(-1))
    found = torch.bincount(sampled, minlength=53) / 4000
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_impossible_settings_are_told_all_at_once(model):
    with pytest.raises(UserError) as error:
        generate(model, torch.zeros(1, 0, dtype=torch.long), max_new_tokens=0, temperature=-1.0, top_k=0)
    for name in ("prompt", "max_new_tokens", "temperature", "top_k"):
        assert name in str(error.value)
