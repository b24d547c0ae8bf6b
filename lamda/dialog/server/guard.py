"""What every request passes before anything reads it: the host's name, the origin, the key, the body's size and time.

It is also what every answer passes: each is counted here, whoever gave it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from lamda.dialog.server.admission import ending
from lamda.dialog.server.limits import SMALL_BODY, Limits
from lamda.dialog.server.metrics import Metrics
from lamda.dialog.server.protocol import Refused, shortened

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OUTCOME = "lamda.outcome"
"""The key of a scope under which whoever answers says what became of a request, where the status does not."""

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_OPEN = ("/", "/health")
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: App, *, hosts: frozenset[str], key: str | None, limits: Limits, metrics: Metrics) -> None:
        """hosts: names by which clients may call this server. A page elsewhere whose name was made to point here
        (DNS rebinding) calls it by another. key: what `Authorization: Bearer` must carry, where there is one;
        the page and /health need none.
        """
        self._app, self._hosts, self._key, self._limits, self._metrics = app, hosts, key, limits, metrics
        self._reading: set[asyncio.Timeout] = set()
        self._held = 0
        self._is_ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or passes the request on; every answer has the headers that confine a page."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[OUTCOME] = 499  # where no answer begins, the client has left

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope[OUTCOME] = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        try:
            await self._pass(scope, receive, with_headers)
        finally:
            self._metrics.requests.labels(str(scope[OUTCOME])).inc()

    def end(self) -> None:
        """Whoever is still sending a body gets the answer that the server is ending."""
        self._is_ending = True
        for timeout in self._reading:
            timeout.reschedule(0)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope["path"], headers)
            body = await self._read(headers, receive) if scope["method"] == "POST" else b""
        except Refused as refused:
            await refuse(refused, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if _name(host) not in self._hosts:
            raise Refused(
                421, f"this server is not called {shortened(host)}; `lamda serve --allow-host NAME` lets it be"
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "pages of other servers may not ask this one")
        is_open = path in _OPEN or path.startswith("/static/")
        if self._key is not None and not is_open:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
                raise Refused(401, "the key is missing or wrong: send it as `Authorization: Bearer KEY`")

    async def _read(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The body, or None where the client has left. Raises Refused where it is too long or takes too long."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"the content type is {shortened(kind) if kind else 'missing'}: send application/json")
        coding = headers.get("content-encoding", "").strip().lower()
        if coding not in ("", "identity"):
            raise Refused(415, f"the content encoding is {shortened(coding)}: send the body as it is")
        if "transfer-encoding" in headers:
            raise Refused(411, "the body is chunked: send its content-length")
        body = bytearray()
        try:
            async with asyncio.timeout(0 if self._is_ending else self._limits.body_seconds) as timeout:
                self._reading.add(timeout)
                while await self._append(body, receive):
                    pass
        except TimeoutError:
            raise (
                ending()
                if self._is_ending
                else Refused(408, f"the body took longer than {self._limits.body_seconds:g} seconds")
            ) from None
        except ConnectionError:
            return None
        finally:
            self._reading.discard(timeout)
            self._held -= _counted(body)
        return bytes(body)

    async def _append(self, body: bytearray, receive: Receive) -> bool:
        """Add what comes next; whether more does. Raises ConnectionError where the client has left, and Refused."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        before = _counted(body)
        body += message.get("body", b"")
        self._held += _counted(body) - before
        if len(body) > self._limits.bytes:
            raise Refused(413, f"the body is longer than {self._limits.bytes:,} bytes")
        if self._held > self._limits.total_bytes and len(body) > SMALL_BODY:
            raise Refused(429, f"bodies of {self._limits.total_bytes:,} bytes are being read: try again soon")
        return bool(message.get("more_body", False))


def is_chunked(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a body comes in chunks."""
    return any(name == b"transfer-encoding" for name, _ in headers)


def _counted(body: bytearray) -> int:
    return len(body) if len(body) > SMALL_BODY else 0


def _name(host: str) -> str:
    """The name in a Host header, without its port; nothing where it is no name and port."""
    named = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:@,/?#\s]*))(?::\d*)?", host)
    return (named[1] or named[2] or "").lower() if named else ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever comes: the client's leaving."""
    given = False

    async def again() -> Message:
        nonlocal given, body
        if given:
            return await receive()
        given, read, body = True, body, b""
        return {"type": "http.request", "body": read, "more_body": False}

    return again


async def refuse(refused: Refused, send: Send) -> None:
    """Answer with an error. Where the body is not read to its end, the connection ends with it."""
    body = json.dumps(refused.to_record()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status in (408, 411):
        headers.append((b"connection", b"close"))
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
