"""AUC by ranks is the count of pairs; accuracy and calibration are what they say; evaluation scores what it names."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamda.config import ModelConfig
from lamda.data.card import Source
from lamda.data.held_out import HeldOut
from lamda.dialog.evaluation import HeldOutDialogues
from lamda.dialog.examples import Conversations
from lamda.dialog.ratings import accuracy, auc, auc_interval, calibration_error
from lamda.dialog.report import table
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights
from lamda.training.evaluation import TorchScorer
from tests.dialog.test_examples import talk

PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.5001, 1.0]), st.booleans()), min_size=1, max_size=40)


@given(PAIRS)
def test_auc_is_the_share_of_pairs_in_order(pairs):
    scores, positive = (np.array(part) for part in zip(*pairs, strict=True))
    one, other = scores[positive], scores[~positive]
    if not len(one) or not len(other):
        assert math.isnan(auc(scores, positive))
        return
    counted = [(a > b) + 0.5 * (a == b) for a in one for b in other]
    assert auc(scores, positive) == pytest.approx(np.mean(counted), abs=1e-12)


def test_an_interval_covers_its_auc_and_clusters_widen_it():
    draw = np.random.default_rng(0)
    truth = np.repeat(draw.random(40) < 0.5, 10)
    scores = truth + np.repeat(draw.normal(size=40), 10)
    low, high = auc_interval(scores, truth, np.repeat(np.arange(40), 10))
    alone = auc_interval(scores, truth, np.arange(400))
    assert low < auc(scores, truth) < high
    assert high - low > 2 * (alone[1] - alone[0])
    assert all(map(math.isnan, auc_interval(scores[:10], truth[:10], np.arange(10))))


def test_one_conversation_says_nothing_of_others():
    scores, truth = np.array([0.1, 0.9]), np.array([False, True])
    assert all(map(math.isnan, auc_interval(scores, truth, np.zeros(2, dtype=np.int64))))


def test_accuracy_and_calibration_by_hand():
    probabilities, positive = np.array([0.95, 0.92, 0.31, 0.39, 1.0]), np.array([True, False, False, True, True])
    assert accuracy(probabilities, positive) == pytest.approx(3 / 5)
    expected = (abs(2.87 - 2) + abs(0.70 - 1)) / 5
    assert calibration_error(probabilities, positive) == pytest.approx(expected)
    assert math.isnan(calibration_error(np.append(probabilities, np.nan), np.append(positive, True)))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("held-out") / "talk.jsonl"
    path.write_text("".join(json.dumps(talk(seed)) + "\n" for seed in range(12)))
    form = Conversations(row_length=65, seed=0, generative=1, discriminative=1)
    return HeldOutDialogues(HeldOut((Source(name="s", license="none", files=str(path)),), tokenizer, 64, form))


@pytest.fixture(scope="module")
def model(tokenizer):
    config = {"d_model": 24, "n_layers": 2, "n_heads": 3, "d_head": 8, "d_ff": 40}
    model = LaMDA(ModelConfig(vocab_size=tokenizer.vocab_size, **config))
    initialize_weights(model, seed=1)
    return model.eval().requires_grad_(requires_grad=False)


def test_held_out_scores_are_those_of_a_walk_over_all_examples(held_out, model, tokenizer):
    zero, one = tokenizer.encode("01")
    nats, targets, found = 0.0, 0, {}
    for item in held_out.examples:
        logits = model(torch.tensor([item.example.ids]))[0].double().log_softmax(-1)
        places = [place for place, scored in enumerate(item.example.loss_mask) if scored]
        if item.source.kind in ("generative", "research"):
            nats -= sum(logits[place - 1, item.example.ids[place]].item() for place in places)
            targets += len(places)
        else:
            (place,) = places
            odds = (logits[place - 1, one] - logits[place - 1, zero]).item()
            found.setdefault(item.source.kind, []).append((1 / (1 + math.exp(-odds)), item.source.rating))
    scores = held_out.score(TorchScorer(model), device=torch.device("cpu"), micro_batch=5)
    assert scores.targets == targets
    assert scores.loss() == pytest.approx(nats / targets, rel=1e-5)
    for name, pairs in found.items():
        own = scores.ratings[name]
        assert own.probabilities == pytest.approx([probability for probability, _ in pairs], rel=1e-4)
        assert own.positive.tolist() == [rating for _, rating in pairs]
    message = "\n".join(table(scores.report()))
    assert f"{scores.metrics()['eval/auc/unsafe']:.3f}" in message
    assert f"perplexity {scores.metrics()['eval/perplexity']:.2f}" in message


def test_ranks_together_find_what_one_finds(held_out, model):
    alone = held_out.score(TorchScorer(model), device=torch.device("cpu"), micro_batch=4, rows=26)
    parts: list[np.ndarray] = []

    def gathered(found):
        parts.append(found)
        return sum(parts)

    how = {"device": torch.device("cpu"), "micro_batch": 4, "rows": 26, "world_size": 3, "total": gathered}
    together = [held_out.score(TorchScorer(model), rank=rank, **how) for rank in range(3)][-1]
    assert together.metrics() == pytest.approx(alone.metrics(), rel=1e-6, nan_ok=True)
