"""The HTTP application: OpenAI's routes, health, Prometheus metrics and the chat page."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route

from lamda.dialog.server.admission import Admission, ShuttingDown, Slot
from lamda.dialog.server.endpoint import Answer, Endpoint, Handler, OnText, Record
from lamda.dialog.server.guard import Receive, RequestGuard, Scope, Send
from lamda.dialog.server.logprobs import chat_logprobs, text_logprobs
from lamda.dialog.server.progress import OnProgress
from lamda.dialog.server.protocol import ChatRequest, CompletionRequest, RequestError, shortened
from lamda.dialog.server.scheduler import Scheduler
from lamda.dialog.server.service import Service, Usage

PAGE = Path(__file__).parent / "static"


class Metrics:
    """The server's metrics, in a registry of its own."""

    def __init__(self, scheduler: Scheduler, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        self.requests = counter("lamda_requests", "requests by HTTP status and API key", ["status", "key"])
        self.closed = counter("lamda_connections_closed", "connections that a limit closed", ["limit"])
        self.tokens = counter("lamda_tokens", "tokens by kind", ["kind"])
        self.seconds = Histogram(
            "lamda_request_seconds",
            "from a request's acceptance to its end",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120),
            registry=self.registry,
        )
        for name, text, value in (
            ("lamda_requests_at_work", "active requests", lambda: admission.active),
            ("lamda_tokens_reserved", "tokens that the active requests may hold", lambda: admission.tokens),
            ("lamda_rows", "candidates in the last step", lambda: scheduler.rows),
            ("lamda_steps", "steps of the model so far", lambda: scheduler.steps),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)


class App:
    """The whole server as an ASGI application."""

    def __init__(
        self, service: Service, *, hosts: frozenset[str], keys: Mapping[str, str], chat_only: bool = False
    ) -> None:
        """hosts, keys: as `RequestGuard`. chat_only: leave out /v1/completions, whose texts are not filtered."""
        self.limits = service.limits
        self._service, self._admission = service, Admission(service.limits)
        self.metrics = Metrics(service.scheduler, self._admission)
        self._pool = ThreadPoolExecutor(service.limits.requests, thread_name_prefix="request")
        self._started = int(time.time())
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        handlers: list[type[_Handler]] = [_Chat] if chat_only else [_Chat, _Completion]
        for handler in handlers:
            make = partial(handler, service, self.metrics)
            endpoint = Endpoint(handler.body, make, self._admission, self._pool, self.metrics.seconds)
            app.routes.append(Route(handler.path, endpoint, methods=["POST"]))
        for path, get in (
            ("/v1/models", self._models),
            ("/v1/models/{name:path}", self._one_model),
            ("/health", self._health),
            ("/ready", self._ready),
            ("/metrics", self._metrics_text),
            ("/", _page),
        ):
            app.api_route(path, methods=["GET", "HEAD"], response_model=None)(get)
        app.mount("/static", StaticFiles(directory=PAGE, check_dir=False))
        app.exception_handler(RequestError)(_request_error)
        app.exception_handler(HTTPException)(_http_exception)
        self._guard = RequestGuard(app, hosts=hosts, keys=keys, limits=service.limits, requests=self.metrics.requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        await self._guard(scope, receive, send)

    @property
    def active(self) -> int:
        """The number of active requests."""
        return self._admission.active

    def drain(self) -> int:
        """Answer new requests with 503; returns the number of active ones."""
        self._admission.is_ending = True
        return self.active

    def end(self) -> int:
        """Answer active and new requests with 503; returns the number of active ones."""
        self._guard.end()
        return self._admission.end()

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Stop the scheduler with the server."""
        yield
        self._service.scheduler.close()
        self._pool.shutdown(cancel_futures=True)

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def _one_model(self, name: str) -> dict[str, Any]:
        _check_name(name, self._service)
        return self._model()

    async def _health(self) -> dict[str, str]:
        """Whether the process works; if not, only a restart helps."""
        if not self._service.scheduler.is_alive:
            raise RequestError(503, "the thread that runs the model has ended: restart the server")
        return {"status": "ok"}

    async def _ready(self) -> dict[str, str]:
        """Whether new requests should be sent here."""
        if self._admission.is_ending:
            raise ShuttingDown
        return {"status": "ready"}

    async def _metrics_text(self) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> dict[str, Any]:
        return {"id": self._service.name, "object": "model", "created": self._started, "owned_by": "open-lamda"} | {
            "lamda": self._service.summary
        }


def _check_name(name: str, service: Service) -> None:
    if name != service.name:
        problem = f"there is no model {shortened(name)}; this server has {service.name!r}"
        raise RequestError(404, problem, param="model", code="model_not_found")


class _Handler(Handler):
    """The common part of both kinds of requests. prefix: of an answer's id."""

    path: str
    body: type[ChatRequest] | type[CompletionRequest]
    kind: str
    prefix: str

    def __init__(self, service: Service, metrics: Metrics, request: Any) -> None:
        """Raises RequestError for the name of another model."""
        _check_name(request.model, service)
        self.service, self.metrics, self.request = service, metrics, request
        self._begun: set[int] = set()
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind + (".chunk" if request.stream and self.kind == "chat.completion" else ""),
            "created": int(time.time()),
            "model": request.model,
        }

    def record(self, choices: list[Record], **more: Any) -> Record:
        """An answer, or an event of a stream."""
        return {**self._head, "choices": choices, **more}

    def progress(self, progress: Record) -> Record:
        """An event without a choice."""
        return self.record([], progress=progress)

    def answer(self, choices: list[Record], events: list[Record], usage: Usage, **more: Any) -> Answer:
        """The answer with its usage, which is added to the metrics."""
        for kind in ("prompt", "cached", "completion"):
            self.metrics.tokens.labels(kind).inc(getattr(usage, kind))
        record = usage.to_record()
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            events = [*events, self.record([], usage=record)]
        return Answer(self.record(choices, usage=record, **more), events)


class _Completion(_Handler):
    """Continuations of prompts."""

    path, body = "/v1/completions", CompletionRequest
    kind, prefix = "text_completion", "cmpl"

    def __call__(self, slot: Slot, on_text: OnText | None, _: OnProgress | None) -> Answer:
        found, usage = self.service.complete(self.request, ticket=slot, on_text=on_text)
        scores = [text_logprobs(self.service.tokenizer, each.scores) for each in found]
        ends = list(enumerate(zip(found, scores, strict=True)))
        return self.answer(
            [_choice(number, each.text, each.reason, logprobs) for number, (each, logprobs) in ends],
            [self.record([_choice(number, "", each.reason, logprobs)]) for number, (each, logprobs) in ends],
            usage,
        )

    def piece(self, number: int, text: str) -> Record:
        """An event."""
        return self.record([_choice(number, text, None)])


class _Chat(_Handler):
    """A reply; the field `lamda` has candidates, scores, steps, sources and the context."""

    path, body = "/v1/chat/completions", ChatRequest
    kind, prefix = "chat.completion", "chatcmpl"

    def __call__(self, slot: Slot, on_text: OnText | None, on_progress: OnProgress | None) -> Answer:
        options = self.request.stream_options
        result = self.service.reply(
            self.request,
            ticket=slot,
            on_text=on_text and partial(on_text, 0),
            on_progress=on_progress if options is not None and options.include_progress else None,
        )
        lamda, choices, events = result.reply.to_record(), [], []
        for number, each in enumerate(result.choices):
            logprobs = chat_logprobs(self.service.tokenizer, each.scores)
            end = {"index": number, "logprobs": logprobs, "finish_reason": each.reason}
            choices.append({**end, "message": {"role": "assistant", "content": each.text, "refusal": None}})
            events += [] if result.is_streamed else [self.piece(number, each.text)]
            events.append(self.record([{**end, "delta": {}}], **({} if number else {"lamda": lamda})))
        return self.answer(choices, events, result.usage, lamda=lamda)

    def piece(self, number: int, text: str) -> Record:
        """An event."""
        delta = {"content": text} if number in self._begun else {"role": "assistant", "content": text}
        self._begun.add(number)  # clients join the strings of all deltas
        return self.record([{"index": number, "delta": delta, "finish_reason": None}])


def _choice(number: int, text: str, reason: str | None, logprobs: Record | None = None) -> Record:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def _page() -> Response:
    if not (PAGE / "index.html").is_file():
        raise RequestError(404, "this server has no page; use /v1/chat/completions")
    return FileResponse(PAGE / "index.html", media_type="text/html")


async def _request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.to_record(), error.status)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = RequestError(error.status_code, f"{request.method} {shortened(request.scope['path'])}: {error.detail}")
    return JSONResponse(answer.to_record(), answer.status, error.headers)  # those of a 405 name the allowed methods
