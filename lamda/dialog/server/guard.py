"""Checks before any request is handled: host name, origin, API key, size and time of the body.

Every response also passes through here, gets the security headers and is counted.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from prometheus_client import Counter

from lamda.dialog.server.admission import ShuttingDown
from lamda.dialog.server.limits import SMALL_BODY, Limits
from lamda.dialog.server.protocol import RequestError, shortened

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OUTCOME = "lamda.outcome"
"""Key of the ASGI scope for the outcome to count, if it is not the response's status."""

KEY, REQUEST_ID = "lamda.key", "lamda.request_id"
"""Keys of the scope for the name of the client's API key, and for the id that the response's header has."""

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_OPEN = ("/", "/health", "/ready")
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        b"require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class RequestGuard:
    """ASGI middleware."""

    def __init__(
        self, app: App, *, hosts: frozenset[str], keys: Mapping[str, str], limits: Limits, requests: Counter
    ) -> None:
        """hosts: allowed Host headers, against DNS rebinding. keys: by name; if there are any, requests
        carry one as `Authorization: Bearer`, except for the page, /health and /ready. requests: counts requests by
        status and key.
        """
        self._app, self._hosts, self._keys, self._limits, self._requests = app, hosts, keys, limits, requests
        self._reading: set[asyncio.Timeout] = set()
        self._held = 0
        self._is_ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject the request or pass it on; adds the security headers to every response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[OUTCOME] = 499  # unless a response starts, the client has left
        scope[KEY], scope[REQUEST_ID] = "", f"req_{uuid.uuid4().hex}"
        request_id = (b"x-request-id", scope[REQUEST_ID].encode())

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope[OUTCOME] = message["status"]
                message = {**message, "headers": [*message.get("headers", []), request_id, *_HEADERS]}
            await send(message)

        try:
            await self._pass(scope, receive, with_headers)
        finally:
            self._requests.labels(str(scope[OUTCOME]), scope[KEY]).inc()

    def end(self) -> None:
        """Answer clients that are still sending a body with 503."""
        self._is_ending = True
        for timeout in self._reading:
            timeout.reschedule(0)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            scope[KEY] = self._check(scope["path"], headers)
            body = await self._read(headers, receive) if scope["method"] == "POST" else b""
        except RequestError as error:
            await send_error(error, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _check(self, path: str, headers: dict[str, str]) -> str:
        """The name of the key. Raises RequestError."""
        host = headers.get("host", "")
        if _name(host) not in self._hosts:
            raise RequestError(421, f"host {shortened(host)} is not allowed; `lamda serve --allow-host NAME` allows it")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestError(403, "cross-origin requests are not allowed")
        is_open = path in _OPEN or path.startswith("/static/")
        if not self._keys or is_open:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        found = [name for name, key in self._keys.items() if hmac.compare_digest(given.encode(), key.encode())]
        if not found:
            raise RequestError(401, "the key is missing or wrong: send it as `Authorization: Bearer KEY`")
        return found[0]

    async def _read(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The body, or None if the client disconnected. Raises RequestError for one that is too long or too slow."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            shown = shortened(kind) if kind else "missing"
            raise RequestError(415, f"the content type is {shown}: send application/json")
        coding = headers.get("content-encoding", "").strip().lower()
        if coding not in ("", "identity"):
            raise RequestError(415, f"the content encoding is {shortened(coding)}: send the body as it is")
        if "transfer-encoding" in headers:
            raise RequestError(411, "the body is chunked: send its content-length")
        body = bytearray()
        try:
            async with asyncio.timeout(0 if self._is_ending else self._limits.body_seconds) as timeout:
                self._reading.add(timeout)
                while await self._append(body, receive):
                    pass
        except TimeoutError:
            if self._is_ending:
                raise ShuttingDown from None
            raise RequestError(408, f"the body took longer than {self._limits.body_seconds:g} seconds") from None
        except ConnectionError:
            return None
        finally:
            self._reading.discard(timeout)
            self._held -= _counted(body)
        return bytes(body)

    async def _append(self, body: bytearray, receive: Receive) -> bool:
        """Append the next part; whether more follows. Raises ConnectionError on disconnection, and RequestError."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        before = _counted(body)
        body += message.get("body", b"")
        self._held += _counted(body) - before
        if len(body) > self._limits.bytes:
            most = f"{self._limits.bytes:,} bytes"
            raise RequestError(413, f"the body is longer than {most}: of a conversation, send the newest messages")
        if self._held > self._limits.total_bytes and len(body) > SMALL_BODY:
            raise RequestError(429, f"bodies of {self._limits.total_bytes:,} bytes are being read: try again soon")
        return bool(message.get("more_body", False))


def _counted(body: bytearray) -> int:
    return len(body) if len(body) > SMALL_BODY else 0


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty if it is malformed."""
    named = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:@,/?#\s]*))(?::\d*)?", host)
    return (named[1] or named[2] or "").lower() if named else ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then further messages: the client's disconnection."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def send_error(error: RequestError, send: Send) -> None:
    """Answer with an error; closes the connection if the body is not read to its end."""
    body = json.dumps(error.to_record()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (408, 411):
        headers.append((b"connection", b"close"))
    if error.status in (429, 503):
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
