"""Continuous batching: one thread runs the model, alternating a piece of a prompt and one token for each request.

Requests join and leave between steps. A request's result does not depend on the others: each has random draws of its
own, and rows do not attend to each other. An error ends only the request that caused it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from traceback import format_exception
from typing import Any, TypeVar

from torch import Tensor

from lamda.config.errors import RunError, UserError
from lamda.dialog.server.admission import ClientDisconnected, Ticket
from lamda.dialog.server.protocol import RequestError
from lamda.host_memory import trim_memory
from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, OnToken, Pieces, forward
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA

_IDLE_SECONDS = 2.0
"""Idle time after which memory is released."""

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(eq=False)
class _Job:
    """Work of a request for the thread: either `pieces`, run to their result, or `count` candidates, made by `begin`.

    The future holds no frames: a traceback in it would keep keys and values until garbage collection.
    """

    ticket: Ticket
    tokens: int = 0
    pieces: Pieces[Any] | None = None
    begin: Callable[[], Candidates] | None = None
    count: int = 0
    candidates: Candidates | None = None
    done: Future[Any] = field(default_factory=Future)

    def end(self, result: object) -> None:
        """Hold nothing but the result."""
        self.pieces = self.begin = self.candidates = None
        self.done.set_result(result)

    def fail(self, error: Exception) -> None:
        """Hold nothing but the error, which `Scheduler` raises in the request's own thread."""
        if not isinstance(error, RequestError | UserError):
            trace = "".join(format_exception(error))
            log.error("request %s failed\n%s", self.ticket.request_id, trace)  # text: a record would keep the frames
            error = RunError(f"{type(error).__name__}: {error}")
        self.pieces = self.begin = self.candidates = None
        self.done.set_exception(error.with_traceback(None))

    def may_continue(self) -> bool:
        """Whether its ticket lets it; otherwise it fails."""
        try:
            self.ticket.check()
        except RequestError as error:
            self.fail(error)
        return not self.done.done()

    def end_if_finished(self) -> bool:
        """Whether it has ended, also by an error."""
        if self.candidates is not None and self.candidates.finished:
            self.end(self.candidates)
        return self.done.done()


class Scheduler:
    """Owns the thread; `close` ends it. rows: candidates in the last step. steps: sampling steps so far."""

    def __init__(self, model: LaMDA) -> None:
        self.rows = self.steps = 0
        self._model = model
        self._arrived: SimpleQueue[_Job | None] = SimpleQueue()
        self._entrance, self._is_closed, self._has_worked = threading.Lock(), False, False
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def sample(
        self, prefix: Prefix, *, count: int, sampling: Sampling, ticket: Ticket, on_token: OnToken | None = None
    ) -> Candidates:
        """As `lamda.inference.generation.sample`, batched with other requests; blocks until it is done.

        `on_token` is called in the scheduler's thread. Raises what `ticket.check` does, ClientDisconnected after
        `close`, and RunError if the model failed, which is logged.
        """
        begin = partial(Candidates, self._model, prefix, count=count, sampling=sampling, on_token=on_token)
        job = _Job(ticket, begin=begin, count=count)
        try:
            return self._put(job).result()
        finally:
            del job, begin, prefix, on_token  # the traceback of an error keeps this frame

    def run(self, pieces: Pieces[Result], *, tokens: int = 0, ticket: Ticket) -> Result:
        """As `lamda.inference.generation.whole`, shortest request first. Raises as `sample`."""
        job = _Job(ticket, tokens=tokens, pieces=pieces)
        try:
            return self._put(job).result()
        finally:
            del job, pieces

    @property
    def is_alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop after the current step; pending requests raise ClientDisconnected."""
        with self._entrance:
            self._is_closed = True
            self._arrived.put(None)
        self._thread.join()

    def _put(self, job: _Job) -> Future[Any]:
        with self._entrance:  # a job queued after the closing None would wait forever
            if self._is_closed:
                raise ClientDisconnected
            self._arrived.put(job)
        return job.done

    def _work(self) -> None:
        jobs: list[_Job] = []
        while self._receive(jobs):
            jobs = [job for job in jobs if job.may_continue()]
            self._piece(jobs)
            self._step([job for job in jobs if job.pieces is None and not job.done.done()])
            jobs = [job for job in jobs if not job.done.done()]

    def _receive(self, jobs: list[_Job]) -> bool:
        """Add new jobs, waiting if there is no other work; whether the thread continues."""
        while not jobs or not self._arrived.empty():
            try:
                job = self._arrived.get(timeout=_IDLE_SECONDS if self._has_worked and not jobs else None)
            except Empty:
                self._has_worked = False
                trim_memory()
                continue
            self._has_worked = True
            if job is None:
                for left in jobs:
                    left.fail(ClientDisconnected())
                return False
            jobs.append(job)
        return True

    def _piece(self, jobs: Sequence[_Job]) -> None:
        """Run one piece of the shortest pending job, the first on ties."""
        job = min((job for job in jobs if job.pieces is not None), key=lambda job: job.tokens, default=None)
        if job is None or job.pieces is None:
            return
        try:
            next(job.pieces)
        except StopIteration as end:
            job.end(end.value)
        except Exception as error:  # must not end other requests
            job.fail(error)

    def _step(self, jobs: Sequence[_Job]) -> None:
        """Sample one token for every candidate."""
        running = [job for job in jobs if self._has_begun(job)]
        self.rows = sum(job.count for job in running)
        if not running:
            return
        for job, logits_NV in self._forward(running):
            assert job.candidates is not None
            try:
                job.candidates.take(logits_NV)
            except Exception as error:
                job.fail(error)
            else:
                job.end_if_finished()
        self.steps += 1

    def _has_begun(self, job: _Job) -> bool:
        """Whether it has tokens to sample; starts a new one."""
        if job.begin is not None:
            try:
                job.candidates, job.begin = job.begin(), None
            except Exception as error:
                job.fail(error)
                return False
        return not job.end_if_finished()

    def _forward(self, running: Sequence[_Job]) -> list[tuple[_Job, Tensor]]:
        """The logits of each job. If the batch fails (out of memory), each is tried alone, and fails alone."""
        try:
            found = forward(self._model, [job.candidates for job in running if job.candidates is not None])
            return list(zip(running, found, strict=True))
        except Exception as error:
            if len(running) == 1:
                running[0].fail(error)
                return []
        return [pair for job in running for pair in self._forward([job])]
