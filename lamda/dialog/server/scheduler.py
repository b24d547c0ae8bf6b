"""One thread that does all work on the model: a piece of a prompt, then a token for each request, and again.

Requests come and go between steps. What one gets does not depend on its company: draws are its own, and rows do
not see each other. What it fails with is its own, too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from traceback import format_exception
from typing import Any, TypeVar

from torch import Tensor

from lamda.config.errors import RunError, UserError
from lamda.dialog.server.admission import Abandoned, Ending, Ticket, TooLong
from lamda.dialog.server.memory import give_back
from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, OnToken, Pieces, forward
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA

_IDLE_SECONDS = 2.0
"""Without work, after which memory is given back."""

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(eq=False)
class _Job:
    """A request that waits for the thread.

    pieces: work that ends with a result; or else `candidates` are continued. The future holds no frames: a
    traceback in it would keep keys and values until a garbage collection.
    """

    ticket: Ticket
    tokens: int = 0
    pieces: Pieces[Any] | None = None
    prefix: Prefix | None = None
    count: int = 0
    sampling: Sampling | None = None
    on_token: OnToken | None = None
    candidates: Candidates | None = None
    done: Future[Any] = field(default_factory=Future)

    def end(self, result: object) -> None:
        """Nothing is held from here on but the result."""
        self.pieces = self.prefix = self.candidates = self.on_token = None
        self.done.set_result(result)

    def fail(self, error: Exception) -> None:
        """The same with an error, which `Scheduler` raises in the request's own thread."""
        if not isinstance(error, (Abandoned, Ending, TooLong, UserError)):
            log.error("a request failed\n%s", "".join(format_exception(error)))  # text: a record would keep the frames
            error = RunError(f"{type(error).__name__}: {error}")
        self.pieces = self.prefix = self.candidates = self.on_token = None
        self.done.set_exception(error.with_traceback(None))


class Scheduler:
    """Owns the thread; `close` ends it.

    Attributes:
        rows: candidates that the last step continued.
        steps: how often the model was run for all of them.
    """

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
        """As `lamda.inference.generation.sample`, with all who ask at the same time; waits for the end.

        `on_token` is called in the scheduler's thread. Raises what `ticket.check` does, Abandoned after `close`, and
        RunError where the model failed, which the log then has.
        """
        job = _Job(ticket, prefix=prefix, count=count, sampling=sampling, on_token=on_token)
        try:
            return self._put(job).result()
        finally:
            del job, prefix, on_token  # of an error, the traceback keeps this frame

    def run(self, pieces: Pieces[Result], *, tokens: int = 0, ticket: Ticket) -> Result:
        """As `lamda.inference.generation.whole`, one request after another, the shortest first. Raises as `sample`."""
        job = _Job(ticket, tokens=tokens, pieces=pieces)
        try:
            return self._put(job).result()
        finally:
            del job, pieces

    def close(self) -> None:
        """End after the current step; what is running ends as if its clients had gone."""
        with self._entrance:
            self._is_closed = True
            self._arrived.put(None)
        self._thread.join()

    def _put(self, job: _Job) -> Future[Any]:
        with self._entrance:  # behind the one that closes, a job would wait without end
            if self._is_closed:
                raise Abandoned
            self._arrived.put(job)
        return job.done

    def _work(self) -> None:
        jobs: list[_Job] = []
        while self._receive(jobs):
            jobs = [job for job in jobs if _may_continue(job)]
            self._piece(jobs)
            self._step([job for job in jobs if job.pieces is None and not job.done.done()])
            jobs = [job for job in jobs if not job.done.done()]

    def _receive(self, jobs: list[_Job]) -> bool:
        """Add who has arrived, after waiting where there is nothing else to do; whether the thread continues."""
        while not jobs or not self._arrived.empty():
            try:
                job = self._arrived.get(timeout=_IDLE_SECONDS if self._has_worked and not jobs else None)
            except Empty:
                self._has_worked = False
                give_back()
                continue
            self._has_worked = True
            if job is None:
                for left in jobs:
                    left.fail(Abandoned())
                return False
            jobs.append(job)
        return True

    def _piece(self, jobs: Sequence[_Job]) -> None:
        """A piece of the shortest work that waits; of equally short ones, of the first."""
        job = min((job for job in jobs if job.pieces is not None), key=lambda job: job.tokens, default=None)
        if job is None or job.pieces is None:
            return
        try:
            next(job.pieces)
        except StopIteration as end:
            job.end(end.value)
        except Exception as error:  # what happens to one request is that one's
            job.fail(error)

    def _step(self, jobs: Sequence[_Job]) -> None:
        """Continue all by a token."""
        running = [job for job in jobs if self._has_begun(job)]
        self.rows = sum(job.count for job in running)
        if not running:
            return
        for job, logits_NV in self._forward(running):
            try:
                job.candidates.take(logits_NV)
            except Exception as error:
                job.fail(error)
            else:
                _end_if_finished(job)
        self.steps += 1

    def _has_begun(self, job: _Job) -> bool:
        """Whether it has tokens to come; a new one begins here."""
        if job.candidates is None:
            try:
                job.candidates = Candidates(
                    self._model, job.prefix, count=job.count, sampling=job.sampling, on_token=job.on_token
                )
            except Exception as error:
                job.fail(error)
                return False
        return not _end_if_finished(job)

    def _forward(self, running: Sequence[_Job]) -> list[tuple[_Job, Tensor]]:
        """The logits of each job. Where that fails for all (no memory, say), each is tried alone, and fails alone."""
        try:
            found = forward(self._model, [job.candidates for job in running])
            return list(zip(running, found, strict=True))
        except Exception as error:
            if len(running) == 1:
                running[0].fail(error)
                return []
        return [pair for job in running for pair in self._forward([job])]


def _may_continue(job: _Job) -> bool:
    try:
        job.ticket.check()
    except Exception as error:
        job.fail(error)
    return not job.done.done()


def _end_if_finished(job: _Job) -> bool:
    if job.candidates.finished:
        job.end(job.candidates)
    return job.done.done()
