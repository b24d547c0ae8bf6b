"""Endpoints: a request is parsed and handled in a thread, and answered as one JSON object or a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from traceback import format_exception
from typing import Any, Protocol, TypeVar

from fastapi.responses import JSONResponse
from prometheus_client import Histogram

from lamda.config.errors import RunError, UserError
from lamda.dialog.server.admission import Admission, Slot
from lamda.dialog.server.guard import KEY, OUTCOME, REQUEST_ID, Receive, Scope, Send, send_error
from lamda.dialog.server.progress import OnProgress
from lamda.dialog.server.protocol import ChatRequest, CompletionRequest, RequestError, parse

log = logging.getLogger(__name__)

Record = dict[str, Any]
OnText = Callable[[int, str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """whole: the response without streaming. events: the last events of a stream."""

    whole: Record
    events: list[Record]


class Handler(Protocol):
    """Handles one request, in a thread."""

    def __call__(self, slot: Slot, on_text: OnText | None, on_progress: OnProgress | None) -> Answer:
        """The answer; calls `on_text(choice, text)` for each new text, and `on_progress(record)` while there is none.

        Raises RequestError and others.
        """
        ...

    def piece(self, number: int, text: str) -> Record:
        """The event for new text of a choice."""
        ...

    def progress(self, progress: Record) -> Record:
        """The event for progress."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """A route as an ASGI application.

    handler: makes the handler of a parsed request, in a thread; may raise RequestError. seconds: request durations.
    """

    kind: type[ChatRequest] | type[CompletionRequest]
    handler: Callable[[Any], Handler]
    admission: Admission
    pool: ThreadPoolExecutor
    seconds: Histogram

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client disconnects."""
        try:
            with self.admission.enter(key=scope[KEY], request_id=scope[REQUEST_ID]) as slot, self.seconds.time():
                body = (await receive())["body"]
                request, handler = await self._in_thread(slot, self._parsed, body)
                del body
                if request.stream:
                    await self._stream(handler, slot, scope, receive, send)
                else:
                    async with _watched(slot, receive):
                        answer = await self._in_thread(slot, handler, slot, None, None)
                    await JSONResponse(answer.whole)(scope, receive, send)
        except RequestError as error:
            if error.status == 499:
                scope[OUTCOME] = 499
            else:
                await send_error(error, send)

    def _parsed(self, body: bytes) -> tuple[Any, Handler]:
        request = parse(self.kind, body)
        return request, self.handler(request)

    async def _in_thread(self, slot: Slot, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run `work` in the pool. Raises only RequestError."""
        outcome = await asyncio.get_running_loop().run_in_executor(
            self.pool, _outcome, work, arguments, slot.request_id
        )
        if isinstance(outcome, RequestError):
            raise outcome
        return outcome

    async def _stream(self, handler: Handler, slot: Slot, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events. An error before the first one becomes the response's status."""
        outbox = _Outbox()
        loop = asyncio.get_running_loop()
        working = loop.run_in_executor(self.pool, _outcome, handler, (slot, outbox.put, outbox.report), slot.request_id)
        working.add_done_callback(lambda _: outbox.wake())
        has_begun = False

        async def event(record: Record | str) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            data = record if isinstance(record, str) else json.dumps(record)
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        async with _watched(slot, receive):
            while not (working.done() and outbox.is_empty):
                texts, progress = await outbox.take()
                for number, text in texts:
                    await event(handler.piece(number, text))
                if progress is not None:
                    await event(handler.progress(progress))
        outcome = working.result()
        if isinstance(outcome, RequestError):
            if not has_begun:
                raise outcome
            scope[OUTCOME] = outcome.status
            await event(outcome.to_record())
        else:
            for record in outcome.events:
                await event(record)
            await event("[DONE]")
        await send({"type": "http.response.body", "body": b""})


def _outcome(work: Callable[..., Result], arguments: tuple[Any, ...], request_id: str) -> Result | RequestError:
    """The result, or the client's error: in a future, a traceback would hold keys and values until it is collected."""
    try:
        return work(*arguments)
    except RequestError as error:
        return RequestError(error.status, error.message, param=error.param, code=error.code)
    except UserError as error:
        return RequestError(400, str(error))
    except Exception as error:
        if not isinstance(error, RunError):  # the scheduler logs those
            log.error("request %s failed\n%s", request_id, "".join(format_exception(error)))
        return RequestError(500, f"internal error; the server's log has it under {request_id}")


class _Outbox:
    """Texts to send, merged per choice, and the last progress: a slow client gets longer texts, not a longer queue."""

    def __init__(self) -> None:
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._lock, self._texts = threading.Lock(), dict[int, list[str]]()
        self._progress: Record | None = None

    @property
    def is_empty(self) -> bool:
        return not self._texts

    def put(self, number: int, text: str) -> None:
        """From any thread."""
        with self._lock:
            is_first = not self._texts
            self._texts.setdefault(number, []).append(text)
        if is_first:
            self._loop.call_soon_threadsafe(self._ready.set)

    def report(self, progress: Record) -> None:
        """From any thread; replaces the one before."""
        self._progress = progress
        self._loop.call_soon_threadsafe(self._ready.set)

    def wake(self) -> None:
        """Make `take` return, even with no text."""
        self._ready.set()

    async def take(self) -> tuple[list[tuple[int, str]], Record | None]:
        """Wait for text, progress or `wake`; all new text, by choice, and the last progress."""
        await self._ready.wait()
        self._ready.clear()
        with self._lock:
            texts, self._texts = self._texts, {}
        progress, self._progress = self._progress, None
        return [(number, "".join(parts)) for number, parts in texts.items()], progress


@asynccontextmanager
async def _watched(slot: Slot, receive: Receive) -> AsyncIterator[None]:
    """Abandon the slot if the client disconnects within this context."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        slot.abandon()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
