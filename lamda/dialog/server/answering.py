"""A request from its place to its last byte: parsed and answered in a thread, and sent as one answer or as a stream."""

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

from lamda.config.errors import RunError, UserError
from lamda.dialog.server.admission import Abandoned, Admission, Ending, Place, TooLong, ending
from lamda.dialog.server.guard import OUTCOME, Receive, Scope, Send, refuse
from lamda.dialog.server.limits import Limits
from lamda.dialog.server.metrics import Metrics
from lamda.dialog.server.protocol import ChatRequest, CompletionRequest, Refused, parse

log = logging.getLogger(__name__)

Record = dict[str, Any]
OnText = Callable[[int, str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """whole: what a request gets that is no stream. events: the last ones of a stream."""

    whole: Record
    events: list[Record]


class Answerer(Protocol):
    """What answers one request, in a thread."""

    def __call__(self, place: Place, on_text: OnText | None) -> Answer:
        """The answer; `on_text` gets (number of the choice, text) as it comes. Raises Refused among others."""
        ...

    def piece(self, number: int, text: str) -> Record:
        """The event of a piece of text."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """A route as an ASGI application. answerer: for what was asked; it is called in a thread, and may raise Refused."""

    kind: type[ChatRequest] | type[CompletionRequest]
    answerer: Callable[[Any], Answerer]
    admission: Admission
    pool: ThreadPoolExecutor
    limits: Limits
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves."""
        try:
            with self.admission.enter() as place, self.metrics.seconds.time():
                body = (await receive())["body"]
                asked, answerer = await self._in_thread(self._understood, body)
                del body
                if asked.stream:
                    await self._stream(answerer, place, scope, receive, send)
                else:
                    async with _watched(place, receive):
                        answer = await self._in_thread(answerer, place, None)
                    await JSONResponse(answer.whole)(scope, receive, send)
        except Refused as refused:
            if refused.status == 499:
                scope[OUTCOME] = 499
            else:
                await refuse(refused, send)

    def _understood(self, body: bytes) -> tuple[Any, Answerer]:
        asked = parse(self.kind, body)
        return asked, self.answerer(asked)

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """What work gives. Raises Refused alone."""
        outcome = await asyncio.get_running_loop().run_in_executor(self.pool, self._outcome, work, arguments)
        if isinstance(outcome, Refused):
            raise outcome
        return outcome

    def _outcome(self, work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result | Refused:
        """An error ends here: in a future, its traceback would keep keys and values until a garbage collection."""
        try:
            return work(*arguments)
        except Exception as error:
            return self._refusal(error)

    def _refusal(self, error: Exception) -> Refused:
        """What the client gets; a defect of ours goes to the log."""
        if isinstance(error, Refused):
            return Refused(error.status, error.message, param=error.param)
        if isinstance(error, UserError):
            return Refused(400, str(error))
        if isinstance(error, TooLong):
            return Refused(504, f"the request took longer than {self.limits.seconds:g} seconds")
        if isinstance(error, Abandoned):
            return Refused(499, "the client has gone")
        if isinstance(error, Ending):
            return ending()
        if not isinstance(error, RunError):  # the scheduler has logged those
            log.error("a request failed\n%s", "".join(format_exception(error)))
        return Refused(500, "the server failed; its log says why")

    async def _stream(self, answerer: Answerer, place: Place, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events. What fails before the first one has a status of its own."""
        outbox = _Outbox()
        loop = asyncio.get_running_loop()
        working = loop.run_in_executor(self.pool, self._outcome, answerer, (place, outbox.put))
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

        async with _watched(place, receive):
            while not (working.done() and outbox.is_empty):
                for number, text in await outbox.take():
                    await event(answerer.piece(number, text))
        outcome = working.result()
        if isinstance(outcome, Refused):
            if not has_begun:
                raise outcome
            scope[OUTCOME] = outcome.status
            await event(outcome.to_record())
        else:
            for record in [*outcome.events, "[DONE]"]:
                await event(record)
        await send({"type": "http.response.body", "body": b""})


class _Outbox:
    """Texts on their way to a client. One that reads slowly gets longer pieces of them, not a longer queue."""

    def __init__(self) -> None:
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._lock, self._texts = threading.Lock(), dict[int, list[str]]()

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

    def wake(self) -> None:
        """`take` returns, also where there is nothing."""
        self._ready.set()

    async def take(self) -> list[tuple[int, str]]:
        """All that has come, by the number of its choice, once there is something or `wake` was called."""
        await self._ready.wait()
        self._ready.clear()
        with self._lock:
            texts, self._texts = self._texts, {}
        return [(number, "".join(parts)) for number, parts in texts.items()]


@asynccontextmanager
async def _watched(place: Place, receive: Receive) -> AsyncIterator[None]:
    """While it lasts, a client that leaves abandons its place."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        place.abandon()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
