"""The findings of a part: written to a file after each one, so that a part that is cut off keeps what it has."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lamda.durable import replace_file

T = TypeVar("T")


class LeftOutError(Exception):
    """A measurement that cannot be made here, and why."""


class Findings:
    """Findings by name in a JSON file, with `failed` and `left_out`: the names of the others, and why."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._content: dict[str, Any] = {"found": {}, "failed": {}, "left_out": {}}

    def record(self, name: str, value: Any) -> None:
        """Add a finding."""
        self._content["found"][name] = value
        self._write()

    def fail(self, name: str, reason: str) -> None:
        """Record why something failed."""
        self._content["failed"][name] = reason[:600]
        self._write()

    def attempt(self, name: str, measure: Callable[[], T]) -> T | None:
        """Record what `measure` returns, or why it fails: then the next one is measured all the same."""
        try:
            value = measure()
        except LeftOutError as reason:
            self._content["left_out"][name] = str(reason)
        except Exception as error:  # whatever a kernel, a compiler or a driver raises: the reason is the finding
            traceback.print_exc()
            self.fail(name, f"{type(error).__name__}: {error}")
            return None
        else:
            self.record(name, value)
            return value
        self._write()
        return None

    def _write(self) -> None:
        replace_file(self._file, json.dumps(self._content, indent=1))
