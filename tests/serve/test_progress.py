"""What a streamed chat sends before its answer is complete."""

from __future__ import annotations

import openai
import pytest

from lamda.dialog.server.progress import ReplyProgress, StrippedText
from lamda.dialog.server.service import Service
from lamda.dialog.speaker import ReplyOptions
from lamda.inference.sampling import Sampling
from tests.serve.conftest import KEY, serving

CHAT = {"model": "random", "messages": [{"role": "user", "content": "that is it"}], "seed": 3}


@pytest.fixture
def pretrained(loaded):
    """A client of a model that was not fine-tuned."""
    options = ReplyOptions(sampling=Sampling(max_new_tokens=12))
    service = Service(
        loaded.model, loaded.tokenizer, name="random", sequence_length=256, is_tuned=False, options=options
    )
    with serving(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def tuned(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def pieces_of(client, **options):
    stream = client.chat.completions.create(**CHAT, **options, stream=True)
    return [choice.delta.content for event in stream for choice in event.choices if choice.delta.content]


def progress_of(client, **options):
    extra = {"stream_options": {"include_progress": True}, **options}
    stream = client.chat.completions.create(**CHAT, stream=True, extra_body=extra)
    return [event.progress for event in stream if hasattr(event, "progress")]


def test_a_text_that_nothing_rates_is_streamed_and_is_the_same_as_whole(pretrained):
    alone = {"extra_body": {"candidates": 1}}
    pieces = pieces_of(pretrained, **alone)
    assert len(pieces) > 1
    assert "".join(pieces) == pretrained.chat.completions.create(**CHAT, **alone).choices[0].message.content
    assert len(pieces_of(pretrained, extra_body={"candidates": 2})) == 1


def test_a_text_that_a_filter_may_drop_comes_in_one_piece(tuned):
    assert len(pieces_of(tuned, extra_body={"candidates": 1})) > 1
    assert len(pieces_of(tuned, extra_body={"candidates": 1, "threshold": 0.999})) == 1


def test_progress_counts_candidates_and_their_tokens():
    said = []
    with ReplyProgress(said.append, is_rated=True).of(3, None) as watched:
        for number in (0, 1, 2, 0, 1, 0):  # 2 ends after a token, 1 after two
            watched(number, 7)
        watched(0, 7)
    sampling = {"stage": "sampling", "candidates": 3}
    assert said == [
        {**sampling, "finished": 0, "tokens": 1},
        {**sampling, "finished": 0, "tokens": 4},
        {**sampling, "finished": 1, "tokens": 6},
        {**sampling, "finished": 2, "tokens": 7},
        {"stage": "rating", "candidates": 3},
    ]


def test_a_client_sees_the_last_progress_and_then_that_they_are_rated(tuned, pretrained):
    *sampling, rating = progress_of(tuned, candidates=3, max_tokens=6)  # a slow client misses some of it
    assert rating == {"stage": "rating", "candidates": 3}
    tokens = [each["tokens"] for each in sampling]
    assert tokens == sorted(set(tokens))
    assert all(each["stage"] == "sampling" and each["tokens"] <= 18 for each in sampling)
    assert {each["stage"] for each in progress_of(pretrained, candidates=2)} == {"sampling"}


def test_who_does_not_ask_for_progress_gets_none(tuned):
    stream = tuned.chat.completions.create(**CHAT, stream=True)
    assert not any(hasattr(event, "progress") for event in stream)


def test_white_space_around_a_streamed_text_is_left_out():
    pieces: list[str] = []
    text = StrippedText(pieces.append)
    for piece in (" ", "\n One", " ", "two", "  ", "\n"):
        text.add(piece)
    assert pieces == ["One", " two"]
    assert text.sent == len("One two")


def test_the_model_is_described_as_it_answers(tuned, pretrained):
    expected = {"is_tuned": True, "candidates": 4, "max_candidates": 64, "threshold": 1.0, "tools": []}
    assert tuned.models.retrieve("random").lamda == expected
    assert pretrained.models.retrieve("random").lamda["is_tuned"] is False
