"""The HTTP application: OpenAI's routes, health, metrics and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from lamda.config.errors import UserError
from lamda.dialog.server.guard import Guard
from lamda.dialog.server.metrics import Metrics
from lamda.dialog.server.protocol import ChatRequest, CompletionRequest, Refused, parse
from lamda.dialog.server.scheduler import Abandoned, Ticket, TooLong
from lamda.dialog.server.service import Service

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "static"

Answer = TypeVar("Answer")
Emit = Callable[[dict[str, Any]], None]


def create_app(service: Service, *, hosts: frozenset[str], key: str | None) -> Guard:
    """The whole server as an ASGI application. hosts, key: as `Guard`."""
    server = Server(service)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=server.lifespan)
    app.post("/v1/completions", response_model=None)(server.completions)
    app.post("/v1/chat/completions", response_model=None)(server.chat)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name:path}", response_model=None)(server.model)
    app.get("/health")(server.health)
    app.get("/metrics", response_model=None)(server.metrics_text)
    app.get("/", response_model=None)(_page)
    app.mount("/static", StaticFiles(directory=PAGE, check_dir=False))
    app.exception_handler(Refused)(_refused)
    app.exception_handler(HTTPException)(_not_here)
    return Guard(app, hosts=hosts, key=key, max_bytes=service.limits.bytes)


class Server:
    """The routes of one service."""

    def __init__(self, service: Service) -> None:
        self._service, self._metrics = service, Metrics(service.scheduler)
        self._pool = ThreadPoolExecutor(service.limits.requests, thread_name_prefix="request")
        self._started, self._requests = int(time.time()), 0

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Ends the scheduler with the server."""
        yield
        self._service.scheduler.close()
        self._pool.shutdown(cancel_futures=True)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        asked = parse(CompletionRequest, await request.body())
        head = self._head("text_completion", "cmpl", asked.model)

        def record(choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
            return {**head, "choices": choices, **more}

        def choice(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
            return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

        def streamed(ticket: Ticket, emit: Emit) -> dict[str, int]:
            found, given = self._service.complete(
                asked, ticket=ticket, on_text=lambda number, text: emit(record([choice(number, text)]))
            )
            for number, each in enumerate(found):
                emit(record([choice(number, "", each.reason)]))
            return self._usage(given, sum(each.tokens for each in found))

        if asked.stream:
            return await self._stream(request, streamed, record, asked)
        found, given = await self._answer(request, lambda ticket: self._service.complete(asked, ticket=ticket))
        usage = self._usage(given, sum(each.tokens for each in found))
        choices = [choice(number, each.text, each.reason) for number, each in enumerate(found)]
        return JSONResponse(record(choices, usage=usage))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`; the field `lamda` has candidates, scores, steps and sources."""
        asked = parse(ChatRequest, await request.body())
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        head = self._head(kind, "chatcmpl", asked.model)

        def record(choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
            return {**head, "choices": choices, **more}

        def answer(ticket: Ticket) -> tuple[str, dict[str, Any], str, dict[str, int]]:
            reply, reason = self._service.reply(asked, ticket=ticket)
            spoken = self._service.count_tokens(reply.text)
            usage = self._usage(self._service.count_tokens(*(m.to_message().content for m in asked.messages)), spoken)
            return reply.text, reply.to_record(), reason, usage

        def streamed(ticket: Ticket, emit: Emit) -> dict[str, int]:
            text, lamda, reason, usage = answer(ticket)
            delta = {"role": "assistant", "content": text}
            emit(record([{"index": 0, "delta": delta, "finish_reason": None}]))
            emit(record([{"index": 0, "delta": {}, "finish_reason": reason}], lamda=lamda))
            return usage

        if asked.stream:
            return await self._stream(request, streamed, record, asked)
        text, lamda, reason, usage = await self._answer(request, answer)
        message = {"role": "assistant", "content": text, "refusal": None}
        choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}]
        return JSONResponse(record(choices, usage=usage, lamda=lamda))

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        """`GET /v1/models/NAME`."""
        self._check_name(name)
        return self._model()

    async def health(self) -> dict[str, str]:
        """`GET /health`."""
        return {"status": "ok"}

    async def metrics_text(self) -> Response:
        """`GET /metrics`, in Prometheus' text form."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> dict[str, Any]:
        return {"id": self._service.name, "object": "model", "created": self._started, "owned_by": "open-lamda"}

    def _check_name(self, name: str) -> None:
        if name != self._service.name:
            raise Refused(404, f"there is no model {name!r}; this server has {self._service.name!r}", param="model")

    def _head(self, kind: str, prefix: str, name: str) -> dict[str, Any]:
        self._check_name(name)
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }

    def _usage(self, prompt: int, completion: int) -> dict[str, int]:
        self._metrics.tokens.labels("prompt").inc(prompt)
        self._metrics.tokens.labels("completion").inc(completion)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    @contextmanager
    def _place(self) -> Iterator[Ticket]:
        """A place among the requests at work. Raises Refused where all are taken."""
        limits = self._service.limits
        if self._requests >= limits.requests:
            self._metrics.requests.labels("429").inc()
            raise Refused(429, f"{limits.requests} requests are at work: try again soon")
        self._requests += 1
        self._metrics.at_work.inc()
        ticket = Ticket(seconds=limits.seconds)
        try:
            yield ticket
        finally:
            ticket.abandon()
            self._requests -= 1
            self._metrics.at_work.dec()

    async def _answer(self, request: Request, work: Callable[[Ticket], Answer]) -> Answer:
        """What `work` gives, done in a thread, unless the client leaves."""
        with self._place() as ticket, self._metrics.seconds.time():
            working = asyncio.get_running_loop().run_in_executor(self._pool, work, ticket)
            leaving = asyncio.create_task(_leaving(request))
            try:
                await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    ticket.abandon()
                answer = await working
            except Exception as error:
                raise self._told(error) from error
            finally:
                leaving.cancel()
        self._metrics.requests.labels("200").inc()
        return answer

    async def _stream(
        self,
        request: Request,
        work: Callable[[Ticket, Emit], dict[str, int]],
        record: Callable[..., dict[str, Any]],
        asked: ChatRequest | CompletionRequest,
    ) -> Response:
        """Server-sent events of what `work` emits. What fails before the first one has a status of its own."""
        events = self._events(request, work, record, asked)
        first = await anext(events)

        async def lines() -> AsyncIterator[str]:
            try:
                yield f"data: {json.dumps(first)}\n\n"
                async for event in events:
                    yield f"data: {json.dumps(event)}\n\n"
                yield "data: [DONE]\n\n"
            except Refused as refused:
                yield f"data: {json.dumps(refused.to_record())}\n\n"
            finally:
                await events.aclose()

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def _events(
        self,
        request: Request,
        work: Callable[[Ticket, Emit], dict[str, int]],
        record: Callable[..., dict[str, Any]],
        asked: ChatRequest | CompletionRequest,
    ) -> AsyncIterator[dict[str, Any]]:
        loop, emitted = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()

        def put(event: dict[str, Any] | None) -> None:
            loop.call_soon_threadsafe(emitted.put_nowait, event)

        def run(ticket: Ticket) -> dict[str, int]:
            try:
                return work(ticket, put)
            finally:
                put(None)

        with self._place() as ticket, self._metrics.seconds.time():
            working = loop.run_in_executor(self._pool, run, ticket)
            leaving = asyncio.create_task(_leaving(request, ticket))
            try:
                while (event := await emitted.get()) is not None:
                    yield event
                usage = await working
            except Exception as error:
                raise self._told(error) from error
            finally:
                leaving.cancel()
        self._metrics.requests.labels("200").inc()
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield record([], usage=usage)

    def _told(self, error: Exception) -> Refused:
        """What the client is told of a failure; a defect of ours goes to the log."""
        if isinstance(error, UserError):
            error = Refused(400, str(error))
        elif isinstance(error, TooLong):
            error = Refused(504, f"the request took longer than {self._service.limits.seconds:g} seconds")
        elif isinstance(error, Abandoned):
            error = Refused(499, "the client has gone")
        elif not isinstance(error, Refused):
            log.error("a request failed", exc_info=error)
            error = Refused(500, "the server failed; its log says why")
        self._metrics.requests.labels(str(error.status)).inc()
        return error


async def _leaving(request: Request, ticket: Ticket | None = None) -> None:
    """Returns when the client has gone, and tells the ticket."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    if ticket is not None:
        ticket.abandon()


async def _page() -> Response:
    if not (PAGE / "index.html").is_file():
        raise Refused(404, "this server has no page; ask /v1/chat/completions")
    return FileResponse(PAGE / "index.html", media_type="text/html")


async def _refused(_: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    return JSONResponse(refused.to_record(), refused.status)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").to_record(),
        error.status_code,
    )
