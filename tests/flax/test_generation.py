"""Generation with a cache in JAX."""

from __future__ import annotations

import pytest

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.engines.flax.generation import generate
from lamda.engines.flax.weights import make_weights
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from tests.generation import generate as expected

PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(2, 50)) * 3]


@pytest.mark.parametrize("bias_per_layer", [True, False])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=12, temperature=0),
        Sampling(max_new_tokens=12, temperature=0.9, top_k=10, seed=4, stop_ids=frozenset(range(20))),
    ],
    ids=["greedy", "drawn"],
)
def test_the_tokens_are_those_of_the_pytorch_model(sampling, bias_per_layer):
    config = ModelConfig(
        vocab_size=53, d_model=22, n_layers=3, n_heads=3, d_head=7, d_ff=31, bias_per_layer=bias_per_layer
    )
    model = LaMDA(config)
    initialize_weights(model, seed=7)
    plain = model.export_weights()
    weights = make_weights(config, lambda name, index: plain[name].numpy()[index], dtype="float32")
    new = generate(config, weights, PROMPTS, sampling)
    assert new == expected(model, PROMPTS, sampling)
    assert any(new)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="empty"):
        generate(ModelConfig(), {}, [[1], []], Sampling())
