"""metrics.jsonl, the truth about a run: one JSON object a step, each step at most once."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any

from lamda.best_effort import BestEffort
from lamda.durable import read_regular, replace_file, sync_file
from lamda.storage.reading import reading

log = logging.getLogger(__name__)


class MetricsFile:
    """Appends finished steps; what a resume made void has moved to metrics.discarded.jsonl.

    A row that the disk does not take is kept and written before the next one.
    """

    def __init__(self, path: Path, *, discarded: Path, step: int) -> None:
        self._path, self._discarded = path, discarded
        self._waiting = b""
        self._writing = BestEffort(f"{path} takes no row", then="rows wait in memory, and training continues")
        self._discarding = BestEffort(f"{discarded} cannot be written", then="the rows that are void now are lost")
        _discard_after(step, path, discarded)
        self._stream = path.open("ab", buffering=0)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        with self._writing:
            self._stream.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one step; NaN and infinities, which JSON has not, become null."""
        self._waiting += _line(row).encode()
        self._flush()

    def amend(self, step: int, figures: dict[str, Any]) -> None:
        """Add figures to the row of `step`, if it is the last one."""
        self._flush()
        rows = read_metrics(self._path)
        if not rows or rows[-1]["step"] != step:
            return
        with BestEffort(f"{self._path} cannot take the figures of step {step}"):
            replace_file(self._path, "".join(map(_line, [*rows[:-1], rows[-1] | figures])))
        self._stream.close()
        self._stream = self._path.open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Make the rows after `step` void."""
        self._flush()
        self._stream.close()
        self._waiting = b""
        _discard_after(step, self._path, self._discarded, keeping=self._discarding)
        self._stream = self._path.open("ab", buffering=0)

    def _flush(self) -> None:
        with self._writing:
            while self._waiting:
                self._waiting = self._waiting[self._stream.write(self._waiting) :]


def _line(row: dict[str, Any]) -> str:
    finite = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows; a line that is no row (a crash cut it short, or a disk lost it) is left out. Raises UnreadableError."""
    return [row for _, row in _read(path) if row is not None]


def _read(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its newline, where it has one, and its row, where it is one. Raises UnreadableError."""
    try:
        with reading(path):
            lines = read_regular(path).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [(line, _row(line)) for line in lines]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _discard_after(
    step: int, path: Path, discarded: Path, *, keeping: AbstractContextManager[object] | None = None
) -> None:
    """Move the lines after `step`, those of a step that has one before, and those that are no rows, out of the way.

    A full disk does not stand in it.

    keeping: entered around the writing of `discarded`. Says which rows up to `step` are missing.
    """
    lines = _read(path)
    firsts: dict[int, int] = {}
    for place, (_, row) in enumerate(lines):
        if row is not None and row["step"] <= step:
            firsts.setdefault(row["step"], place)
    kept = {*firsts.values()}
    good = [place in kept for place in range(len(lines))]
    void = [line.rstrip(b"\n") + b"\n" for (line, _), is_good in zip(lines, good, strict=True) if not is_good]
    broken = [number for number, (_, row) in enumerate(lines[:-1], start=1) if row is None]
    if broken:
        log.warning("%s, line %s: no row of metrics; moved to %s", path, ", ".join(map(str, broken)), discarded.name)
    if void:
        with keeping or nullcontext(), discarded.open("ab") as stream:
            stream.writelines(void)
        _keep(path, [line for line, _ in lines], good)
    _report_gaps(path, {row["step"] for _, row in lines if row is not None}, step)


def _keep(path: Path, lines: Sequence[bytes], good: Sequence[bool]) -> None:
    """Leave the good lines, in a file of a new number: readers see that it is another one.

    On a full disk what is void at the end is cut off, which takes no space; readers leave out what is no row before it.
    """
    try:
        replace_file(path, b"".join(line for line, is_good in zip(lines, good, strict=True) if is_good))
    except OSError:
        end = max((place for place, is_good in enumerate(good, start=1) if is_good), default=0)
        os.truncate(path, sum(map(len, lines[:end])))
        sync_file(path)


def _report_gaps(path: Path, steps: Set[int], last: int) -> None:
    """Say which rows are missing between the first one and `last`, the step that the run resumes from."""
    missing = [step for step in range(min(steps, default=last), last + 1) if step not in steps]
    if steps and missing:
        log.warning(
            "%s: %d rows up to step %d, from which the run resumes, are missing (steps %d to %d): they never reached "
            "the disk",
            path, len(missing), last, missing[0], missing[-1],
        )  # fmt: skip
