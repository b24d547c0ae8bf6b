"""What a request means: the official client's messages, prompts of all forms, growing conversations, the filter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from lamda.config.errors import UserError
from lamda.dialog.server.main import read_key, read_keys
from lamda.dialog.server.protocol import ChatRequest, CompletionRequest, RequestError, parse
from tests.serve.conftest import KEY, make_service, serving

ASKED = {"model": "random", "prompt": "the of and", "max_tokens": 6, "seed": 3}
CHAT = {"model": "random", "messages": [{"role": "user", "content": "that is it"}], "seed": 3}


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def encode(loaded):
    return loaded.tokenizer.encode


def test_an_answer_can_be_sent_back_as_the_client_writes_it(client):
    messages = [{"role": "user", "content": "that is it", "name": "bob"}]
    for _ in range(3):
        answer = client.chat.completions.create(**{**CHAT, "messages": messages}).choices[0].message
        messages += [answer.model_dump(), {"role": "user", "content": [{"type": "text", "text": "and then"}]}]
    full = {**answer.model_dump(), "tool_calls": None, "audio": None, "function_call": None, "annotations": []}
    messages[-2] = full
    assert client.chat.completions.create(**{**CHAT, "messages": messages}).choices


NOTHING = [
    *[{name: None} for name in ("tools", "metadata", "logprobs", "top_logprobs", "audio", "service_tier", "seed", "n")],
    {"tools": [], "metadata": {}, "functions": [], "tool_choice": "auto", "service_tier": "auto", "store": False},
    {"presence_penalty": 0.0, "frequency_penalty": 0, "top_logprobs": 0, "logprobs": False, "logit_bias": {}},
]


@pytest.mark.parametrize("values", NOTHING, ids=str)
def test_a_value_that_asks_for_nothing_is_taken(values):
    assert parse(ChatRequest, json.dumps({**CHAT, **values}).encode()).messages


SOMETHING = [
    ("best_of", True),
    ("echo", 0),
    ("echo", True),
    ("top_logprobs", 1),
    ("tools", [{"type": "function"}]),
    ("metadata", {"a": "b"}),
    ("response_format", {"type": "json_object"}),
    ("store", 0),
]


@pytest.mark.parametrize(("name", "value"), SOMETHING, ids=str)
def test_a_value_that_asks_for_something_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=f"^{name}: is not supported$"):
        parse(CompletionRequest, json.dumps({**ASKED, name: value}).encode())


@pytest.mark.parametrize("content", [5, None, {"text": "x"}, [5], [{"type": "image_url", "image_url": "x"}], [[]]])
def test_a_wrong_content_is_named_once(content):
    with pytest.raises(RequestError) as refused:
        parse(ChatRequest, json.dumps({**CHAT, "messages": [{"role": "user", "content": content}]}).encode())
    places = [line.partition(": ")[0] for line in refused.value.message.split("; ")]
    assert len(places) == len({*places})
    assert all(place.startswith("messages.0.content") for place in places)


def test_prompts_of_all_four_forms_are_continued_as_each_is_alone(client, loaded, encode):
    texts = ["the of and", "that is", ""]
    ids = [encode(text) for text in texts]
    answers = [client.completions.create(**{**ASKED, "prompt": text, "n": 2}) for text in texts]
    alone = [choice.text for answer in answers for choice in answer.choices]
    for prompt in (texts, ids, [[loaded.tokenizer.end_of_document, *each] for each in ids]):
        found = client.completions.create(**{**ASKED, "prompt": prompt, "n": 2})
        assert [choice.text for choice in found.choices] == alone
        assert [choice.index for choice in found.choices] == [*range(6)]
        assert found.usage.prompt_tokens == sum(len(each) + 1 for each in ids)
    found = client.completions.create(**{**ASKED, "prompt": ids[0], "n": 2})
    assert [choice.text for choice in found.choices] == alone[:2]
    streamed = [""] * 6
    for event in client.completions.create(**{**ASKED, "prompt": texts, "n": 2}, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == alone


@pytest.mark.parametrize(
    ("prompt", "output"),
    [
        ([], "give a text"),
        ([1, "x"], "give a text"),
        ([[1], "x"], "give a text"),
        ([True], "give a text"),
        ([70, 10**9], "1000000000 is not the id"),
        ([-1], "-1 is not the id"),
        ([70, 8], "8 is not the id"),  # a control symbol
        (["x"] * 65, "prompt, times n, is 65: at most 64"),
        ([70] * 700, "prompt has 700 tokens"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_are_refused(client, prompt, output):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{**ASKED, "prompt": prompt})
    assert output in error.value.body["message"]


def test_usage_counts_what_was_read_and_the_turns_that_were_not(client):
    messages = [{"role": "user", "content": "the of and to in is " * 3}] * 200
    found = client.chat.completions.create(**{**CHAT, "messages": messages, "max_tokens": 6})
    context = found.model_extra["lamda"]["context"]
    assert found.usage.prompt_tokens == context["tokens"] <= 250  # the row is 256
    assert 100 < found.usage.model_extra["turns_left_out"] == context["turns_left_out"] < 200
    assert found.usage.completion_tokens <= 6


def test_a_conversation_is_answered_for_ever_and_its_turns_are_read_from_the_cache(client, tokenizer):
    """Several times as long as the row; then its oldest turns leave, and what begins alike is the system text."""
    system = "be kind to all of them and to it " * 3
    messages, read, cached, left = [{"role": "system", "content": system}], [], [], []
    for number in range(20):
        messages.append({"role": "user", "content": f"the of and to in is {number}"})
        found = client.chat.completions.create(**{**CHAT, "messages": messages, "max_tokens": 12})
        messages.append(found.choices[0].message.model_dump())
        usage = found.usage
        read.append(usage.prompt_tokens)
        cached.append(usage.prompt_tokens_details.cached_tokens)
        left.append(usage.model_extra["turns_left_out"])
    assert max(read) <= 256 - 12
    assert left == sorted(left)
    whole = left.index(next(filter(None, left)))
    assert whole >= 3
    assert cached[1:whole] == [tokens - 1 for tokens in read[: whole - 1]]  # all but RESPONSE
    assert min(cached[1:]) > 32


def test_a_conversation_may_have_thousands_of_messages(loaded):
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 5000
    service = make_service(loaded, bytes=1_000_000)
    with serving(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        found = client.chat.completions.create(**{**CHAT, "messages": [*talk, *CHAT["messages"]], "max_tokens": 1})
    assert 4900 < found.usage.model_extra["turns_left_out"] < 5000


def test_a_conversation_may_hold_what_is_longer_than_any_prompt(client):
    long = {"role": "user", "content": "the of and to in is " * 700}
    for messages in ([long], [long, {"role": "assistant", "content": "x"}, *CHAT["messages"]]):
        found = client.chat.completions.create(**{**CHAT, "messages": messages})
        context = found.model_extra["lamda"]["context"]
        assert context["last_message_cut"] == (len(messages) == 1)


def test_a_client_cannot_weaken_the_operators_filter(loaded):
    service = make_service(loaded)
    service._options = service._options.__class__(candidates=2, threshold=0.3, sampling=service._options.sampling)
    with serving(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="threshold is 1: at most"):
            client.chat.completions.create(**CHAT, extra_body={"threshold": 1})
        found = client.chat.completions.create(**CHAT, extra_body={"threshold": 0})
        assert found.choices[0].finish_reason == "content_filter"
        assert found.usage.completion_tokens == 0


def test_a_server_of_chats_alone_completes_no_texts(loaded):
    with serving(make_service(loaded), chat_only=True) as address:
        headers = {"authorization": f"Bearer {KEY}"}
        assert httpx.post(f"{address}/v1/completions", json=ASKED, headers=headers).status_code == 404
        assert httpx.post(f"{address}/v1/chat/completions", json=CHAT, headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["s\xe9cret", "two\nlines", "a\tb", "\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_at_the_start(tmp_path, key):
    (tmp_path / "key").write_text(key, "utf-8")
    with pytest.raises(UserError, match="printable ASCII"):
        read_key(tmp_path / "key")


def test_keys_have_the_names_of_their_files(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    (tmp_path / "c").write_text("two")
    assert read_keys([tmp_path / "a", tmp_path / "b"]) == {"a": "one", "b": "two"}
    with pytest.raises(UserError, match="a key of its own"):
        read_keys([tmp_path / "b", tmp_path / "c"])
    monkeypatch.setenv("LAMDA_API_KEY", "three")
    assert read_keys([]) == {"LAMDA_API_KEY": "three"}


def test_one_keys_requests_keep_no_other_key_out(loaded):
    """Each may have so many requests at a time, and so many tokens."""
    service = make_service(loaded, key_requests=1, key_tokens=600)
    keys = {"one": "first", "other": "second"}
    with serving(service, keys=keys) as address:

        def client(key):
            return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)

        with client("first") as one, client("second") as other:
            stream = one.completions.create(**{**ASKED, "max_tokens": 500}, stream=True)
            next(iter(stream))
            with pytest.raises(openai.RateLimitError, match="1 requests of this key are in progress"):
                one.completions.create(**ASKED)
            assert other.completions.create(**ASKED).choices
            stream.close()
            with pytest.raises(openai.BadRequestError, match="at most 600"):
                other.completions.create(**{**ASKED, "max_tokens": 500, "n": 2})
            message = httpx.get(f"{address}/metrics", headers={"authorization": "Bearer second"}).text
    counted = re.findall(r'lamda_requests_total{key="(\w+)",status="(\d+)"} (\d)', message)
    assert {("one", "429", "1"), ("other", "200", "1"), ("other", "400", "1")} <= {*counted}


def test_who_works_may_finish_and_who_comes_later_is_sent_on(loaded):
    service, headers = make_service(loaded), {"authorization": f"Bearer {KEY}"}

    def come_later(address):
        while httpx.get(f"{address}/ready", timeout=60).status_code == 200:
            time.sleep(0.01)
        later = httpx.post(f"{address}/v1/completions", json=ASKED, headers=headers, timeout=60)
        return httpx.get(f"{address}/health", timeout=60).status_code, later.status_code, later.headers["retry-after"]

    with ThreadPoolExecutor() as pool:
        with serving(service, grace=60.0) as address:
            asked = {**ASKED, "max_tokens": 200, "n": 4}
            at_work = pool.submit(httpx.post, f"{address}/v1/completions", json=asked, headers=headers, timeout=60)
            while service.scheduler.rows == 0:
                time.sleep(0.001)
            assert httpx.get(f"{address}/ready").json() == {"status": "ready"}
            later = pool.submit(come_later, address)
        assert later.result() == (200, 503, "1")
        assert at_work.result().status_code == 200


@pytest.mark.parametrize(
    ("end", "again", "grace"),
    [(signal.SIGINT, 0, 0.2), (signal.SIGTERM, 0, 0.2), (signal.SIGHUP, 0, 0.2), (signal.SIGINT, signal.SIGINT, 600)],
)
def test_its_end_is_an_answer_to_whoever_is_at_work(run, end, again, grace):
    code = "import sys; from lamda.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
    environment = {name: value for name, value in os.environ.items() if name != "LAMDA_API_KEY"}
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(run), "--port", "0", "--grace", str(grace)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        address = re.search(r"http://\S+", server.stdout.readline()).group()
        asked = {**ASKED, "n": 64, "max_tokens": 2000}
        with httpx.stream("POST", f"{address}/v1/completions", json={**asked, "stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(end)
            while "active requests may take" not in server.stdout.readline():
                pass
            server.send_signal(again)  # 0 is none
            rest = "".join(lines)
        assert "the server is shutting down" in rest
        out, err = server.communicate(timeout=30)
        assert "active requests answered with 503: 1" in out
        assert "Traceback" not in err
    finally:
        server.kill()
        server.wait()
