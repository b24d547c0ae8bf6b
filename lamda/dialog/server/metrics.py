"""The server's figures, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lamda.dialog.server.scheduler import Scheduler


class Metrics:
    """Counters by status and kind, what is at work, and how long requests took."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lamda_requests", "requests by HTTP status", ["status"], registry=self.registry)
        self.tokens = Counter("lamda_tokens", "tokens by kind", ["kind"], registry=self.registry)
        self.at_work = Gauge("lamda_requests_at_work", "requests at work", registry=self.registry)
        self.seconds = Histogram(
            "lamda_request_seconds",
            "from a request's acceptance to its end",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120),
            registry=self.registry,
        )
        rows = Gauge("lamda_rows", "candidates in the last step", registry=self.registry)
        rows.set_function(lambda: scheduler.rows)
        steps = Gauge("lamda_steps", "steps of the model so far", registry=self.registry)
        steps.set_function(lambda: scheduler.steps)
