"""Errors when reading the files of a run: a failing disk or file server does not mean that a file is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamda.config.errors import RunError


class UnreadableError(RunError):
    """A file cannot be read now; a retry may succeed (exit code 1)."""


def unreadable(path: Path, reason: str) -> UnreadableError:
    """The error for a file of a run, with advice."""
    return UnreadableError(
        f"{path}: cannot be read now ({reason}). Nothing was changed: make it readable and start again. If it belongs "
        "to a checkpoint that is lost, move its folder elsewhere to use the checkpoint before it"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns OSError into UnreadableError, except FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(Path(error.filename or path), error.strerror or str(error)) from error
