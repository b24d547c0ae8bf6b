"""Draws against the distributions that a plain reference works out token by token."""

from __future__ import annotations

import sys
from math import exp, inf, nan

import pytest
import torch

from lamda.config.errors import UserError
from lamda.inference.generation import prefill, sample
from lamda.inference.sampling import PENALTIES, TEMPERATURES, NotFiniteError, Sampler, Sampling

DRAWS = 4000
LOGITS = [2.0, 1.5, 1.4, 0.3, -0.2, -1.0, -3.0]
PROMPT = [1, 3, 5]


def reference(logits, sampling, seen=()):
    """Probability of each id, as the definitions say it."""
    logits = list(logits)
    for id in {*seen} - sampling.stop_ids:
        logits[id] = (
            logits[id] / sampling.repetition_penalty if logits[id] > 0 else logits[id] * sampling.repetition_penalty
        )
    order = sorted(range(len(logits)), key=lambda id: -logits[id])
    if sampling.temperature == 0:
        return {order[0]: 1.0}
    kept = order[: sampling.top_k or None]
    weights = {id: exp(logits[id] / sampling.temperature) for id in kept}
    total, nucleus = sum(weights.values()), {}
    for id in kept:
        if sum(nucleus.values()) / total < sampling.top_p:
            nucleus[id] = weights[id]
    return {id: weight / sum(nucleus.values()) for id, weight in nucleus.items()}


def frequencies(ids):
    return {id: ids.count(id) / len(ids) for id in {*ids}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 0},
        {"top_k": 3},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 5},
        {"top_p": 0.6},
        {"top_p": 0.01},
        {"top_k": 4, "top_p": 0.8, "temperature": 0.7},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 5.0, "top_k": 4, "stop_ids": frozenset({1})},
        {"temperature": 0},
    ],
    ids=str,
)
def test_draws_follow_the_reference(settings):
    sampling = Sampling(max_new_tokens=1, **settings)
    logits = torch.tensor(LOGITS)
    sampler = Sampler(sampling, prompt=PROMPT, count=DRAWS, logits=logits)
    ids, _ = sampler.choose(logits.expand(DRAWS, -1), 0)
    expected, found = reference(LOGITS, sampling, PROMPT), frequencies(ids)
    assert {*found} <= {*expected}
    for id, probability in expected.items():
        assert abs(found.get(id, 0.0) - probability) < 4.5 * (probability * (1 - probability) / DRAWS) ** 0.5 + 1e-9


def test_what_came_is_penalised_from_then_on():
    sampling = Sampling(max_new_tokens=3, temperature=0, repetition_penalty=4.0)
    sampler = Sampler(sampling, prompt=[4], count=1, logits=torch.tensor(LOGITS))
    came = [4]
    for step in range(3):
        (id,), _ = sampler.choose(torch.tensor([LOGITS]), step)
        assert id == max(reference(LOGITS, sampling, came))
        came.append(id)
    assert came == [4, 0, 1, 2]


@torch.no_grad()
def test_sampled_tokens_follow_the_models_distribution(model, prompts):
    sampling = Sampling(max_new_tokens=1, temperature=0.7, top_k=4)
    ids = sample(model, prefill(model, prompts[0]), count=DRAWS, sampling=sampling).ids
    expected = reference(model(torch.tensor([prompts[0]]))[0, -1].tolist(), sampling)
    found = frequencies([id for (id,) in ids])
    assert {*found} <= {*expected}
    assert all(abs(found.get(id, 0.0) - each) < 4.5 * (0.25 / DRAWS) ** 0.5 for id, each in expected.items())


def test_impossible_settings_are_reported_all_at_once():
    with pytest.raises(UserError) as error:
        Sampling(max_new_tokens=0, temperature=-1.0, top_k=-1, top_p=0.0, repetition_penalty=0.0)
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", [5e-324, 1e-308, 1e-40, sys.float_info.max, inf, nan, -0.5])
def test_values_with_which_logits_overflow_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is "):
        Sampling(**{name: value})


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4, 1e30])
def test_every_value_that_is_allowed_chooses_an_id_whatever_the_logits(scale):
    logits = scale * torch.tensor(LOGITS)
    for temperature in (0, *TEMPERATURES):
        for penalty in PENALTIES:
            for top_p in (5e-324, 1.0):
                sampling = Sampling(max_new_tokens=1, temperature=temperature, repetition_penalty=penalty, top_p=top_p)
                ids, _ = Sampler(sampling, prompt=PROMPT, count=9, logits=logits).choose(logits.expand(9, -1), 0)
                assert {*ids} <= {*range(len(LOGITS))}


@pytest.mark.parametrize("wrong", [nan, inf, -inf])
def test_logits_that_are_not_finite_are_reported_and_not_drawn_from(wrong):
    logits = torch.full((2, 50), wrong)
    for temperature in (0, 1):
        sampler = Sampler(Sampling(temperature=temperature), prompt=PROMPT, count=2, logits=logits[0])
        with pytest.raises(NotFiniteError, match="NaN or infinite"):
            sampler.choose(logits, 0)
