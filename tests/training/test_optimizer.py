"""One rate and one decay mean the same for every matrix, whichever optimizer moves it."""

import pytest
import torch

from benchmarks.coordinates import check
from lamda.config import ModelConfig
from lamda.config.schema import TrainConfig
from lamda.engines.deepspeed.optimizer import make_optimizer, set_learning_rate, without_compile
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights

SHAPE = {"vocab_size": 97, "d_model": 48, "n_layers": 1, "n_heads": 2, "d_head": 16, "d_ff": 224}


SCALES = {"embedding_lr_scale": 10, "norm_lr_scale": 3, "bias_lr_scale": 7}


def scale_of(name):
    """The rate of a weight / the run's, by the keys of the configuration; a query's by 1 / sqrt(K)."""
    kinds = {"embedding.weight": 10, "scale": 3, "relative_bias": 7, "query.weight": 0.25}
    return next((scale for kind, scale in kinds.items() if name.endswith(kind)), 1)


def moved(optimizer, *, weight_decay, gradient, base_width=None):
    """How far one step at a rate of 0.01 moves each weight, by name; gradients are `gradient` times random ones."""
    model = LaMDA(ModelConfig(**SHAPE))
    initialize_weights(model, seed=0)
    train = TrainConfig(steps=1, optimizer=optimizer, weight_decay=weight_decay, base_width=base_width, **SCALES)
    before = {name: weight.clone() for name, weight in model.export_weights().items()}
    made = make_optimizer(model, train)
    set_learning_rate(made, 0.01)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = gradient * torch.randn(parameter.shape, generator=draw)
    with without_compile(train):
        made.step()
    return {name: (weight - before[name], before[name]) for name, weight in model.export_weights().items()}


def is_matrix(name):
    return name.startswith("layers.") and name.endswith(".weight")


def test_muon_moves_every_matrix_by_the_rms_of_adamw():
    """0.2 of the rate, wide, tall and square; the rest is AdamW's own first step, the weight's rate."""
    for name, (way, _) in moved("muon", weight_decay=0, gradient=1e-3).items():
        wanted = scale_of(name) * (0.2 if is_matrix(name) else 1)
        assert way.square().mean().sqrt() == pytest.approx(0.01 * wanted, rel=0.2 if is_matrix(name) else 1e-2), name


@pytest.mark.parametrize("base_width", [None, 6])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_decay_is_in_units_of_the_rate_alone(optimizer, base_width):
    for name, (way, before) in moved(optimizer, weight_decay=0.5, gradient=0.0, base_width=base_width).items():
        torch.testing.assert_close(way, -0.01 * 0.5 * is_matrix(name) * before, rtol=0, atol=1e-7)


def test_adamw_moves_each_part_at_its_own_rate():
    for name, (way, _) in moved("adamw", weight_decay=0, gradient=1e-3).items():
        assert way.square().mean().sqrt() == pytest.approx(0.01 * scale_of(name), rel=1e-2), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_a_step_changes_hidden_states_alike_at_every_width(optimizer):
    """The coordinate check; `as_given` is what it looks like without `base_width`."""
    hidden, widths = ("attention", "feed-forward", "stream"), (64, 128, 256)
    found = check(optimizer, lr=4e-3, steps=4, base_width=64, widths=widths)
    assert all(abs(found[name]["exponent"]) < (0.13 if optimizer == "muon" else 0.06) for name in hidden), found
    if optimizer == "adamw":
        as_given = check(optimizer, lr=4e-3, steps=4, base_width=None, widths=widths)
        assert all(as_given[name]["exponent"] > 0.2 for name in hidden), as_given


def test_at_the_base_width_nothing_changes():
    def weights(base_width):
        steps = moved("adamw", weight_decay=0.1, gradient=1e-3, base_width=base_width)
        return {name: before + way for name, (way, before) in steps.items()}

    as_given, tuned_here = weights(None), weights(SHAPE["d_model"])
    assert all(torch.equal(tuned_here[name], weight) for name, weight in as_given.items())


@pytest.mark.parametrize("gradient", [1e-3, 1e-6, 1e-8, 1e-9])
def test_adafactor_moves_a_weight_alike_however_small_its_gradients_are(gradient):
    moves = moved("adafactor", weight_decay=0, gradient=gradient)
    for name, (way, _) in moved("adafactor", weight_decay=0, gradient=1.0).items():
        torch.testing.assert_close(moves[name][0], way, rtol=1e-2, atol=1e-7, msg=name)


def test_adafactor_leaves_a_weight_without_a_gradient_where_it_is():
    assert not any(way.any() for way, _ in moved("adafactor", weight_decay=0, gradient=0.0).values())
