"""Best-effort work, whose failure is a warning and never ends a run.

Examples are text for the console, files that only people read, caches, and the mirror in W&B. Checkpoints, rows of
metrics.jsonl and reading data are not best effort.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType

log = logging.getLogger(__name__)


class BestEffort:
    """A reusable context for one kind of best-effort work: its first failure is logged as a warning.

    failure: beginning of the warning, such as "samples/ cannot be written". then: end of the warning. errors: what is
    caught (`Exception` for a third-party library); other errors pass.
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
    """An error in a few words: the strerror of an OSError, else its type and the first line of its message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
