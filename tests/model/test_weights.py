"""Weights by name."""

from __future__ import annotations

import pytest
import torch

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.model import LaMDA
from lamda.model.weights import weight_shapes


def test_shapes_are_those_of_the_module_in_its_order(model):
    found = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert sorted(weight_shapes(model.config).items()) == sorted(found)


def test_weights_survive_export_and_load(model):
    copy = LaMDA(model.config).double()
    copy.load_weights(model.export_weights())
    torch.testing.assert_close(copy.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_every_wrong_weight_is_named_and_nothing_is_changed(model):
    before = {name: tensor.clone() for name, tensor in model.export_weights().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    del weights["layers.1.attention.key.weight"], weights["final_norm.scale"]
    weights["layers.0.attention.query_key_value.weight"] = torch.zeros(63, 22)
    weights["layers.2.feed_forward.up.weight"] = torch.zeros(22, 31)
    with pytest.raises(UserError) as error:
        model.load_weights(weights)
    message = str(error.value)
    assert "2 missing: layers.1.attention.key.weight, final_norm.scale" in message
    assert "1 unexpected: layers.0.attention.query_key_value.weight" in message
    assert "1 of another shape: layers.2.feed_forward.up.weight is [22, 31], not [31, 22]" in message
    torch.testing.assert_close(model.export_weights(), before, rtol=0, atol=0)


def test_a_long_list_of_wrong_weights_is_cut_with_its_number():
    model = LaMDA(ModelConfig(vocab_size=5, d_model=2, n_layers=2, n_heads=1, d_head=2, d_ff=2))
    with pytest.raises(UserError, match=r"22 missing: .* and 14 more"):
        model.load_weights({})


def test_a_model_without_weights_gives_no_number():
    model = LaMDA(ModelConfig(vocab_size=5, d_model=2, n_layers=1, n_heads=1, d_head=2, d_ff=2))
    assert model(torch.tensor([[1, 2]])).isnan().all()
    assert all(parameter.isnan().all() for parameter in model.parameters())
