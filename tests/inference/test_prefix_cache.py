"""Prompts that begin alike: what is computed again, what is kept, and that logits agree with those of a whole pass."""

from __future__ import annotations

import pytest
import torch

from lamda.inference import generation
from lamda.inference.generation import prefill, sample, whole
from lamda.inference.prefix_cache import PrefixCache
from lamda.inference.sampling import Sampling


@pytest.fixture
def fed(monkeypatch):
    """The number of tokens that the model was fed, by call."""
    counts = []
    feed = generation.feed

    def counted(model, groups, tokens):
        counts.append(sum(map(len, tokens)))
        return feed(model, groups, tokens)

    monkeypatch.setattr(generation, "feed", counted)
    return counts


def ids_of(*lengths):
    """Stretches of ids that differ from each other."""
    return [1 + (7 * place + 13 * number) % 50 for number, length in enumerate(lengths) for place in range(length)]


def equal(found, expected):
    assert found.ids == expected.ids
    torch.testing.assert_close(found.logits_V, expected.logits_V, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.key_values_SNHPK, expected.key_values_SNHPK, rtol=0, atol=1e-9)


def test_each_turn_computes_its_own_tokens_alone_and_equals_the_whole(model, fed):
    cache, ids, response = PrefixCache(model, capacity=2000), ids_of(40), 52
    for turn in range(10):
        before = len(ids) if turn else 0
        ids = [*ids, *ids_of(turn + 1, 30)]
        fed.clear()
        prefix = whole(cache.prefill_pieces([*ids, response]))
        assert (sum(fed), prefix.cached) == (len(ids) + 1 - before, before)
        assert cache.tokens == len(ids) + 1  # one entry for the conversation
        equal(prefix, prefill(model, [*ids, response]))
        sampling = Sampling(max_new_tokens=5, temperature=0)
        assert (
            sample(model, prefix, sampling=sampling).ids
            == sample(model, prefill(model, prefix.ids), sampling=sampling).ids
        )
    fed.clear()
    again = whole(cache.prefill_pieces([*ids, response]))  # such as another candidate
    assert (fed, again.cached) == ([], len(ids) + 1)
    shorter = whole(cache.prefill_pieces(ids[:100]))
    assert (fed, shorter.cached) == ([1], 99)
    equal(shorter, prefill(model, ids[:100]))


def test_a_beginning_longer_than_one_piece_is_copied(model):
    cache, ids = PrefixCache(model, capacity=2000), ids_of(300, 300, 40)
    whole(cache.prefill_pieces(ids[:620]))
    found = whole(cache.prefill_pieces([*ids[:610], *ids_of(3, 290)]))
    assert found.cached == 610
    equal(found, prefill(model, found.ids))


def test_other_owners_short_prompts_and_the_oldest_beyond_the_capacity_are_not_known(model):
    cache = PrefixCache(model, capacity=200)
    one, other = ids_of(90), ids_of(0, 90)
    for ids in (one, other, ids_of(10)):
        whole(cache.prefill_pieces(ids, owner="a"))
    assert cache.tokens == 180
    assert whole(cache.prefill_pieces([*one, 5], owner="b")).cached == 0
    assert cache.tokens == 181  # the oldest prompt has left
    assert whole(cache.prefill_pieces([*one, 6], owner="a")).cached == 0
    assert whole(cache.prefill_pieces([*one, 7], owner="b")).cached == 90
    assert whole(cache.prefill_pieces(ids_of(0, 0, 201), owner="a")).cached == 0
    assert cache.tokens <= 200
    assert whole(PrefixCache(model, capacity=0).prefill_pieces(one)).cached == 0


def test_two_prompts_in_turn_pieces_do_not_disturb_each_other(model):
    cache, ids = PrefixCache(model, capacity=5000), ids_of(300)
    whole(cache.prefill_pieces([*ids, 52]))
    works = [cache.prefill_pieces([*ids, *ids_of(n, 600)]) for n in (1, 2)]
    found = {}
    while len(found) < 2:
        for number, work in enumerate(works):
            if number not in found:
                try:
                    next(work)
                except StopIteration as end:
                    found[number] = end.value
    for prefix in found.values():
        assert prefix.cached == 300
        equal(prefix, prefill(model, prefix.ids))
    assert cache.tokens == sum(len(prefix.ids) for prefix in found.values())
