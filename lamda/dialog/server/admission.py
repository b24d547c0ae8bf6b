"""Admission control: the slots of requests, the tokens that all may hold, and each request's right to continue."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lamda.dialog.server.limits import Limits
from lamda.dialog.server.protocol import RequestError


class ClientDisconnected(RequestError):  # noqa: N818 - not an error: it ends a request whose client has left
    """The client has disconnected."""

    def __init__(self) -> None:
        super().__init__(499, "the client has disconnected")


class DeadlineExceeded(RequestError):  # noqa: N818
    """The request took longer than `Limits.seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(504, f"the request took longer than {seconds:g} seconds")


class ShuttingDown(RequestError):  # noqa: N818
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down: try again later")


class Ticket:
    """A request's right to continue, until its deadline, its client's disconnection or the server's shutdown."""

    def __init__(self, *, seconds: float, request_id: str = "") -> None:
        """request_id: for the log."""
        self.request_id = request_id
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
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
            raise DeadlineExceeded(self._seconds)


class Slot(Ticket):
    """The ticket of an active request. tokens: reserved; they are released when the request leaves. key: its name."""

    def __init__(self, admission: Admission, *, seconds: float, key: str, request_id: str) -> None:
        super().__init__(seconds=seconds, request_id=request_id)
        self.tokens, self.key, self._admission = 0, key, admission

    def reserve(self, tokens: int) -> None:
        """Reserve memory for the keys and values of tokens. Raises RequestError as `Admission.reserve`."""
        self._admission.reserve(tokens, key=self.key)
        self.tokens += tokens


@dataclass
class _Use:
    """Requests and tokens of one key."""

    active: int = 0
    tokens: int = 0


class Admission:
    """The slots of a server. Call `enter` from the event loop only; tokens are reserved in the requests' threads.

    active: requests that hold a slot. tokens: reserved by them. is_ending: whether the server is shutting down.
    """

    def __init__(self, limits: Limits) -> None:
        self.active = self.tokens = 0
        self.is_ending = False
        self._by_key: defaultdict[str, _Use] = defaultdict(_Use)
        self._limits, self._lock = limits, threading.Lock()
        self._slots: set[Slot] = set()

    @contextmanager
    def enter(self, *, key: str, request_id: str) -> Iterator[Slot]:
        """Hold a slot. Raises RequestError if all, or all of the key, are taken or the server is shutting down."""
        if self.is_ending:
            raise ShuttingDown
        use, most = self._by_key[key], self._limits.key_requests
        if self.active >= self._limits.requests:
            raise RequestError(429, f"{self._limits.requests} requests are in progress: try again soon")
        if most is not None and use.active >= most:
            raise RequestError(429, f"{most} requests of this key are in progress: try again soon")
        slot = Slot(self, seconds=self._limits.seconds, key=key, request_id=request_id)
        self.active += 1
        use.active += 1
        self._slots.add(slot)
        try:
            yield slot
        finally:
            slot.abandon()
            self.active -= 1
            use.active -= 1
            self._slots.discard(slot)
            with self._lock:
                self.tokens -= slot.tokens
                use.tokens -= slot.tokens

    def end(self) -> int:
        """Admit no more requests and end the active ones; returns their number."""
        self.is_ending = True
        for slot in self._slots:
            slot.end()
        return self.active

    def reserve(self, tokens: int, *, key: str) -> None:
        """For `Slot`. Raises RequestError: 400 for what never fits, 429 for what does not fit now."""
        of_key = self._limits.total_tokens if self._limits.key_tokens is None else self._limits.key_tokens
        most = min(self._limits.total_tokens, of_key)
        if tokens > most:
            problem = f"prompt and max_tokens, times the choices or candidates, are {tokens:,} tokens: at most {most:,}"
            raise RequestError(400, problem, param="max_tokens")
        with self._lock:
            use = self._by_key[key]
            for holder, held, limit in (
                ("", self.tokens, self._limits.total_tokens),
                (" of this key", use.tokens, of_key),
            ):
                if held + tokens > limit:
                    problem = f"active requests{holder} may hold {limit:,} tokens together: try again soon"
                    raise RequestError(429, problem)
            self.tokens += tokens
            use.tokens += tokens
