"""Who may be at work: the places of requests, the tokens that all may hold, and each one's right to continue."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from lamda.dialog.server.limits import Limits
from lamda.dialog.server.protocol import Refused


class Abandoned(Exception):  # noqa: N818 - no error, but what ends a request whose client has left
    """The client has gone."""


class TooLong(Exception):  # noqa: N818 - the client gets it as an answer
    """The request has taken longer than is allowed."""


class Ending(Exception):  # noqa: N818 - the client gets it as an answer
    """The server is ending."""


class Ticket:
    """A request's right to continue: until its time is over, its client has gone, or the server ends."""

    def __init__(self, *, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._reason: type[Abandoned | Ending] | None = None

    def abandon(self) -> None:
        """The client has gone: what is computed for it ends with the next token, or the next piece of a prompt."""
        self._reason = self._reason or Abandoned

    def end(self) -> None:
        """The server is ending."""
        self._reason = self._reason or Ending

    def check(self) -> None:
        """Raises Abandoned, Ending or TooLong where the request may not continue."""
        if self._reason is not None:
            raise self._reason
        if time.monotonic() > self._ends:
            raise TooLong

    def reserve(self, tokens: int) -> None:
        """Take room for the keys and values of so many tokens; `Place` limits it."""


class Admission:
    """The places of a server. `enter` is for the event loop alone, tokens are reserved in the requests' threads.

    Attributes:
        at_work: requests that have a place.
        tokens: that they have reserved.
    """

    def __init__(self, limits: Limits) -> None:
        self.at_work = self.tokens = 0
        self._limits, self._lock = limits, threading.Lock()
        self._places: set[Place] = set()
        self._is_ending = False

    def enter(self) -> Place:
        """A place, to be used as a context. Raises Refused where all are taken, or the server is ending."""
        if self._is_ending:
            raise ending()
        if self.at_work >= self._limits.requests:
            raise Refused(429, f"{self._limits.requests} requests are at work: try again soon")
        return Place(self, self._limits)

    def end(self) -> int:
        """Nobody enters from now on, and whoever is at work ends; how many they are."""
        self._is_ending = True
        for place in self._places:
            place.end()
        return self.at_work

    def add(self, place: Place) -> None:
        """For `Place`."""
        self.at_work += 1
        self._places.add(place)

    def remove(self, place: Place, tokens: int) -> None:
        """For `Place`."""
        self.at_work -= 1
        self._places.discard(place)
        with self._lock:
            self.tokens -= tokens

    def reserve(self, tokens: int) -> None:
        """For `Place`. Raises Refused: 400 for what never fits, 429 for what does not fit now."""
        most = self._limits.total_tokens
        if tokens > most:
            raise Refused(
                400,
                f"prompt and max_tokens, times the choices or candidates, are {tokens:,} tokens: at most {most:,}",
                param="max_tokens",
            )
        with self._lock:
            if self.tokens + tokens > most:
                raise Refused(429, f"the requests at work may hold {most:,} tokens together: try again soon")
            self.tokens += tokens


class Place(Ticket):
    """A place among the requests at work; what it reserved is free when the context ends."""

    def __init__(self, admission: Admission, limits: Limits) -> None:
        super().__init__(seconds=limits.seconds)
        self._admission, self._reserved = admission, 0

    def __enter__(self) -> Self:
        self._admission.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abandon()
        self._admission.remove(self, self._reserved)

    def reserve(self, tokens: int) -> None:
        """Raises Refused where the requests at work hold too much already."""
        self._admission.reserve(tokens)
        self._reserved += tokens


def ending() -> Refused:
    """What clients get while the server ends."""
    return Refused(503, "the server is ending: try again later")
