"""Continuations with cached keys and values against full forward passes."""

from __future__ import annotations

import pytest
import torch

from lamda.config.errors import UserError
from lamda.inference.cache import CHUNK, Rows, feed
from lamda.inference.generation import Candidates, advance, forward, prefill, sample
from lamda.inference.sampling import Sampling
from tests.generation import generate, score
from tests.inference.conftest import make_model

GREEDY = Sampling(max_new_tokens=12, temperature=0)


def after(model, ids):
    """Logits [V] of the token after `ids`, from a full forward pass."""
    return model(torch.tensor([ids]))[0, -1]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("penalty", [1.0, 1.5], ids=["plain", "without-repeating"])
def test_a_thousand_greedy_tokens_equal_those_without_a_cache_in_float32(penalty):
    model, prompt = make_model(dtype=torch.float32, vocab_size=1301), [3, 1, 4, 1, 5]
    sampling = Sampling(max_new_tokens=1000, temperature=0, repetition_penalty=penalty)
    (ids,) = sample(model, prefill(model, prompt), sampling=sampling).ids
    # One pass over all of them says what each would have been: no token sees a later one.
    logits_LV = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
    for place, logits_V in enumerate(logits_LV):
        seen = [*prompt, *ids[:place]]
        logits_V[seen] = torch.minimum(logits_V[seen] / penalty, logits_V[seen] * penalty)
    assert logits_LV.argmax(-1).tolist() == ids
    assert len({*ids}) > (1 if penalty == 1 else 300)


def test_prefilled_logits_equal_a_full_forward_pass(model, prompts):
    for prompt in prompts:
        close(prefill(model, prompt).logits_V, after(model, prompt))


def test_rows_of_different_lengths_after_a_shared_prefix_each_have_their_own_logits(model, prompts):
    groups = [Rows(model, count=3, most=1, prefix=prefill(model, prompts[2])), Rows(model, count=1, most=0)]
    shares = [[[5], [6, 7, 8], [9, 10]], [[11] * 5, [12], [13]], [[14, 15], [16] * 140, [17]]]
    alone = [[1, 2], [3], [4]]
    own = [[], [], [], []]
    for share, single in zip(shares, alone, strict=True):
        tokens = [*share, single]
        found = feed(model, groups, tokens)
        own = [[*before, *new] for before, new in zip(own, tokens, strict=True)]
        expected = [after(model, [*prompts[2], *ids]) for ids in own[:3]] + [after(model, own[3])]
        close(found, torch.stack(expected))
        groups[0].lengths, groups[1].lengths = [len(ids) for ids in own[:3]], [len(own[3])]


def test_candidates_share_the_memory_of_their_prefix(model, prompts):
    prefix = prefill(model, prompts[0])
    candidates = sample(model, prefix, count=5, sampling=Sampling(max_new_tokens=3))
    assert candidates.rows._prefix.data_ptr() == prefix.key_values_SNHPK.data_ptr()
    assert candidates.rows._prefix.shape == (3, 2, 3, 9, 7)


def test_prompts_of_different_lengths_are_continued_as_each_is_alone(model, prompts):
    for sampling in (GREEDY, Sampling(max_new_tokens=12, seed=4)):
        together = generate(model, prompts, sampling)
        assert together == [generate(model, [prompt], sampling)[0] for prompt in prompts]
        assert len({tuple(ids) for ids in together}) == 3


def test_groups_that_join_and_leave_do_not_change_each_other(model, prompts):
    samplings = [Sampling(max_new_tokens=length, seed=length) for length in (12, 3, 7)]
    alone = [
        sample(model, prefill(model, prompt), count=2, sampling=sampling)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    waiting, groups = list(zip(prompts, samplings, strict=True)), []
    while waiting or not all(group.finished for group in groups):
        if waiting:
            prompt, sampling = waiting.pop(0)
            groups.append(Candidates(model, prefill(model, prompt), count=2, sampling=sampling))
        advance(model, [group for group in groups if not group.finished])
    assert [group.ids for group in groups] == [each.ids for each in alone]


def test_the_seed_and_the_number_of_a_candidate_decide_it(model, prompts):
    prefix = prefill(model, prompts[0])
    sixteen, four = (sample(model, prefix, count=count, sampling=Sampling(max_new_tokens=9)).ids for count in (16, 4))
    assert sixteen[:4] == four
    assert len({tuple(ids) for ids in sixteen}) > 8
    assert sample(model, prefix, count=4, sampling=Sampling(max_new_tokens=9, seed=1)).ids != four


def test_a_candidate_ends_before_its_stop_and_the_others_continue(model, prompts):
    prefix = prefill(model, prompts[0])
    free = sample(model, prefix, count=4, sampling=Sampling(max_new_tokens=12)).ids
    stop = free[0][4]
    assert stop not in free[0][:4]
    stopped = sample(model, prefix, count=4, sampling=Sampling(max_new_tokens=12, stop_ids=frozenset({stop})))
    assert stopped.ids == [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert stopped.stopped == [stop in ids for ids in free]
    assert len({len(ids) for ids in stopped.ids}) > 1


def test_what_comes_is_reported_as_it_comes(model, prompts):
    message = [[], [], []]
    sampling = Sampling(max_new_tokens=8, stop_ids=frozenset(range(9)))
    candidates = sample(
        model,
        prefill(model, prompts[0]),
        count=3,
        sampling=sampling,
        on_token=lambda number, id: message[number].append(id),
    )
    assert message == candidates.ids
    assert any(message)


def test_log_probabilities_are_the_models_own_whatever_was_drawn_from(model, prompts):
    sampling = Sampling(max_new_tokens=9, temperature=0.3, top_k=3, top_p=0.9, stop_ids=frozenset(range(4)))
    candidates = sample(model, prefill(model, prompts[0]), count=6, sampling=sampling)
    assert {*candidates.stopped} == {True, False}
    free = sample(
        model, prefill(model, prompts[0]), count=6, sampling=Sampling(**{**vars(sampling), "stop_ids": frozenset()})
    )
    for number, ids in enumerate(candidates.ids):
        scored = free.ids[number][: len(ids) + candidates.stopped[number]]
        logits = model(torch.tensor([[*prompts[0], *scored]]))[0, len(prompts[0]) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(scored)), scored].sum().item()
        assert candidates.log_probabilities[number] == pytest.approx(expected, abs=1e-9)


def test_judging_continues_each_candidate_and_changes_nothing(model, prompts):
    sampling = Sampling(max_new_tokens=6, seed=3, stop_ids=frozenset(range(9)))
    candidates = sample(model, prefill(model, prompts[2]), count=6, sampling=sampling)
    assert {*candidates.stopped} == {True, False}
    found = [candidates.next_logits(ids) for ids in ([7], [7] * 9, [8], [7])]
    for logits, ids in zip(found, ([7], [7] * 9, [8], [7]), strict=True):
        close(logits, torch.stack([after(model, [*prompts[2], *own, *ids]) for own in candidates.ids]))
    assert torch.equal(found[0], found[3])


def test_scores_are_log_probabilities_of_whole_continuations(model, prompts):
    continuations = [[5], [6, 7, 8], [9] * 300]
    found = score(model, prefill(model, prompts[2]), continuations)
    for ids, scored in zip(continuations, found, strict=True):
        logits = model(torch.tensor([[*prompts[2], *ids]]))[0, len(prompts[2]) - 1 : -1]
        assert scored == pytest.approx(logits.log_softmax(-1)[range(len(ids)), ids].sum().item(), abs=1e-9)


def test_an_empty_prompt_and_no_candidates_are_refused(model):
    with pytest.raises(UserError, match="the prompt is empty"):
        generate(model, [[1], []], GREEDY)
    with pytest.raises(UserError, match="candidates is 0"):
        sample(model, prefill(model, [1]), count=0, sampling=GREEDY)
    with pytest.raises(ValueError, match="nothing to score"):
        score(model, prefill(model, [1]), [[1], []])


def test_memory_grows_with_the_tokens_that_come_and_not_with_those_that_may(model, prompts):
    def size(most, written):
        sampling = Sampling(max_new_tokens=most, seed=1)
        candidates = Candidates(model, prefill(model, prompts[0]), count=2, sampling=sampling)
        for _ in range(written):
            advance(model, [candidates])
        return candidates.rows._own.shape[-2]

    assert size(20_000, 3) <= CHUNK
    assert size(CHUNK + 30, CHUNK + 20) == CHUNK + 34, "and never beyond what may come"


def test_a_step_that_failed_can_be_asked_again(model, prompts):
    groups = [Candidates(model, prefill(model, prompt), count=2, sampling=GREEDY) for prompt in prompts]
    others = [Candidates(model, prefill(model, prompt), count=2, sampling=GREEDY) for prompt in prompts]
    for _ in range(5):
        forward(model, groups)  # nobody takes it
        for group in groups:
            (own_NV,) = forward(model, [group])
            group.take(own_NV)
        advance(model, others)
    assert [group.ids for group in groups] == [other.ids for other in others]
