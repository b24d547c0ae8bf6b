"""The server's figures, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lamda.dialog.server.admission import Admission
from lamda.dialog.server.scheduler import Scheduler


class Metrics:
    """Counters by status and kind, what is at work, and how long requests took."""

    def __init__(self, scheduler: Scheduler, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lamda_requests", "requests by HTTP status", ["status"], registry=self.registry)
        self.closed = Counter(
            "lamda_connections_closed", "connections that a limit closed", ["limit"], registry=self.registry
        )
        self.tokens = Counter("lamda_tokens", "tokens by kind", ["kind"], registry=self.registry)
        self.seconds = Histogram(
            "lamda_request_seconds",
            "from a request's acceptance to its end",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120),
            registry=self.registry,
        )
        for name, text, figure in (
            ("lamda_requests_at_work", "requests at work", lambda: admission.at_work),
            (
                "lamda_tokens_reserved",
                "tokens that the requests at work may hold",
                lambda: admission.tokens,
            ),
            ("lamda_rows", "candidates in the last step", lambda: scheduler.rows),
            ("lamda_steps", "steps of the model so far", lambda: scheduler.steps),
        ):
            Gauge(name, text, registry=self.registry).set_function(figure)
