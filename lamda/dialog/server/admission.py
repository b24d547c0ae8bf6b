"""Admission control: the slots of requests, the tokens that all may hold, and each request's right to continue."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lamda.dialog.server.limits import Limits
from lamda.dialog.server.protocol import RequestError


class ClientDisconnected(Exception):  # noqa: N818 - not an error: it ends a request whose client has left
    """The client has disconnected."""


class DeadlineExceeded(Exception):  # noqa: N818 - the client gets it as an answer
    """The request took longer than `Limits.seconds`."""


class ShuttingDown(Exception):  # noqa: N818 - the client gets it as an answer
    """The server is shutting down."""


class Ticket:
    """A request's right to continue, until its deadline, its client's disconnection or the server's shutdown."""

    def __init__(self, *, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._reason: type[ClientDisconnected | ShuttingDown] | None = None

    def abandon(self) -> None:
        """The client has left: computing stops at the next token, or the next piece of a prompt."""
        self._reason = self._reason or ClientDisconnected

    def end(self) -> None:
        """The server shuts down."""
        self._reason = self._reason or ShuttingDown

    def check(self) -> None:
        """Raises ClientDisconnected, ShuttingDown or DeadlineExceeded if the request may not continue."""
        if self._reason is not None:
            raise self._reason
        if time.monotonic() > self._deadline:
            raise DeadlineExceeded

    def reserve(self, tokens: int) -> None:
        """Reserve memory for the keys and values of this many tokens; `Slot` enforces the limit."""


class Slot(Ticket):
    """The ticket of an active request.

    Attributes:
        tokens: reserved; they are released when the request leaves.
    """

    def __init__(self, admission: Admission, limits: Limits) -> None:
        super().__init__(seconds=limits.seconds)
        self.tokens = 0
        self._admission = admission

    def reserve(self, tokens: int) -> None:
        """Raises RequestError if the active requests hold too much already."""
        self._admission.reserve(tokens)
        self.tokens += tokens


class Admission:
    """The slots of a server. Call `enter` from the event loop only; tokens are reserved in the requests' threads.

    Attributes:
        active: requests that hold a slot.
        tokens: reserved by them.
    """

    def __init__(self, limits: Limits) -> None:
        self.active = self.tokens = 0
        self._limits, self._lock = limits, threading.Lock()
        self._slots: set[Slot] = set()
        self._is_ending = False

    @contextmanager
    def enter(self) -> Iterator[Slot]:
        """Hold a slot. Raises RequestError if all are taken or the server is shutting down."""
        if self._is_ending:
            raise shutting_down()
        if self.active >= self._limits.requests:
            raise RequestError(429, f"{self._limits.requests} requests are in progress: try again soon")
        slot = Slot(self, self._limits)
        self.active += 1
        self._slots.add(slot)
        try:
            yield slot
        finally:
            slot.abandon()
            self.active -= 1
            self._slots.discard(slot)
            with self._lock:
                self.tokens -= slot.tokens

    def end(self) -> int:
        """Admit no more requests and end the active ones; returns their number."""
        self._is_ending = True
        for slot in self._slots:
            slot.end()
        return self.active

    def reserve(self, tokens: int) -> None:
        """For `Slot`. Raises RequestError: 400 for what never fits, 429 for what does not fit now."""
        most = self._limits.total_tokens
        if tokens > most:
            raise RequestError(
                400,
                f"prompt and max_tokens, times the choices or candidates, are {tokens:,} tokens: at most {most:,}",
                param="max_tokens",
            )
        with self._lock:
            if self.tokens + tokens > most:
                raise RequestError(429, f"active requests may hold {most:,} tokens together: try again soon")
            self.tokens += tokens


def shutting_down() -> RequestError:
    """The answer to clients during shutdown."""
    return RequestError(503, "the server is shutting down: try again later")
