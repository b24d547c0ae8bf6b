"""The HTTP application: OpenAI's routes, health, Prometheus metrics and the chat page."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
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

from lamda.dialog.server.admission import Admission, Slot
from lamda.dialog.server.endpoint import Answer, Endpoint, Handler, OnText, Record
from lamda.dialog.server.guard import Receive, RequestGuard, Scope, Send
from lamda.dialog.server.progress import OnProgress
from lamda.dialog.server.protocol import ChatRequest, CompletionRequest, RequestError, shortened
from lamda.dialog.server.scheduler import Scheduler
from lamda.dialog.server.service import Service

PAGE = Path(__file__).parent / "static"


class Metrics:
    """The server's metrics, in a registry of its own."""

    def __init__(self, scheduler: Scheduler, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        self.requests = counter("lamda_requests", "requests by HTTP status", ["status"])
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

    def __init__(self, service: Service, *, hosts: frozenset[str], key: str | None, chat_only: bool = False) -> None:
        """hosts, key: as `RequestGuard`. chat_only: leave out /v1/completions, whose texts are not filtered."""
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
            ("/metrics", self._metrics_text),
            ("/", _page),
        ):
            app.api_route(path, methods=["GET", "HEAD"], response_model=None)(get)
        app.mount("/static", StaticFiles(directory=PAGE, check_dir=False))
        app.exception_handler(RequestError)(_request_error)
        app.exception_handler(HTTPException)(_http_exception)
        self._guard = RequestGuard(app, hosts=hosts, key=key, limits=service.limits, requests=self.metrics.requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        await self._guard(scope, receive, send)

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
        return {"status": "ok"}

    async def _metrics_text(self) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> dict[str, Any]:
        return {"id": self._service.name, "object": "model", "created": self._started, "owned_by": "open-lamda"} | {
            "lamda": self._service.summary
        }


def _check_name(name: str, service: Service) -> None:
    if name != service.name:
        problem = f"there is no model {shortened(name)}; this server has {service.name!r}"
        raise RequestError(404, problem, param="model")


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

    def answer(self, choices: list[Record], events: list[Record], prompt: int, completion: int, **more: Any) -> Answer:
        """The answer with its usage, which is added to the metrics."""
        self.metrics.tokens.labels("prompt").inc(prompt)
        self.metrics.tokens.labels("completion").inc(completion)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            events = [*events, self.record([], usage=usage)]
        return Answer(self.record(choices, usage=usage, **more), events)


class _Completion(_Handler):
    """Continuations of prompts."""

    path, body = "/v1/completions", CompletionRequest
    kind, prefix = "text_completion", "cmpl"

    def __call__(self, slot: Slot, on_text: OnText | None, _: OnProgress | None) -> Answer:
        found, prompt_tokens = self.service.complete(self.request, ticket=slot, on_text=on_text)
        return self.answer(
            [_choice(number, each.text, each.reason) for number, each in enumerate(found)],
            [self.record([_choice(number, "", each.reason)]) for number, each in enumerate(found)],
            prompt_tokens,
            sum(each.tokens for each in found),
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
        text, lamda = result.reply.text, result.reply.to_record()
        message = {"role": "assistant", "content": text, "refusal": None}
        end = {"index": 0, "delta": {}, "finish_reason": result.reason}
        return self.answer(
            [{"index": 0, "message": message, "logprobs": None, "finish_reason": result.reason}],
            [*([] if result.is_streamed else [self.piece(0, text)]), self.record([end], lamda=lamda)],
            result.reply.context_tokens,
            result.tokens,
            lamda=lamda,
        )

    def piece(self, number: int, text: str) -> Record:
        """An event."""
        delta = {"role": "assistant", "content": text}
        return self.record([{"index": number, "delta": delta, "finish_reason": None}])


def _choice(number: int, text: str, reason: str | None) -> Record:
    return {"index": number, "text": text, "logprobs": None, "finish_reason": reason}


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
