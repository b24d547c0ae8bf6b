"""Connection limits and shutdown.

Uvicorn's HTTP/1.1 protocol limits the size of a head and the time between two requests. This adds a time for the head,
a time for a whole request, a minimum speed at which the client reads, and a maximum number of connections.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lamda.data.open_files import allow_open_files
from lamda.dialog.server.app import App

HEAD_BYTES = 16_384
"""Of a request's head."""

READ_BYTES = 65_536
"""A client that falls behind must read this much, or the rest, in `Limits.delivery_seconds`."""

_SLICE = 4096
_GRACE_SECONDS = 5
_OTHER_DESCRIPTORS = 64


class Server(uvicorn.Server):
    """The application on a socket. SIGINT, SIGTERM or SIGHUP stops it after all active requests are answered.

    A second SIGINT ends these immediately.
    A SIGHUP that is ignored, as under nohup, stays ignored.
    """

    def __init__(self, app: App, *, grace: float = 0.0, report: Callable[[str], None] = lambda _: None) -> None:
        """grace: seconds for active requests to finish; then they get 503. report: gets lines about the shutdown."""
        self._app, self._grace, self._report = app, grace, report
        shared = ConnectionLimits(app)
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, shared=shared),  # type: ignore[arg-type]
                loop="asyncio",
                backlog=shared.max_connections,
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
        """Uvicorn's signals, and SIGHUP, which a closing terminal sends."""
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
        """Let active requests finish and answer new ones with 503; then end the rest, and Uvicorn."""
        if active := self._app.drain():
            may = f"active requests may take {self._grace:g} more seconds"
            self._report(f"shutting down; {may}, unless Ctrl-C ends them: {active}")
        deadline = time.monotonic() + self._grace
        while self._app.active and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._report(f"shutting down; active requests answered with 503: {self._app.end()}")
        self.force_exit = False  # those answers are sent
        await super().shutdown(sockets)


class ConnectionLimits:
    """State shared by all connections: limits, and the connections waiting for a request, longest first."""

    def __init__(self, app: App) -> None:
        self.limits, self.metrics = app.limits, app.metrics
        # A burst is accepted before its first connection can be closed: reserve two descriptors per connection.
        descriptors = allow_open_files(2 * app.limits.connections + _OTHER_DESCRIPTORS)
        self.max_connections = max(min(app.limits.connections, (descriptors - _OTHER_DESCRIPTORS) // 2), 1)
        self.waiting: dict[Connection, None] = {}


class Connection(H11Protocol):
    """One connection. One that breaks a limit is aborted without an answer, which nobody would read."""

    def __init__(self, *arguments: Any, shared: ConnectionLimits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._shared = shared
        self._timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """With too many connections, abort the one that has waited longest for a request, or else this one."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self._shared.max_connections:
            idle = (each for each in self._shared.waiting if not each.flow.write_paused)
            next(idle, self).cut("connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel its timers."""
        self._shared.waiting.pop(self, None)
        for timer in (self._timer, self._reader):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """A complete head starts a request; bytes after an answered one are bounded.

        h11 takes some 50 microseconds for each chunk of a chunked body, however small. So it gets small slices, and
        none of a chunked body, which is rejected: no client of this protocol needs one.
        """
        while data and not self.transport.is_closing() and not self._has_chunks:
            size = len(data) if self._has_request else _SLICE
            super().data_received(data[:size])
            data = data[size:]
            self._unread += size
        if self._has_request:
            self._begin_request()
            return
        if self._unread > self._shared.limits.bytes:
            self.cut("bytes")

    def on_response_complete(self) -> None:
        """Wait for the next request. A pipelined one closes the connection: it would escape the limits."""
        if self.conn.trailing_data[0] or self._has_chunks:
            self.transport.close()
        super().on_response_complete()
        self._wait()

    def send_400_response(self, msg: str) -> None:
        """Count malformed HTTP like every other error."""
        self._shared.metrics.requests.labels("400", "").inc()
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # a response has already started
            self.cut("protocol")

    def pause_writing(self) -> None:
        """The client falls behind: from now on it must read at a minimum speed."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if self._reader is not None:
            self._reader.cancel()

    def shutdown(self) -> None:
        """At shutdown, do not wait for a client that may never read."""
        if self.flow.write_paused:
            self.cut("ending")
        else:
            super().shutdown()

    def cut(self, limit: str) -> None:
        """Abort the connection and count it under this limit."""
        self._shared.waiting.pop(self, None)
        self._shared.metrics.closed.labels(limit).inc()
        self.transport.abort()

    @property
    def _has_chunks(self) -> bool:
        return self.cycle is not None and any(name == b"transfer-encoding" for name, _ in self.headers)

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        """Wait for a request."""
        self._unread = 0
        self._shared.waiting[self] = None
        self._limit(self._shared.limits.head_seconds, self._no_head)

    def _begin_request(self) -> None:
        """Start the timer of a request that has just begun."""
        if self in self._shared.waiting:
            del self._shared.waiting[self]
            limits = self._shared.limits
            seconds = limits.body_seconds + limits.seconds + limits.delivery_seconds
            self._limit(seconds, partial(self.cut, "request_seconds"))

    def _limit(self, seconds: float, at_end: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, at_end)

    def _no_head(self) -> None:
        if self.flow.write_paused:  # the last response is still being read
            self._wait()
        else:
            self.cut("head_seconds")

    def _watch_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._reader = self.loop.call_later(self._shared.limits.delivery_seconds, self._has_read, unread)

    def _has_read(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > max(before - READ_BYTES, 0):
            self.cut("delivery_seconds")
        else:
            self._watch_reading()
