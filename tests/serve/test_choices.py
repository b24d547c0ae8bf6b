"""What OpenAI's clients ask for beside text: several answers, log probabilities, request ids, error codes."""

from __future__ import annotations

import codecs

import openai
import pytest
import torch

from lamda.data.tokenizer import RESERVED_PIECES, UNKNOWN_PIECE
from lamda.dialog.server.logprobs import text_logprobs
from lamda.inference.generation import TokenScore, prefill, sample
from lamda.inference.sampling import Sampling
from tests.serve.conftest import KEY, make_service, serving

ASKED = {"model": "random", "prompt": "the of and", "max_tokens": 12, "seed": 3}
CHAT = {"model": "random", "messages": [{"role": "user", "content": "that is it"}], "seed": 3}


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def plain_scores(loaded, prompt, count):
    """The log probabilities of the greedy continuation, by whole passes."""
    ids, found = [loaded.tokenizer.end_of_document, *loaded.tokenizer.encode(prompt)], []
    for _ in range(count):
        logs_V = loaded.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        best = logs_V.topk(3)
        ids.append(int(best.indices[0]))
        found.append(best.values.tolist())
    return found


def utf8_of(tokens):
    """The bytes of named tokens."""
    return b"".join(
        bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in tokens
    )


def test_log_probabilities_are_those_of_whole_passes(client, loaded):
    found = client.completions.create(**ASKED, temperature=0, logprobs=3)
    scores, text = found.choices[0].logprobs, found.choices[0].text
    expected = plain_scores(loaded, ASKED["prompt"], len(scores.tokens))
    assert scores.token_logprobs == pytest.approx([best for best, *_ in expected], abs=1e-4)
    assert [sorted(each.values(), reverse=True) for each in scores.top_logprobs] == [
        pytest.approx(best, abs=1e-4) for best in expected
    ]
    assert len(scores.tokens) == found.usage.completion_tokens
    assert utf8_of(scores.tokens).decode(errors="replace") == text
    assert scores.text_offset == [
        len(utf8_of(scores.tokens[:n]).decode(errors="replace")) for n in range(len(scores.tokens))
    ]
    streamed = client.completions.create(**ASKED, temperature=0, logprobs=3, stream=True)
    (last,) = [choice.logprobs for event in streamed for choice in event.choices if choice.logprobs]
    assert last == scores


def test_log_probabilities_end_where_a_stop_string_does(client):
    text = client.completions.create(**ASKED).choices[0].text
    stop = text[len(text) // 2 :][:3]
    choice = client.completions.create(**ASKED, stop=stop, logprobs=0).choices[0]
    tokens = choice.logprobs.tokens
    shorter, covered = (len(utf8_of(part).decode(errors="replace")) for part in (tokens[:-1], tokens))
    assert shorter < len(choice.text) <= covered
    assert choice.logprobs.top_logprobs == [{}] * len(tokens)


def test_no_answer_ends_in_a_part_of_a_character(client, loaded):
    """With two tokens, the limit cuts the characters of many bytes that this model writes at random."""
    asked = {**ASKED, "max_tokens": 2, "n": 64, "logprobs": 0}
    whole = client.completions.create(**asked)
    texts = [choice.text for choice in whole.choices]
    tokens = [choice.logprobs.tokens for choice in whole.choices]
    tokenizer, begun = loaded.tokenizer, codecs.getincrementaldecoder("utf-8")
    prefix = prefill(loaded.model, [tokenizer.end_of_document, *tokenizer.encode(ASKED["prompt"])])
    sampling = Sampling(max_new_tokens=2, seed=ASKED["seed"], stop_ids=frozenset(tokenizer.symbols.values()))
    written = [
        b"".join(map(tokenizer.utf8, ids)) for ids in sample(loaded.model, prefix, count=64, sampling=sampling).ids
    ]
    assert texts == [begun(errors="replace").decode(each) for each in written]
    assert texts != [each.decode(errors="replace") for each in written], "some are cut"
    assert [utf8_of(each).decode(errors="replace") for each in tokens] == texts
    streamed, joined = client.completions.create(**asked, stream=True), [""] * 64
    for event in streamed:
        for choice in event.choices:
            joined[choice.index] += choice.text
    assert joined == texts
    answers = client.chat.completions.create(**CHAT, max_tokens=2, n=64, logprobs=True)
    content = [choice.logprobs.content for choice in answers.choices if choice.logprobs]
    utf8 = [b"".join(bytes(token.bytes) for token in each) for each in content]
    candidates = [each["text"] for each in answers.model_extra["lamda"]["candidates"]]
    shown = [choice.message.content for choice in answers.choices if choice.logprobs]
    assert shown == [each.decode(errors="replace").strip() for each in utf8] == candidates[: len(shown)]
    assert sum(map(len, content)) < answers.usage.completion_tokens


def test_a_token_that_is_no_text_is_named_by_its_bytes(tokenizer):
    unknown = RESERVED_PIECES.index(UNKNOWN_PIECE)
    ids = [*tokenizer.encode("\u20ac"), tokenizer.end_of_document, unknown]
    assert len(ids) == 5
    found = text_logprobs(tokenizer, [TokenScore(id, -1.0, []) for id in ids])
    assert found["tokens"] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "<end_of_document>", UNKNOWN_PIECE]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_has_the_n_best_candidates_with_their_log_probabilities(client, stream):
    asked = {**CHAT, "n": 3, "logprobs": True, "top_logprobs": 2, "extra_body": {"candidates": 5}}
    found = client.chat.completions.create(**asked)
    best = found.model_extra["lamda"]["candidates"]
    assert [choice.message.content for choice in found.choices] == [each["text"] for each in best[:3]]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    content = [choice.logprobs.content for choice in found.choices]
    assert found.usage.completion_tokens == sum(map(len, content))
    for choice, scores, each in zip(found.choices, content, best, strict=False):
        assert b"".join(bytes(score.bytes) for score in scores).decode(errors="replace").strip() == each["text"]
        assert all(len(score.top_logprobs) == 2 for score in scores)
        if choice.finish_reason == "length":  # else its mean has the end symbol, too
            mean = sum(score.logprob for score in scores) / len(scores)
            assert mean == pytest.approx(each["scores"]["log_likelihood"], abs=1e-4)
    if stream:  # the official client joins the events
        with client.chat.completions.stream(**asked) as events:
            assert list(events)
            joined = events.current_completion_snapshot
        assert [choice.message.content for choice in joined.choices] == [each["text"] for each in best[:3]]
        assert {choice.message.role for choice in joined.choices} == {"assistant"}
        assert [choice.logprobs.content for choice in joined.choices] == content


def test_candidates_that_were_dropped_are_no_answers(loaded):
    service = make_service(loaded)
    with serving(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        unsafe = [
            each["scores"]["unsafe"]
            for each in client.chat.completions.create(**CHAT).model_extra["lamda"]["candidates"]
        ]
        strict = {"threshold": sum(sorted(unsafe)[1:3]) / 2}  # two of four pass
        found = client.chat.completions.create(**CHAT, n=4, extra_body=strict)
        reasons = [choice.finish_reason for choice in found.choices]
        assert [reason == "content_filter" for reason in reasons] == [False, False, True, True]
        assert {choice.message.content for choice in found.choices[2:]} == {service._options.refusal}
        with pytest.raises(openai.BadRequestError, match="n is 5: at most 4, the candidates"):
            client.chat.completions.create(**CHAT, n=5, extra_body={"candidates": 4})


def test_every_answer_has_an_id_of_its_own(client):
    found = [client.models.list(), client.completions.create(**ASKED), client.chat.completions.create(**CHAT)]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{**ASKED, "n": 0})
    ids = [*(each._request_id for each in found), refused.value.request_id]
    assert all(id.startswith("req_") for id in ids)
    assert len({*ids}) == 4


@pytest.mark.parametrize(
    ("changed", "code"),
    [({"model": "x"}, "model_not_found"), ({"prompt": "the " * 700}, "context_length_exceeded"), ({"n": 65}, None)],
    ids=str,
)
def test_errors_have_openais_codes(client, changed, code):
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(**{**ASKED, **changed})
    assert refused.value.code == code


def test_a_failure_is_found_in_the_log_by_its_id(loaded, caplog):
    service = make_service(loaded)
    service.complete = lambda request, **how: 1 / 0
    with (
        serving(service) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as failed,
    ):
        client.completions.create(**ASKED)
    assert failed.value.request_id in failed.value.message
    assert failed.value.request_id in caplog.text
