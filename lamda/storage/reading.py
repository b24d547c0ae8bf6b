"""Reading what a run wrote: a disk or a file server that fails says nothing about what is in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamda.config.errors import RunError


class UnreadableError(RunError):
    """A file that cannot be read now: another try may find it readable (exit code 1)."""


def unreadable(path: Path, reason: str) -> UnreadableError:
    """The error that names a file of a run, and what to do about it."""
    return UnreadableError(
        f"{path}: cannot be read now ({reason}). Nothing was changed: make it readable and start again. If it belongs "
        "to a checkpoint that is lost, move that checkpoint's folder elsewhere, and the one before it is taken"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises UnreadableError for an OSError in it; FileNotFoundError, which says that nothing is there, stays."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(Path(error.filename or path), error.strerror or str(error)) from error
