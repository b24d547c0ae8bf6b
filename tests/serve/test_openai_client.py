"""The official client against the server."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from lamda.inference.sampling import Sampling
from tests.generation import generate
from tests.serve.conftest import KEY, make_service, serving

ASKED = {"model": "random", "prompt": "the of and", "max_tokens": 12, "seed": 3}
CHAT = {"model": "random", "messages": [{"role": "user", "content": "that is it"}], "seed": 3}


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_a_completion_is_what_the_model_generates(client, loaded):
    found = client.completions.create(**ASKED)
    tokenizer = loaded.tokenizer
    prompt = [tokenizer.end_of_document, *tokenizer.encode(ASKED["prompt"])]
    stop_ids = frozenset(tokenizer.symbols.values())
    (ids,) = generate(loaded.model, [prompt], Sampling(max_new_tokens=12, seed=3, stop_ids=stop_ids))
    assert found.choices[0].text == tokenizer.decode(ids)
    assert found.choices[0].finish_reason == ("length" if len(ids) == 12 else "stop")
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.completion_tokens == len(ids)


def test_a_streamed_completion_is_the_same_in_pieces(client):
    whole = client.completions.create(**ASKED, n=3)
    texts, reasons, usage = ["", "", ""], [None] * 3, None
    pieces = 0
    for event in client.completions.create(**ASKED, n=3, stream=True, stream_options={"include_usage": True}):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            pieces += bool(choice.text)
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert pieces > 3  # some choice came in several; a slow client gets longer ones


def test_a_stop_string_ends_a_completion_before_itself(client):
    text = client.completions.create(**ASKED).choices[0].text
    stop = text[len(text) // 2 :][:3]
    found = client.completions.create(**ASKED, stop=[stop, "never there"])
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**ASKED, stop=stop, stream=True)
    assert "".join(choice.text for event in streamed for choice in event.choices) == found.choices[0].text


def test_a_chat_is_answered_with_its_candidates(client):
    found = client.chat.completions.create(**CHAT, max_completion_tokens=9)
    lamda = found.model_extra["lamda"]
    assert len(lamda["candidates"]) == 4
    assert found.choices[0].message.content == lamda["candidates"][0]["text"]
    assert {"sensible", "specific", "interesting", "unsafe"} <= {*lamda["candidates"][0]["scores"]}
    again = client.chat.completions.create(**CHAT, max_completion_tokens=9)
    assert again.choices == found.choices
    assert found.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="max_completion_tokens is 601: at most 600"):
        client.chat.completions.create(**CHAT, max_completion_tokens=601)


def test_a_streamed_chat_is_the_same(client):
    whole = client.chat.completions.create(**CHAT)
    events = list(client.chat.completions.create(**CHAT, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole.choices[0].message.content
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].model_extra["lamda"] == whole.model_extra["lamda"]


def test_a_candidate_above_the_threshold_is_dropped_and_reported(client):
    found = client.chat.completions.create(**CHAT, extra_body={"threshold": 0.0, "candidates": 2})
    assert found.choices[0].finish_reason == "content_filter"
    assert all("P(unsafe)" in each["dropped"] for each in found.model_extra["lamda"]["candidates"])


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["random"]
    assert client.models.retrieve("random").id == "random"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("kind", "changed", "error", "output"),
    [
        ("text", {"model": "other"}, openai.NotFoundError, "there is no model 'other'"),
        ("text", {"temperature": -1}, openai.BadRequestError, "temperature: "),
        ("text", {"max_tokens": 601}, openai.BadRequestError, "at most 600"),
        ("text", {"n": 65}, openai.BadRequestError, "n is 65: at most 64"),
        ("text", {"logprobs": 6, "echo": True}, openai.BadRequestError, "logprobs: Input should be less than or equal"),
        ("text", {"best_of": 2, "echo": True}, openai.BadRequestError, "best_of: is not supported; echo: is not"),
        ("text", {"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty: is not supported"),
        ("text", {"prompt": "the " * 700}, openai.BadRequestError, "prompt has"),
        ("text", {"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature: is not a parameter"),
        ("text", {"prompt": "x" * 50_000}, openai.APIStatusError, "longer than 50,000 bytes"),
        ("text", {"stream": True, "max_tokens": 601}, openai.BadRequestError, "at most 600"),
        ("chat", {"top_logprobs": 2}, openai.BadRequestError, "top_logprobs: only with logprobs: true"),
        (
            "chat",
            {"response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "response_format: is not supported",
        ),
        ("chat", {"stop": "x"}, openai.BadRequestError, "stop: not supported here"),
        ("chat", {"tools": [{"type": "function"}]}, openai.BadRequestError, "tools: is not supported"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "messages.0.role"),
        ("chat", {"messages": [{"role": "assistant", "content": "x"}]}, openai.BadRequestError, "end with the user's"),
        ("chat", {"messages": []}, openai.BadRequestError, "messages: "),
    ],
    ids=str,
)
def test_what_is_not_possible_is_refused_by_name(client, kind, changed, error, output):
    create, asked = (client.completions.create, ASKED) if kind == "text" else (client.chat.completions.create, CHAT)
    with pytest.raises(error) as raised:
        create(**{**asked, **changed})
    assert output in raised.value.body["message"]


def test_values_that_ask_for_nothing_are_taken(client):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "best_of": 1, "user": "someone"}
    assert client.completions.create(**ASKED, **neutral).choices == client.completions.create(**ASKED).choices


def test_a_wrong_key_is_refused(address):
    for key in ("another", KEY + "x"):
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_thirty_two_clients_at_once_get_what_each_gets_alone(client, service):
    def text(number):
        asked = {**ASKED, "prompt": "the " * number + "of", "max_tokens": 8 + number, "seed": number}
        return client.completions.create(**asked).choices[0].text

    def chat(number):
        messages = [{"role": "user", "content": f"that is {number}"}]
        return client.chat.completions.create(**{**CHAT, "messages": messages, "seed": number}).choices[0].message

    def one(number):
        return text(number) if number % 2 else chat(number)

    alone = [one(number) for number in range(32)]
    before = service.scheduler.steps
    with ThreadPoolExecutor(32) as clients:
        together = list(clients.map(one, range(32)))
    assert together == alone
    assert len({str(each) for each in alone}) > 16
    # 16 completions alone need 8 to 39 steps each; 32 clients that shared none would need their sum.
    assert service.scheduler.steps - before < sum(8 + number for number in range(1, 32, 2))


def test_one_request_too_many_is_reported_to_wait(loaded):
    service = make_service(loaded, requests=1)
    with serving(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        stream = client.completions.create(**{**ASKED, "max_tokens": 600, "n": 64}, stream=True)
        with pytest.raises(openai.RateLimitError, match="1 requests are in progress"):
            client.completions.create(**ASKED)
        stream.close()


def test_a_request_that_takes_too_long_is_reported_so(loaded):
    service = make_service(loaded, seconds=0.05)
    with serving(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.05 seconds"):
            client.completions.create(**{**ASKED, "max_tokens": 600, "n": 64})
        with pytest.raises(openai.APIError, match=r"longer than 0\.05 seconds"):
            list(client.completions.create(**{**ASKED, "max_tokens": 600, "n": 64}, stream=True))


def test_a_client_that_leaves_frees_its_place_soon(client, service):
    endless = {**ASKED, "max_tokens": 600, "n": 64}

    def soon_has(rows):
        end = time.monotonic() + 5
        while service.scheduler.rows != rows and time.monotonic() < end:
            time.sleep(0.001)
        return service.scheduler.rows == rows

    stream = client.completions.create(**endless, stream=True)
    next(iter(stream))
    assert soon_has(64)
    stream.close()
    assert soon_has(0)
    before = service.scheduler.steps
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**endless)
    assert soon_has(0)
    assert 0 < service.scheduler.steps - before < 600
