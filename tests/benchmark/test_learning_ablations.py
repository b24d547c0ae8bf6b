"""LaMDA's recipe without some of its parts."""

import pytest
import torch

from benchmarks import learning_ablations
from benchmarks.learning_peers import make_learner
from tests.benchmark.test_learning import CPU, groups, narrow

REGROUPED = {
    "query-rate": "query.weight", "bias-rate": "relative_bias", "norm-rate": "norm.scale",
    "embedding-rate": "embedding.weight", "embedding-decay": "embedding.weight",
}  # fmt: skip
RESTARTED = {"residual-start": ("output.weight", "down.weight"), "bias-start": ("relative_bias",)}


@pytest.mark.parametrize("part", [part for part in learning_ablations.PARTS if part != "muon"])
def test_an_ablation_takes_away_its_part_and_nothing_else(part):
    whole = narrow("--train.optimizer", "muon", "--train.lr", "4e-3")
    full, ablated = of_lamda(whole, []), of_lamda(whole, [part])
    weights = dict(full.module.named_parameters())
    other = dict(ablated.module.named_parameters())
    restarted = {name for name in weights if not torch.equal(weights[name], other[name])}
    assert restarted == {name for name in weights if name.endswith(RESTARTED.get(part, ()))}
    before, after = grouped(full), grouped(ablated)
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if part in REGROUPED and name.endswith(REGROUPED[part])
    }
    key, value = {"beta2": ("beta2", 0.95), "z-loss": ("z_loss", 0.0)}.get(part, ("lr", 4e-3))
    assert getattr(ablated.recipe.train, key) == value


def of_lamda(config, removed):
    config = learning_ablations.configured(config, removed)
    learner = make_learner("lamda", config, rate=config.train.lr, device=CPU.device)
    learning_ablations.undo(learner.module, learner.optimizers[0], config, removed)
    return learner


def grouped(learner):
    """The multiplier and the decay of each weight's group."""
    names = {parameter: name for name, parameter in learner.module.named_parameters()}
    return {
        names[parameter]: (group["lr_multiplier"], group["weight_decay"])
        for group in groups(learner)
        for parameter in group["params"]
    }


def test_without_any_part_a_query_learns_at_the_rate_of_a_matrix_and_the_embedding_decays():
    learner = of_lamda(narrow("--train.optimizer", "muon"), list(learning_ablations.PARTS))
    assert isinstance(learner.optimizers[0], torch.optim.AdamW)
    of = {name.removeprefix("layers.0."): group for name, group in grouped(learner).items()}
    assert of["attention.query.weight"] == pytest.approx(of["attention.key.weight"])
    assert of["attention.key.weight"] == (1.0, 0.1)
    assert of["embedding.weight"] == (25.0, 0.1)
    down = learner.module.get_parameter("layers.1.feed_forward.down.weight")
    assert down.std().item() == pytest.approx(96**-0.5, rel=0.05)


def test_ablations_are_labelled_by_what_is_kept_or_taken():
    parts = list(learning_ablations.PARTS)
    assert learning_ablations.label(parts) == "none of the parts"
    assert learning_ablations.label(parts[1:]) == "only muon"
    assert learning_ablations.label(["z-loss", "query-rate"]) == "without query-rate, z-loss"
