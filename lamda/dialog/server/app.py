"""The HTTP application: OpenAI's routes, health, metrics and the page."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route

from lamda.dialog.server.admission import Admission, Place
from lamda.dialog.server.answering import Answer, Endpoint, OnText, Record
from lamda.dialog.server.guard import Guard, Receive, Scope, Send
from lamda.dialog.server.metrics import Metrics
from lamda.dialog.server.protocol import ChatRequest, CompletionRequest, Refused, shortened
from lamda.dialog.server.service import Service

PAGE = Path(__file__).parent / "static"


class App:
    """The whole server as an ASGI application.

    Attributes:
        limits: of its service.
        metrics: its figures.
    """

    def __init__(self, service: Service, *, hosts: frozenset[str], key: str | None, chat_only: bool = False) -> None:
        """hosts, key: as `Guard`. chat_only: without /v1/completions, whose texts no filter sees."""
        self.limits = service.limits
        self._service, self._admission = service, Admission(service.limits)
        self.metrics = Metrics(service.scheduler, self._admission)
        self._pool = ThreadPoolExecutor(service.limits.requests, thread_name_prefix="request")
        self._started = int(time.time())
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        for path, kind, answerer in (
            ("/v1/chat/completions", ChatRequest, _Chat),
            *([] if chat_only else [("/v1/completions", CompletionRequest, _Completion)]),
        ):
            app.routes.append(Route(path, self._endpoint(kind, answerer), methods=["POST"]))
        for path, get in (
            ("/v1/models", self._models),
            ("/v1/models/{name:path}", self._one_model),
            ("/health", self._health),
            ("/metrics", self._metrics_text),
            ("/", _page),
        ):
            app.api_route(path, methods=["GET", "HEAD"], response_model=None)(get)
        app.mount("/static", StaticFiles(directory=PAGE, check_dir=False))
        app.exception_handler(Refused)(_refused)
        app.exception_handler(HTTPException)(_not_here)
        self._guard = Guard(app, hosts=hosts, key=key, limits=service.limits, metrics=self.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        await self._guard(scope, receive, send)

    def end(self) -> int:
        """Whoever is at work or comes from now on gets 503; how many are at work."""
        self._guard.end()
        return self._admission.end()

    def _endpoint(self, kind: Any, answerer: type[_Answerer]) -> Endpoint:
        def understood(asked: Any) -> _Answerer:
            self._check_name(asked.model)
            return answerer(self._service, self.metrics, asked)

        return Endpoint(kind, understood, self._admission, self._pool, self.limits, self.metrics)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Ends the scheduler with the server."""
        yield
        self._service.scheduler.close()
        self._pool.shutdown(cancel_futures=True)

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def _one_model(self, name: str) -> dict[str, Any]:
        self._check_name(name)
        return self._model()

    async def _health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def _metrics_text(self) -> Response:
        """In Prometheus' text form."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> dict[str, Any]:
        return {"id": self._service.name, "object": "model", "created": self._started, "owned_by": "open-lamda"}

    def _check_name(self, name: str) -> None:
        if name != self._service.name:
            raise Refused(
                404, f"there is no model {shortened(name)}; this server has {self._service.name!r}", param="model"
            )


class _Answerer:
    """What both kinds of answers share."""

    kind: str
    prefix: str

    def __init__(self, service: Service, metrics: Metrics, asked: Any) -> None:
        self.service, self.metrics, self.asked = service, metrics, asked
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind + (".chunk" if asked.stream and self.kind == "chat.completion" else ""),
            "created": int(time.time()),
            "model": asked.model,
        }

    def record(self, choices: list[Record], **more: Any) -> Record:
        """An answer, or an event of a stream."""
        return {**self._head, "choices": choices, **more}

    def answer(self, choices: list[Record], events: list[Record], prompt: int, completion: int, **more: Any) -> Answer:
        """With its usage, which is counted here."""
        self.metrics.tokens.labels("prompt").inc(prompt)
        self.metrics.tokens.labels("completion").inc(completion)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            events = [*events, self.record([], usage=usage)]
        return Answer(self.record(choices, usage=usage, **more), events)


class _Completion(_Answerer):
    """Of `POST /v1/completions`."""

    kind, prefix = "text_completion", "cmpl"

    def __call__(self, place: Place, on_text: OnText | None) -> Answer:
        found, given = self.service.complete(self.asked, ticket=place, on_text=on_text)
        return self.answer(
            [_choice(number, each.text, each.reason) for number, each in enumerate(found)],
            [self.record([_choice(number, "", each.reason)]) for number, each in enumerate(found)],
            given,
            sum(each.tokens for each in found),
        )

    def piece(self, number: int, text: str) -> Record:
        """An event."""
        return self.record([_choice(number, text, None)])


class _Chat(_Answerer):
    """Of `POST /v1/chat/completions`; the field `lamda` has candidates, scores, steps, sources and the context."""

    kind, prefix = "chat.completion", "chatcmpl"

    def __call__(self, place: Place, _: OnText | None) -> Answer:
        spoken = self.service.reply(self.asked, ticket=place)
        text, lamda = spoken.reply.text, spoken.reply.to_record()
        message = {"role": "assistant", "content": text, "refusal": None}
        end = {"index": 0, "delta": {}, "finish_reason": spoken.reason}
        return self.answer(
            [{"index": 0, "message": message, "logprobs": None, "finish_reason": spoken.reason}],
            [self.piece(0, text), self.record([end], lamda=lamda)],
            spoken.reply.context_tokens,
            spoken.tokens,
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
        raise Refused(404, "this server has no page; ask /v1/chat/completions")
    return FileResponse(PAGE / "index.html", media_type="text/html")


async def _refused(_: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    return JSONResponse(refused.to_record(), refused.status)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = Refused(error.status_code, f"{request.method} {shortened(request.scope['path'])}: {error.detail}")
    return JSONResponse(refused.to_record(), error.status_code, error.headers)  # a 405 names what is allowed
