"""Side work: what a run does beside training, and what must never end it.

Text for the console, files that only people read, caches, the mirror in W&B: where one of them fails, the log has a
warning and the run continues. Checkpoints, rows of metrics.jsonl and reading data are no side work.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType

log = logging.getLogger(__name__)


class BestEffort:
    """A context, to be entered as often as needed, for one kind of side work: its first failure is a warning.

    failure: what a failure means, the beginning of the warning: "samples/ cannot be written". then: what follows from
    it. errors: those that are caught; for a foreign library, `Exception`. Every other one passes.
    """

    def __init__(
        self,
        failure: str,
        *,
        then: str = "training continues",
        errors: type[Exception] | Sequence[type[Exception]] = OSError,
    ) -> None:
        self._failure, self._then = failure, then
        self._errors = errors if isinstance(errors, type) else tuple(errors)
        self._has_warned = False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(value, self._errors):
            return False
        if not self._has_warned:
            self._has_warned = True
            log.warning("%s (%s); %s", self._failure, reason_of(value), self._then)
        return True


def reason_of(error: BaseException) -> str:
    """An error in a few words: the system's own for an OSError, else its kind and the first line of its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
