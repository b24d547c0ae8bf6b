"""Connections: how many are open, how long each may wait, and how the server ends.

Uvicorn's HTTP/1.1 protocol limits the size of a head and the time between two requests. Here it also gets a time for
a head to come, a time for a request as a whole, a least speed at which its client reads, and a number of connections.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lamda.data.open_files import allow_open_files
from lamda.dialog.server.app import App
from lamda.dialog.server.guard import is_chunked

HEAD_BYTES = 16_384
"""Of a request's head."""

READ_BYTES = 65_536
"""What a client that does not keep up must read in `Limits.delivery_seconds`, or the rest where that is less."""

_SLICE = 4096
_GRACE_SECONDS = 5
_OTHER_DESCRIPTORS = 64


class Server(uvicorn.Server):
    """An application on a socket. SIGINT, SIGTERM or SIGHUP ends it, when all requests at work are answered.

    A SIGHUP that is ignored, as under nohup, stays so.
    """

    def __init__(self, app: App, *, on_end: Callable[[int], None] = lambda _: None) -> None:
        """on_end: gets the number of requests that are at work when the server ends; they get 503."""
        self._app, self._on_end = app, on_end
        doors = Doors(app)
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, doors=doors),  # type: ignore[arg-type]
                loop="asyncio",
                backlog=doors.most,
                ws="none",
                lifespan="on",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEAD_BYTES,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As Uvicorn does, and SIGHUP, which a terminal sends that closes."""
        with super().capture_signals():
            before = signal.getsignal(signal.SIGHUP)
            if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
                yield
                return
            signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As Uvicorn does, after whoever is at work was ended."""
        self._on_end(self._app.end())
        await super().shutdown(sockets)


class Doors:
    """What all connections share: their limits, and those that wait for a request, the longest waiting first."""

    def __init__(self, app: App) -> None:
        self.limits, self.metrics = app.limits, app.metrics
        # A burst is accepted before the first of it can be cut off: each connection has two descriptors set aside.
        descriptors = allow_open_files(2 * app.limits.connections + _OTHER_DESCRIPTORS)
        self.most = max(min(app.limits.connections, (descriptors - _OTHER_DESCRIPTORS) // 2), 1)
        self.waiting: dict[Connection, None] = {}


class Connection(H11Protocol):
    """One connection. Whoever breaks a limit is cut off: there is nothing to answer, or nobody who reads it."""

    def __init__(self, *arguments: Any, doors: Doors, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._doors = doors
        self._timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Where there are too many, the one that has waited longest for a request leaves, or else this one."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self._doors.most:
            idle = (each for each in self._doors.waiting if not each.flow.write_paused)
            next(idle, self).cut("connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing of it stays."""
        self._doors.waiting.pop(self, None)
        for timer in (self._timer, self._reader):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """A head that is complete begins a request; what comes behind one that was answered is bounded.

        h11 takes some 50 microseconds for each chunk of a chunked body, however small. It gets little at a time, and
        none of such a body, which is refused: no client of this protocol needs it.
        """
        while data and not self.transport.is_closing() and not self._has_chunks:
            size = len(data) if self._is_at_work else _SLICE
            super().data_received(data[:size])
            data = data[size:]
            self._unread += size
        if self._is_at_work:
            self._work()
            return
        if self._unread > self._doors.limits.bytes:
            self.cut("bytes")

    def on_response_complete(self) -> None:
        """The next request is waited for. One that was sent before this answer is not taken: it would come for free."""
        if self.conn.trailing_data[0] or self._has_chunks:
            self.transport.close()
        super().on_response_complete()
        self._wait()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is counted as every other refusal."""
        self._doors.metrics.requests.labels("400").inc()
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # it came behind an answer that has begun
            self.cut("protocol")

    def pause_writing(self) -> None:
        """The client does not keep up: from here on it must read at a least speed."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """It has read what there was."""
        super().resume_writing()
        if self._reader is not None:
            self._reader.cancel()

    def shutdown(self) -> None:
        """The server ends: nothing is waited for that a client might never read."""
        if self.flow.write_paused:
            self.cut("ending")
        else:
            super().shutdown()

    def cut(self, limit: str) -> None:
        """End it without waiting for anything."""
        self._doors.waiting.pop(self, None)
        self._doors.metrics.closed.labels(limit).inc()
        self.transport.abort()

    @property
    def _has_chunks(self) -> bool:
        return self.cycle is not None and is_chunked(self.headers)

    @property
    def _is_at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        """For a request."""
        self._unread = 0
        self._doors.waiting[self] = None
        self._limit(self._doors.limits.head_seconds, self._no_head)

    def _work(self) -> None:
        """On a request that has just begun, if it has."""
        if self in self._doors.waiting:
            del self._doors.waiting[self]
            limits = self._doors.limits
            self._limit(
                limits.body_seconds + limits.seconds + limits.delivery_seconds, partial(self.cut, "request_seconds")
            )

    def _limit(self, seconds: float, at_end: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, at_end)

    def _no_head(self) -> None:
        if self.flow.write_paused:  # the last answer is still being read, at its least speed
            self._wait()
        else:
            self.cut("head_seconds")

    def _watch_reading(self) -> None:
        self._reader = self.loop.call_later(
            self._doors.limits.delivery_seconds, self._has_read, self.transport.get_write_buffer_size()
        )

    def _has_read(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > max(before - READ_BYTES, 0):
            self.cut("delivery_seconds")
        else:
            self._watch_reading()
