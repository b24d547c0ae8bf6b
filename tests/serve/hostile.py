"""Hostile clients of the server: one function for each way to break its limits. They use raw sockets.

`python -m tests.serve.hostile PORT KEY CLIENTS SECONDS` runs them in a process of its own, and prints as JSON how often
each way was tried. They speak to this machine's loopback alone, and end by themselves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONGEST = 45.0
"""Seconds for which a client holds a connection at the most, longer than the server lets any wait."""


class Client:
    """Who attacks: the server's port and key."""

    def __init__(self, port: int, key: str) -> None:
        self.port, self.key = port, key

    def head(self, path: str, *, length: int | None, method: str = "POST", **headers: str) -> bytes:
        """Of a request; without a length it is chunked."""
        size = {"transfer-encoding": "chunked"} if length is None else {"content-length": str(length)}
        own = {"host": f"127.0.0.1:{self.port}", "authorization": f"Bearer {self.key}", **size}
        lines = [
            f"{name.replace('_', '-')}: {value}"
            for name, value in ({**own, "content-type": "application/json"} | headers).items()
        ]
        return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")

    async def ask(self, path: str, body: object, reader: Reader, writer: Writer, **headers: str) -> None:
        """A whole request, and its answer up to its end, or for some time."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        writer.write(self.head(path, length=len(data), **headers) + data)
        await writer.drain()
        await drained(reader, random.uniform(0, 10))


async def drained(reader: Reader, seconds: float) -> None:
    """Read what comes for so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while await reader.read(65536):
                pass


def asked(**more: object) -> dict[str, object]:
    return {"model": "random", "prompt": "the of", "max_tokens": 4, **more}


def chat(*messages: object, **more: object) -> dict[str, object]:
    return {
        "model": "random",
        "messages": list(messages) or [{"role": "user", "content": "hi"}],
        "max_tokens": 4,
        **more,
    }


async def idle(_: Client, reader: Reader, writer: Writer) -> None:
    await drained(reader, LONGEST)


async def slow_head(client: Client, reader: Reader, writer: Writer) -> None:
    for byte in client.head(TEXT, length=9):
        writer.write(bytes([byte]))
        await asyncio.sleep(1)
        if reader.at_eof():
            return


async def slow_body(client: Client, reader: Reader, writer: Writer) -> None:
    writer.write(client.head(CHAT, length=900_000))
    for _ in range(int(LONGEST)):
        writer.write(b" " * random.choice([1, 100, 20_000]))
        await asyncio.sleep(1)
        if reader.at_eof():
            return


async def half_body(client: Client, reader: Reader, writer: Writer) -> None:
    writer.write(client.head(CHAT, length=900_000) + b"[" * 800_000)
    await drained(reader, LONGEST)


async def endless_body(client: Client, reader: Reader, writer: Writer) -> None:
    writer.write(client.head(random.choice([TEXT, "/health"]), length=None, method=random.choice(["POST", "GET"])))
    for _ in range(100):
        writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)


async def tiny_chunks(client: Client, reader: Reader, writer: Writer) -> None:
    writer.write(client.head(TEXT, length=None) + b"1\r\n{\r\n" * 3000)
    await drained(reader, 20)


async def never_reads(client: Client, reader: Reader, writer: Writer) -> None:
    data = json.dumps(asked(n=random.choice([1, 16, 64]), max_tokens=2000, stream=True, temperature=1.9)).encode()
    writer.transport.pause_reading()
    writer.write(client.head(TEXT, length=len(data)) + data)
    await asyncio.sleep(LONGEST)


async def never_reads_many(client: Client, reader: Reader, writer: Writer) -> None:
    writer.transport.pause_reading()
    for _ in range(200):
        writer.write(client.head("/metrics", length=0, method="GET"))
    await asyncio.sleep(LONGEST)


async def leaves(client: Client, reader: Reader, writer: Writer) -> None:
    stream = random.choice([True, False])
    data = json.dumps(asked(n=random.randint(1, 64), max_tokens=2000, stream=stream)).encode()
    writer.write(client.head(TEXT, length=len(data)) + data)
    await drained(reader, random.uniform(0, 3))


async def long_prompts(client: Client, reader: Reader, writer: Writer) -> None:
    await client.ask(TEXT, asked(prompt="the of and to " * 480, max_tokens=2), reader, writer)


async def huge_products(client: Client, reader: Reader, writer: Writer) -> None:
    body = random.choice(
        [
            asked(n=64, max_tokens=2048),
            asked(prompt=["the"] * 64, max_tokens=2048, stream=True),
            asked(n=10**9),
            asked(prompt=["x"] * 5000),
            chat(candidates=64, max_tokens=2048),
            chat(candidates=10**6),
        ]
    )
    await client.ask(CHAT if "messages" in body else TEXT, body, reader, writer)


async def malformed(client: Client, reader: Reader, writer: Writer) -> None:
    body = random.choice(
        [
            lambda: chat(*[{}] * 300_000),
            lambda: chat(*[0] * 300_000),
            lambda: chat({"role": "user", "content": [0] * 300_000}),
            lambda: chat(**{f"k{number}": 0 for number in range(70_000)}),
            lambda: chat(*[{"role": "user", "content": "x", "a": 1, "b": 2}] * 15_000),
            lambda: chat(*[{"role": "user", "content": "x"}] * 16_000),
            lambda: asked(prompt="x" * 990_000),
            lambda: asked(prompt=" " * 990_000),
            lambda: asked(prompt=[[]] * 40_000),
            lambda: asked(prompt=[10**18, -1]),
            lambda: asked(stop=[""] * 90_000),
            lambda: asked(logit_bias={str(number): 1 for number in range(40_000)}),
            lambda: asked(model="x" * 900_000),
            lambda: b"[" * 900_000,
            lambda: b'{"a":' * 100_000,
            lambda: b'{"model":"random","prompt":"\\ud800"}',
            lambda: b'{"seed":' + b"1" * 900_000 + b"}",
            lambda: b"\xff\xfe" * 1000,
            lambda: b"",
            lambda: b" " * 3_000_000,
        ]
    )()
    await client.ask(random.choice([CHAT, TEXT]), body, reader, writer)


async def denormals(client: Client, reader: Reader, writer: Writer) -> None:
    name = random.choice(["temperature", "repetition_penalty", "top_p", "threshold"])
    value = random.choice([5e-324, 1e-308, 1e-40, 1e-4, -0.0, 1.7e308])
    await client.ask(TEXT, asked(prompt="", max_tokens=8, **{name: value}), reader, writer)


async def wrong_head(client: Client, reader: Reader, writer: Writer) -> None:
    headers = random.choice(
        [
            {"authorization": "Bearer wrong"},
            {"authorization": "\xe9" * 9},
            {"host": "evil.example"},
            {"host": "[::1"},
            {"origin": "http://["},
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"content_type": "text/plain"},
            {"x": "y" * 15_000},
            {"x": "y" * 90_000},
            {"upgrade": "websocket", "connection": "upgrade"},
            {"expect": "100-continue"},
            {"transfer_encoding": "chunked"},
        ]
    )
    path = random.choice([CHAT, TEXT, "/health", "/%00", "/static/..%2f..%2fmain.py", "/v1/models/" + "x" * 9000])
    await client.ask(path, asked(), reader, writer, **headers)


async def garbage(client: Client, reader: Reader, writer: Writer) -> None:
    writer.write(
        random.choice(
            [random.randbytes(5000), b"GET / HTTP/1.1\r\n\r\n" * 50, b"\r\n" * 9000, b"PRI * HTTP/2.0\r\n\r\n"]
        )
    )
    await drained(reader, 5)


async def pipelined(client: Client, reader: Reader, writer: Writer) -> None:
    data = json.dumps(asked()).encode()
    writer.write((client.head(TEXT, length=len(data)) + data) * 50 + b"\x00garbage\r\n\r\n")
    await drained(reader, random.uniform(0, 20))


async def half_closed(client: Client, reader: Reader, writer: Writer) -> None:
    data = json.dumps(asked(max_tokens=500)).encode()
    writer.write(client.head(TEXT, length=len(data)) + data)
    writer.write_eof()
    await drained(reader, 20)


Way = Callable[[Client, Reader, Writer], Awaitable[None]]
WAYS: tuple[Way, ...] = (
    idle, slow_head, slow_body, half_body, endless_body, tiny_chunks, never_reads, never_reads_many, leaves,
    long_prompts, huge_products, malformed, denormals, wrong_head, garbage, pipelined, half_closed,
)  # fmt: skip


async def attack(client: Client, way: Way) -> None:
    """Once, on a connection of its own. Whatever the server does to it is right."""
    with suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1 << 16)
        try:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(LONGEST):
                    await way(client, reader, writer)
        finally:
            writer.transport.abort()


async def attack_all(client: Client, *, clients: int, seconds: float) -> Counter[str]:
    """So many clients, each in one way after another, for so long; how often each way was tried."""
    tried: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def one(number: int) -> None:
        await asyncio.sleep(random.uniform(0, min(10, seconds / 4)))
        for turn in count(number):
            if time.monotonic() > end:
                return
            way = WAYS[turn % len(WAYS)]
            tried[way.__name__] += 1
            await attack(client, way)
            await asyncio.sleep(random.uniform(0.5, 4))

    tasks = [asyncio.create_task(one(number)) for number in range(clients)]
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return tried


if __name__ == "__main__":
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # what is sent to a closed connection is no news here
    port, key, clients, seconds = sys.argv[1:]
    print(json.dumps(asyncio.run(attack_all(Client(int(port), key), clients=int(clients), seconds=float(seconds)))))
