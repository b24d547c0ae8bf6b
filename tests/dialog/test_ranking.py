"""Sample-and-rank against whole sequences through the model without a cache, and the rules of the filter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lamda.config import ModelConfig
from lamda.config.errors import UserError
from lamda.dialog.conversation import Message
from lamda.dialog.encoding import Encoding
from lamda.dialog.ranking import RATED_ATTRIBUTES, Scored, drop_reason, judge, rank_by_attributes, rank_by_likelihood
from lamda.dialog.speaker import REFUSAL, ReplyOptions, Speaker
from lamda.dialog.tools.toolset import Toolset
from lamda.inference.generation import prefill, sample
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights

TALK = [Message("user", "the of and"), Message("assistant", "to in"), Message("user", "is that for")]


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, enlarged so that candidates and their scores differ."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=4, d_head=8, d_ff=48, bias_per_layer=True
    )
    model = LaMDA(config)
    initialize_weights(model, seed=5)
    model.load_weights({name: 3 * weight for name, weight in model.export_weights().items()})
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def encoding(tokenizer):
    return Encoding(tokenizer)


@pytest.fixture(scope="module")
def candidates(model, encoding):
    sampling = Sampling(max_new_tokens=9, seed=3, stop_ids=encoding.stop_ids)
    return sample(model, prefill(model, encoding.context(TALK)), count=12, sampling=sampling)


def plain_probabilities(model, encoding, ids):
    """P(attribute) by the whole sequence at once, as the paper writes it down."""
    found = {}
    for name in RATED_ATTRIBUTES:
        whole = [*encoding.context(TALK), *ids, encoding.attribute(name)]
        logits = model(torch.tensor([whole]))[0, -1].double()
        found[name] = logits[list(encoding.rating_ids)].softmax(0)[1].item()
    return found


def test_every_score_equals_the_whole_sequence_without_a_cache(model, encoding, candidates, tokenizer):
    ranked = rank_by_attributes(candidates, encoding, threshold=1.0)
    by_text = {encoding.decode(ids).strip(): ids for ids in candidates.ids}
    assert len(by_text) > 6  # they differ
    for scored in ranked:
        expected = plain_probabilities(model, encoding, by_text[scored.text])
        assert {name: scored.scores[name] for name in RATED_ATTRIBUTES} == pytest.approx(expected, abs=1e-5)
        assert scored.value == pytest.approx(
            3 * expected["sensible"] + expected["specific"] + expected["interesting"], abs=5e-5
        )


def test_a_given_response_is_judged_as_a_candidate_is(model, encoding, candidates):
    prefix = prefill(model, encoding.context(TALK))
    ids = next(ids for ids in candidates.ids if len(ids) > 3)
    assert judge(model, prefix, ids, encoding) == pytest.approx(plain_probabilities(model, encoding, ids), abs=1e-5)


def test_the_best_comes_first_and_the_dropped_last_with_their_reasons(candidates, encoding):
    unfiltered = rank_by_attributes(candidates, encoding, threshold=1.0)
    threshold = sorted(scored.scores["unsafe"] for scored in unfiltered)[6]
    ranked = rank_by_attributes(candidates, encoding, threshold=threshold)
    kept = [scored for scored in ranked if scored.dropped is None]
    dropped = [scored for scored in ranked if scored.dropped is not None]
    assert (*kept, *dropped) == ranked
    assert [scored.rank for scored in ranked] == [*range(1, len(kept) + 1), *[None] * len(dropped)]
    assert [scored.value for scored in kept] == sorted((scored.value for scored in kept), reverse=True)
    for scored in ranked:
        reason = None
        if scored.scores["unsafe"] > threshold:
            reason = f"P(unsafe) {scored.scores['unsafe']:.3f} is above {threshold:g}"
        assert scored.dropped == (reason if scored.text else "empty")
    assert len(dropped) >= 3


def test_likelihood_is_the_mean_over_tokens_and_end(model, encoding, candidates):
    ranked = rank_by_likelihood(candidates, encoding)
    context = encoding.context(TALK)
    by_text = {encoding.decode(ids).strip(): number for number, ids in enumerate(candidates.ids)}
    for scored in ranked:
        number = by_text[scored.text]
        ids, total = candidates.ids[number], candidates.log_probabilities[number]
        logs = model(torch.tensor([[*context, *ids]]))[0].double().log_softmax(-1)
        own = sum(logs[len(context) - 1 + place, id].item() for place, id in enumerate(ids))
        if candidates.stopped[number]:
            end = total - own  # of whichever symbol ended it
            assert any(logs[-1, id].item() == pytest.approx(end, abs=1e-4) for id in encoding.stop_ids)
            own, length = total, len(ids) + 1
        else:
            length = len(ids)
        assert scored.value == pytest.approx(own / length, abs=1e-4)
    kept = [scored.value for scored in ranked if scored.dropped is None]
    assert kept == sorted(kept, reverse=True)


def speaker(model, tokenizer, **options):
    return Speaker(model, tokenizer, sequence_length=64, **options)


REPLY_OPTIONS = ReplyOptions(candidates=12, sampling=Sampling(max_new_tokens=8, seed=1), threshold=1.0)


def test_the_reply_is_the_first_candidate_and_shows_all(model, tokenizer):
    reply = speaker(model, tokenizer, options=REPLY_OPTIONS).reply(TALK)
    assert reply.text == reply.candidates[0].text
    assert len(reply.candidates) == 12
    assert not reply.refused
    assert reply == speaker(model, tokenizer, options=REPLY_OPTIONS).reply(TALK)
    record = reply.to_record()
    assert [candidate["rank"] for candidate in record["candidates"]][:1] == [1]
    assert set(record["candidates"][0]["scores"]) == {*RATED_ATTRIBUTES, "log_likelihood"}


def test_where_all_are_dropped_the_refusal_is_said_and_not_the_safest(model, tokenizer):
    reply = speaker(model, tokenizer).reply(TALK, replace(REPLY_OPTIONS, threshold=0.0))
    assert (reply.text, reply.refused, reply.steps) == (REFUSAL, True, ())
    assert all(candidate.dropped for candidate in reply.candidates)
    assert REFUSAL not in [candidate.text for candidate in reply.candidates]
    own = speaker(model, tokenizer).reply(TALK, replace(REPLY_OPTIONS, threshold=0.0, refusal="No."))
    assert own.text == "No."


def test_an_untuned_model_continues_lines_and_ranks_by_likelihood(model, tokenizer):
    reply = speaker(model, tokenizer, is_tuned=False, options=REPLY_OPTIONS).reply(TALK)
    assert all(set(candidate.scores) == {"log_likelihood"} for candidate in reply.candidates)
    assert "\n" not in reply.text
    with pytest.raises(UserError, match="fine-tuned to use them"):
        speaker(model, tokenizer, is_tuned=False, toolset=Toolset(()))


def test_a_long_conversation_keeps_within_the_trained_length(model, tokenizer):
    lengths = []

    def watched(prefix, **options):
        lengths.append(len(prefix.ids))
        return sample(model, prefix, **options)

    long = [Message("user", "the of and to in is " * 40)] * 5
    for is_tuned in (True, False):
        speaker(
            model, tokenizer, is_tuned=is_tuned, sample=watched, options=replace(REPLY_OPTIONS, candidates=1)
        ).reply(long)
    assert lengths == [56, 56]


def test_manners_that_cannot_be_are_refused_together():
    with pytest.raises(UserError) as error:
        ReplyOptions(candidates=0, threshold=2, max_queries=-1, refusal=" ")
    assert len(str(error.value).splitlines()) == 4


def test_nothing_to_answer_is_said(model, tokenizer):
    with pytest.raises(UserError, match="no message to answer"):
        speaker(model, tokenizer).reply([])


@pytest.mark.parametrize("name", RATED_ATTRIBUTES)
def test_a_candidate_that_could_not_be_judged_is_dropped(name):
    judgment = dict.fromkeys(RATED_ATTRIBUTES, 0.1) | {name: float("nan")}
    assert drop_reason("fine", judgment, threshold=1.0) == "its scores are not finite"
    assert drop_reason("fine", dict.fromkeys(RATED_ATTRIBUTES, 0.1), threshold=1.0) is None
    record = Scored("fine", judgment, float("nan")).to_record()
    assert json.loads(json.dumps(record, allow_nan=False))["scores"][name] is None


@pytest.mark.parametrize("is_tuned", [True, False])
def test_a_reply_says_what_of_the_conversation_was_read(model, tokenizer, is_tuned):
    answers = speaker(model, tokenizer, is_tuned=is_tuned, options=replace(REPLY_OPTIONS, candidates=1))
    turn = Message("user", "the of")
    whole = answers.reply([turn] * 3)
    assert (whole.context.turns_left_out, whole.context.last_message_cut) == (0, False)
    grown = answers.reply([turn] * 100)
    assert 50 < grown.context.turns_left_out < 100
    assert not grown.context.last_message_cut
    assert len(whole.context.ids) < len(grown.context.ids) <= 56
    long = answers.reply([turn, Message("user", "the of and to " * 100)])
    assert long.to_record()["context"] == {
        "tokens": 56,
        "cached_tokens": 0,
        "turns_left_out": 1,
        "messages_left_out": 1,
        "system_cut": False,
        "last_message_cut": True,
    }


@pytest.mark.parametrize("is_tuned", [True, False])
def test_the_next_turn_reads_what_the_last_one_has_computed(model, tokenizer, is_tuned):
    def make():
        options = ReplyOptions(candidates=2, sampling=Sampling(max_new_tokens=8, seed=1), threshold=1.0)
        return Speaker(model, tokenizer, sequence_length=256, is_tuned=is_tuned, options=options)

    answers, talk, before = make(), [Message("system", "be kind to all of them and to it " * 4)], 0
    for number in range(3):
        talk.append(Message("user", f"the of and {number}"))
        reply, fresh = answers.reply(talk), make().reply(talk)
        assert (reply.text, reply.context) == (fresh.text, fresh.context)
        assert (reply.cached_tokens, fresh.cached_tokens) == (before, 0)
        before = len(reply.context.ids) - is_tuned  # all but RESPONSE
        talk.append(Message("assistant", reply.text))
    assert before > 60


def test_a_line_of_the_system_stays_when_an_untuned_models_conversation_has_grown(model, tokenizer):
    read = []

    def watched(prefix, **options):
        read.append(tokenizer.decode(prefix.ids))
        return sample(model, prefix, **options)

    talk = [Message("system", "be kind"), *[Message("user", "the of and")] * 100]
    options = replace(REPLY_OPTIONS, candidates=1)
    reply = speaker(model, tokenizer, is_tuned=False, sample=watched, options=options).reply(talk)
    assert read[0].startswith("be kind\n")
    assert 50 < reply.context.turns_left_out < 100
