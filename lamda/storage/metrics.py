"""metrics.jsonl, the record of a run: one JSON object per step, each step at most once."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from lamda.best_effort import BestEffort
from lamda.config.errors import UserError
from lamda.durable import open_regular, read_regular, replace_file, sync_file
from lamda.storage.reading import reading

Metrics = dict[str, Any]
"""One row: values by column."""

log = logging.getLogger(__name__)


class MetricsFile:
    """Appends finished steps; rows that a resume discards go to metrics.discarded.jsonl.

    A row that cannot be written stays in memory and is written before the next one.
    """

    def __init__(self, path: Path, *, discarded: Path, step: int) -> None:
        self._path, self._discarded = path, discarded
        self._waiting = b""
        self._writing = BestEffort(f"{path} cannot be appended to", then="rows wait in memory, and training continues")
        self._discarding = BestEffort(f"{discarded} cannot be written", then="the discarded rows are lost")
        _discard_after(step, path, discarded)
        self._stream = path.open("ab", buffering=0)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        with self._writing:
            self._stream.close()

    def write(self, row: Metrics) -> None:
        """Append one step; NaN and infinities, which JSON lacks, become null."""
        self._waiting += _line(row).encode()
        self._flush()

    def amend(self, step: int, metrics: Metrics) -> None:
        """Add metrics to the row of `step`, if it is the last one."""
        self._flush()
        rows = read_metrics(self._path)
        if not rows or rows[-1]["step"] != step:
            return
        with BestEffort(f"{self._path}: the metrics of step {step} cannot be added"):
            replace_file(self._path, "".join(map(_line, [*rows[:-1], rows[-1] | metrics])))
        self._stream.close()
        self._stream = self._path.open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Discard the rows after `step`."""
        self._flush()
        self._stream.close()
        self._waiting = b""
        _discard_after(step, self._path, self._discarded, keeping=self._discarding)
        self._stream = self._path.open("ab", buffering=0)

    def _flush(self) -> None:
        with self._writing:
            while self._waiting:
                self._waiting = self._waiting[self._stream.write(self._waiting) :]


def _line(row: Metrics) -> str:
    finite = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[Metrics]:
    """All rows; invalid lines (cut short by a crash, lost by a disk) are skipped. Raises UnreadableError."""
    return [row for _, row in _read(path) if row is not None]


def _read(path: Path) -> list[tuple[bytes, Metrics | None]]:
    """Each line, with its newline if it has one, and its row or None if it is invalid. Raises UnreadableError."""
    try:
        with reading(path):
            lines = read_regular(path).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [(line, _row(line)) for line in lines]


def _row(line: bytes) -> Metrics | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _discard_after(
    step: int, path: Path, discarded: Path, *, keeping: AbstractContextManager[object] | None = None
) -> None:
    """Move lines after `step`, repeated steps and invalid lines to `discarded`; works on a full disk.

    Logs which rows up to `step` are missing. keeping: context around the write to `discarded`.
    """
    lines = _read(path)
    firsts: dict[int, int] = {}
    for index, (_, row) in enumerate(lines):
        if row is not None and row["step"] <= step:
            firsts.setdefault(row["step"], index)
    kept = {*firsts.values()}
    discarded_lines = [line.rstrip(b"\n") + b"\n" for index, (line, _) in enumerate(lines) if index not in kept]
    broken = [number for number, (_, row) in enumerate(lines[:-1], start=1) if row is None]
    if broken:
        log.warning("%s, line %s: no row of metrics; moved to %s", path, ", ".join(map(str, broken)), discarded.name)
    if discarded_lines:
        with keeping or nullcontext(), discarded.open("ab") as stream:
            stream.writelines(discarded_lines)
        _keep(path, [line for line, _ in lines], sorted(kept))
    _report_gaps(path, {row["step"] for _, row in lines if row is not None}, step)


def _keep(path: Path, lines: Sequence[bytes], kept: Sequence[int]) -> None:
    """Keep lines by their index, in a new inode: readers then see that the file was replaced.

    On a full disk only the discarded end is cut off, which takes no space; readers skip bad lines before it.
    """
    try:
        replace_file(path, b"".join(lines[index] for index in kept))
    except OSError:
        end = kept[-1] + 1 if kept else 0
        os.truncate(path, sum(map(len, lines[:end])))
        sync_file(path)


def _report_gaps(path: Path, steps: Set[int], last: int) -> None:
    """Log which rows are missing between the first one and `last`, the step that the run resumes from."""
    missing = [step for step in range(min(steps, default=last), last + 1) if step not in steps]
    if steps and missing:
        log.warning(
            "%s: %d rows up to step %d, from which the run resumes, are missing (steps %d to %d): they never reached "
            "the disk",
            path, len(missing), last, missing[0], missing[-1],
        )  # fmt: skip


class MetricsReader:
    """Follows a metrics.jsonl that may be growing, and that a resume or a rollback rewrites shorter.

    keep: the columns to hold, all by default. names: every column seen, kept or not.
    """

    def __init__(self, path: Path, *, keep: Collection[str] | None = None) -> None:
        self._path, self._keep = path, None if keep is None else {"step", *keep}
        # Kept open: while it is, a file that replaces this one cannot get its inode number.
        self._stream: BinaryIO | None = None
        self._offset = 0
        self.rows: list[Metrics] = []
        self.names: dict[str, None] = {}

    def update(self) -> int:
        """Read new lines; returns the index of the first new row.

        The index is less than the number of rows known before if the run rolled back. Raises UserError for a
        line that is no row.
        """
        known = len(self.rows)
        if self._is_same_file():
            self._read()
            return known
        before, self.rows = self.rows, []
        self._open()
        self._read()
        pairs = zip(before, self.rows, strict=False)
        return next((index for index, (old, new) in enumerate(pairs) if old != new), min(known, len(self.rows)))

    def _is_same_file(self) -> bool:
        """Whether the path still names the open file, and the file is no shorter than what was read."""
        if self._stream is None:
            return False
        try:
            named, opened = self._path.stat(), os.fstat(self._stream.fileno())
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino) and named.st_size >= self._offset

    def _open(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._offset = 0
        try:
            self._stream = open_regular(self._path)
        except FileNotFoundError:
            self._stream = None
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror})") from error

    def _read(self) -> None:
        """Read whole lines from `_offset`; an incomplete last line is left for the next update."""
        if self._stream is None:
            return
        self._stream.seek(self._offset)
        for line in self._stream:
            if not line.endswith(b"\n"):
                break
            row = _parse(line)
            if row is None:
                raise UserError(f"{self._path}, line {len(self.rows) + 1}: is no row of metrics; was the file edited?")
            self._offset += len(line)
            self.names.update(dict.fromkeys(row))
            self.rows.append(row if self._keep is None else {k: row[k] for k in row if k in self._keep})


def last_row(path: Path) -> Metrics | None:
    """The last whole row of a metrics.jsonl, without reading the rest."""
    return next((row for line in reversed(last_lines(path)) if (row := _parse(line.encode()))), None)


def last_lines(path: Path, *, size: int = 1 << 17) -> list[str]:
    """The whole lines in the last `size` bytes of a text file; empty if there is no file."""
    try:
        with open_regular(path) as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - size))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return lines[1:] if end > size else lines


def _parse(line: bytes) -> Metrics | None:
    """A row, parsed three times as fast as `_row` does, but not for names with lone surrogates."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
