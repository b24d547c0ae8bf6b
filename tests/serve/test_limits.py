"""What a hostile client cannot do to the others: each limit by itself, and what is left behind."""

from __future__ import annotations

import gc
import json
import logging
import re
import socket
import time
from collections import Counter
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from lamda.dialog.server.limits import SMALL_BODY
from tests.serve.conftest import KEY, make_service, serving

AUTHORIZED = {"authorization": f"Bearer {KEY}"}
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def post(address, path, body, **options):
    return httpx.post(f"{address}{path}", json=body, headers=AUTHORIZED, timeout=60, **options)


def asked(**more):
    return {"model": "random", "prompt": "the of", "max_tokens": 4, "seed": 1, **more}


def figures(address):
    lines = httpx.get(f"{address}/metrics", headers=AUTHORIZED).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def refusals(address):
    found: Counter[str] = Counter()
    for name, value in figures(address).items():
        if match := re.match(r'lamda_requests_total{key="\w*",status="(\d+)"}', name):
            found[match[1]] += int(value)
    return found


@contextmanager
def connected(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def head(path, *, length):
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def is_closed(connection):
    """Whether the server has closed it, once it does."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.fixture(scope="module")
def hasty(loaded):
    """A server that waits for nobody."""
    service = make_service(loaded, head_seconds=0.3, body_seconds=0.3, delivery_seconds=0.3, bytes=300_000)
    with serving(service) as address:
        yield address


@pytest.mark.parametrize("sent", [b"", b"GET /hea", head(TEXT, length=9)[:60]], ids=["nothing", "half", "most"])
def test_a_head_that_does_not_come_ends_its_connection(hasty, sent):
    with connected(hasty) as connection:
        connection.sendall(sent)
        assert is_closed(connection)


def test_a_body_that_does_not_come_is_refused_and_ends_its_connection(hasty):
    with connected(hasty) as connection:
        connection.sendall(head(TEXT, length=900) + b"{")
        answer = b""
        while data := connection.recv(65536):
            answer += data
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"longer than 0.3 seconds" in answer


def test_a_client_that_does_not_read_gives_its_place_back(loaded):
    service = make_service(loaded, requests=1, delivery_seconds=0.3)
    complete = service.complete

    def talkative(request, *, ticket, on_text):
        if on_text is not None:
            on_text(0, "x" * 20_000_000)  # more than the sockets' buffers hold
        return complete(request, ticket=ticket, on_text=on_text)

    service.complete = talkative
    with serving(service) as address, connected(address) as connection:
        body = json.dumps(asked(stream=True)).encode()
        connection.sendall(head(TEXT, length=len(body)) + body)
        assert connection.recv(10)
        end = time.monotonic() + 20
        while (found := post(address, TEXT, asked())).status_code == 429 and time.monotonic() < end:
            time.sleep(0.05)
        assert found.status_code == 200
        assert figures(address)['lamda_connections_closed_total{limit="delivery_seconds"}'] == 1


def test_one_connection_too_many_closes_the_one_that_waits_longest(loaded):
    with serving(make_service(loaded, connections=4)) as address, ExitStack() as stack:
        first, *_ = [stack.enter_context(connected(address)) for _ in range(6)]
        for _ in range(3):
            assert httpx.get(f"{address}/health").status_code == 200
        assert is_closed(first)


def test_large_bodies_that_do_not_come_keep_no_ordinary_request_out(loaded):
    limits = {"total_bytes": 2 * SMALL_BODY, "bytes": 300_000}
    with serving(make_service(loaded, **limits)) as address, connected(address) as one, connected(address) as other:
        for connection in (one, other):
            connection.sendall(head(CHAT, length=250_000) + b" " * 100_000)
        assert other.recv(65536).startswith(b"HTTP/1.1 429")
        assert post(address, TEXT, asked()).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"model": "random", "messages": [{}] * 24_000},
        {"model": "random", "messages": [0] * 49_000},
        {"model": "random", "messages": [{"role": "user", "content": [0] * 49_000}]},
        {"model": "random", "messages": [{"role": "user", "content": "x", "a": 1, "b": 2}] * 4000},
        {"model": "random", "messages": [{"role": "user", "content": "x"}], **{f"key{n}": 0 for n in range(20_000)}},
        {"model": "x" * 200_000, "messages": [{"role": "user", "content": "x"}]},
        {"model": "random", "messages": [{"role": "user", "content": "x"}], "y" * 200_000: 1},
    ],
    ids=["empty", "zeros", "parts", "unknown", "keys", "model", "key"],
)
def test_an_answer_is_short_whatever_is_wrong(hasty, body):
    found = post(hasty, CHAT, body)
    assert found.status_code in (400, 404)
    assert len(found.content) < 2000


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 10**4299},
        {"n": 10**4299},
        {"n": 10**4299, "prompt": ["x"] * 64},
        {"top_k": 10**4299},
        {"prompt": [10**4299]},
    ],
    ids=["max_tokens", "n", "product", "top_k", "id"],
)
def test_a_number_of_thousands_of_digits_is_refused_in_short(address, values):
    found = post(address, TEXT, asked(**values))
    assert found.status_code == 400
    assert len(found.content) < 300


def test_twenty_problems_are_named_and_the_others_counted(hasty):
    message = post(hasty, TEXT, asked(**{f"key{number}": 0 for number in range(50)})).json()["error"]["message"]
    assert message.count("is not a parameter") == 20
    assert message.endswith("and 30 more")


def test_the_tokens_of_all_requests_together_are_bounded(loaded):
    service = make_service(loaded, total_tokens=1000)
    with serving(service) as address:
        found = post(address, TEXT, asked(n=64, max_tokens=100))
        assert found.status_code == 400
        assert "at most 1,000" in found.json()["error"]["message"]
        with httpx.stream("POST", f"{address}{TEXT}", json=asked(n=3, max_tokens=300, stream=True), headers=AUTHORIZED):
            found = post(address, TEXT, asked(n=1, max_tokens=300))
            assert (found.status_code, found.headers["retry-after"]) == (429, "1")
        end = time.monotonic() + 20
        while figures(address)["lamda_tokens_reserved"] and time.monotonic() < end:
            time.sleep(0.02)
        assert post(address, TEXT, asked(n=1, max_tokens=300)).status_code == 200


@pytest.mark.parametrize(
    "values",
    [{"temperature": 5e-324}, {"temperature": 1e-308}, {"repetition_penalty": 1e-40}, {"repetition_penalty": 1e-3}],
    ids=str,
)
def test_values_with_which_logits_overflow_are_refused_by_name(address, values):
    found = post(address, TEXT, asked(prompt="", **values))
    assert found.status_code == 400
    assert found.json()["error"]["param"] in values


def test_every_refusal_is_counted(loaded):
    with serving(make_service(loaded)) as address:
        url = f"{address}{TEXT}"
        for headers in ({}, {**AUTHORIZED, "host": "evil.example"}, {**AUTHORIZED, "origin": "http://evil.example"}):
            httpx.post(url, json=asked(), headers=headers)
        httpx.post(url, content=b"x", headers={**AUTHORIZED, "content-type": "text/plain"})
        httpx.post(url, json=asked(prompt="x" * 60_000), headers=AUTHORIZED)
        post(address, TEXT, asked(model="other"))
        post(address, TEXT, {})
        with connected(address) as connection:
            connection.sendall(b"\x00\r\n\r\n")
            assert is_closed(connection)
        found = refusals(address)
    expected = {"401": 1, "421": 1, "403": 1, "415": 1, "413": 1, "404": 1, "400": 2}
    assert {status: found.get(status) for status in expected} == expected


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "x", "://", "http://\xe9", ""])
def test_an_origin_that_nobody_can_read_is_refused(address, origin):
    headers = {**AUTHORIZED, "origin": origin.encode("latin-1")}
    found = httpx.get(f"{address}/v1/models", headers=headers)
    assert found.status_code == 403
    assert "content-security-policy" in found.headers


def test_a_client_that_left_leaves_nothing_behind_and_no_word_in_the_log(loaded, alive, collector_off, caplog):
    service = make_service(loaded)
    with serving(service) as address:
        for stream in (True, False, True):
            with connected(address) as connection:
                body = json.dumps(asked(n=16, max_tokens=590, stream=stream)).encode()
                connection.sendall(head(TEXT, length=len(body)) + body)
                before = service.scheduler.steps
                while service.scheduler.steps == before:
                    time.sleep(0.01)
        deadline = time.monotonic() + 20
        while len(alive) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(alive) == 0
        assert refusals(address)["499"] == 3
    gc.collect()
    assert not [record.message for record in caplog.records if record.levelno >= logging.ERROR]
