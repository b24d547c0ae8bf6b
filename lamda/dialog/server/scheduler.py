"""One thread that continues all requests together, a token each at a time; they come and go between steps.

What a request gets does not depend on its company: draws are its own, and rows do not see each other.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, OnToken, advance
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA


class Abandoned(Exception):  # noqa: N818 - no error, but what ends a request whose client has left
    """The client has gone."""


class TooLong(Exception):  # noqa: N818 - told to the client as such
    """The request has taken longer than is allowed."""


class Ticket:
    """A request's right to go on: until its time is over or its client has gone."""

    def __init__(self, *, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._abandoned = threading.Event()

    def abandon(self) -> None:
        """The client has gone: what is generated for it ends with the next token."""
        self._abandoned.set()

    def check(self) -> None:
        """Raises Abandoned or TooLong where the request may not go on."""
        if self._abandoned.is_set():
            raise Abandoned
        if time.monotonic() > self._ends:
            raise TooLong


@dataclass(eq=False)
class _Job:
    prefix: Prefix
    count: int
    sampling: Sampling
    on_token: OnToken | None
    ticket: Ticket
    done: Future[Candidates] = field(default_factory=Future)
    candidates: Candidates | None = None


class Scheduler:
    """Owns the thread; `close` ends it.

    Attributes:
        rows: candidates that the last step continued.
        steps: how often the model was run.
    """

    def __init__(self, model: LaMDA) -> None:
        self.rows = self.steps = 0
        self._model = model
        self._arrived: SimpleQueue[_Job | None] = SimpleQueue()
        self._entrance, self._is_closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def sample(
        self, prefix: Prefix, *, count: int, sampling: Sampling, ticket: Ticket, on_token: OnToken | None = None
    ) -> Candidates:
        """As `lamda.inference.generation.sample`, with all who ask at the same time; waits for the end.

        `on_token` is called in the scheduler's thread. Raises what `ticket.check` does, and Abandoned after `close`.
        """
        job = _Job(prefix, count, sampling, on_token, ticket)
        with self._entrance:  # behind the one that closes, a job would wait for ever
            if self._is_closed:
                raise Abandoned
            self._arrived.put(job)
        return job.done.result()

    def close(self) -> None:
        """End after the current step; what is running ends as if its clients had gone."""
        with self._entrance:
            self._is_closed = True
            self._arrived.put(None)
        self._thread.join()

    def _work(self) -> None:
        running: list[_Job] = []
        while True:
            for job in self._newcomers(wait=not running):
                if job is None:
                    for left in running:
                        left.done.set_exception(Abandoned())
                    return
                running.append(job)
            running = [job for job in running if self._goes_on(job)]
            self.rows = sum(job.count for job in running)
            if running:
                self._step(running)
                running = [job for job in running if not job.done.done()]

    def _newcomers(self, *, wait: bool) -> list[_Job | None]:
        found = [self._arrived.get()] if wait else []
        while not self._arrived.empty():
            found.append(self._arrived.get())
        return found

    def _goes_on(self, job: _Job) -> bool:
        """Whether a job, begun here where it is new, has tokens to come; else it is told its end."""
        try:
            job.ticket.check()
            if job.candidates is None:
                job.candidates = Candidates(
                    self._model, job.prefix, count=job.count, sampling=job.sampling, on_token=job.on_token
                )
        except Exception as error:  # whatever befalls one request is told to that one
            job.done.set_exception(error)
            return False
        if job.candidates.finished:
            job.done.set_result(job.candidates)
        return not job.candidates.finished

    def _step(self, running: list[_Job]) -> None:
        try:
            advance(self._model, [job.candidates for job in running])
        except Exception as error:  # a step that fails (no memory, say) fails for all in it, and the server goes on
            for job in running:
                job.done.set_exception(error)
        self.steps += 1
