"""What the files of a run tell about it, whether it runs, has ended, or never came to a step."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.durable import open_regular
from lamda.storage import lock
from lamda.storage.run_directory import RunDirectory
from lamda.training.stop_requests import STARTING

DEPTH = 4
"""Folders below the given one in which runs are looked for."""
ENDING_SECONDS = 60.0
"""A lock that lives on for longer after the run's last word belongs to a new start of it."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    status: starting, running, finished, preempted, failed; died, where it says running and no living
    process holds its lock; unknown, where it says nothing. steps: of the whole run, where that is known.
    """

    status: str
    reason: str | None = None
    steps: int | None = None


def read_standing(directory: RunDirectory) -> Standing:
    """The truth about a run: what status.json says, checked against the lock and the process that holds it."""
    told, writer = directory.read_status(), _Writer.of(directory)
    if told.get("status") == "running" and not (writer and writer.lives):
        # It may have ended, and gone, between the two looks.
        told = directory.read_status()
        status = "died" if told.get("status") == "running" else told.get("status", "unknown")
    elif not told and writer:
        status = "starting" if writer.lives else "died"
    elif told.get("phase") == STARTING or (told.get("status") != "running" and writer and writer.follows(told)):
        status = "starting"
    else:
        status = told.get("status", "unknown")
    return Standing(status, told.get("reason"), told.get("steps") or _configured_steps(directory))


@dataclass(frozen=True)
class _Writer:
    """The process that holds a run's lock."""

    pid: int
    lives: bool

    @classmethod
    def of(cls, directory: RunDirectory) -> _Writer | None:
        """The one that lives, else one that has died; None where no lock is there."""
        try:
            found = [cls(owner.pid, lives=owner.lives()) for owner in lock.owners(directory.path)]
        except OSError:
            return None
        return max(found, key=lambda writer: writer.lives, default=None)

    def follows(self, ended: dict[str, Any]) -> bool:
        """Whether this is a new start of a run that had ended, and not the end of that one."""
        return self.lives and self.pid != ended.get("pid") and time.time() - ended.get("time", 0.0) > ENDING_SECONDS


def _configured_steps(directory: RunDirectory) -> int | None:
    """The length that config.yaml gives; None where it is not there, or of another version."""
    try:
        return load_config(["--config", str(directory.config)]).steps
    except UserError:
        return None


def find_runs(folder: Path, *, depth: int = DEPTH) -> list[Path]:
    """Folders with a status.json or metrics.jsonl, `folder` itself or at most `depth` below it.

    A run's own folders are not searched, nor hidden ones; a folder that links lead to twice counts once.
    """
    found: dict[Path, Path] = {}
    for path in sorted(_walk(folder, depth), key=lambda path: len(path.parts)):
        found.setdefault(path.resolve(), path)
    return list(found.values())


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        is_run = any((folder / name).is_file() for name in ("status.json", "metrics.jsonl"))
    except OSError:  # not ours to read
        return
    if is_run:
        yield folder
    elif depth:
        try:
            below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:  # not ours to read
            return
        for path in below:
            yield from _walk(path, depth - 1)


class Metrics:
    """The rows of a metrics.jsonl that may be growing, and that a resume or rollback rewrites shorter.

    keep: the columns to hold on to, all by default. names: every column seen, kept or not.
    """

    def __init__(self, path: Path, *, keep: Collection[str] | None = None) -> None:
        self._path, self._keep = path, None if keep is None else {"step", *keep}
        # Kept open: as long as it is, a file that takes this one's place cannot have its number.
        self._stream: BinaryIO | None = None
        self._place = 0
        self.rows: list[Row] = []
        self.names: dict[str, None] = {}

    def update(self) -> int:
        """Read what has come; returns the index of the first row that is new.

        It is less than the number of rows known before where the run went back. Raises UserError for a
        line that is no row.
        """
        known = len(self.rows)
        if not self._is_same_file():
            before, self.rows = self.rows, []
            self._open()
            self._read()
            pairs = zip(before, self.rows, strict=False)
            return next((index for index, (old, new) in enumerate(pairs) if old != new), min(known, len(self.rows)))
        self._read()
        return known

    def _is_same_file(self) -> bool:
        """Whether the file is the one that is open, and not cut off before the place that was read up to."""
        if self._stream is None:
            return False
        try:
            named, opened = self._path.stat(), os.fstat(self._stream.fileno())
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino) and named.st_size >= self._place

    def _open(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._place = 0
        try:
            self._stream = open_regular(self._path)
        except FileNotFoundError:
            self._stream = None
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror})") from error

    def _read(self) -> None:
        """Take the whole lines from `_place` on; a last one that is still being written waits."""
        if self._stream is None:
            return
        self._stream.seek(self._place)
        for line in self._stream:
            if not line.endswith(b"\n"):
                break
            row = _parse(line)
            if row is None:
                raise UserError(f"{self._path}, line {len(self.rows) + 1}: is no row of metrics; was the file edited?")
            self._place += len(line)
            self.names.update(dict.fromkeys(row))
            self.rows.append(row if self._keep is None else {k: row[k] for k in row if k in self._keep})


def changed_at(path: Path) -> float | None:
    """When a file was last written to, in seconds since the epoch; None where it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def last_row(path: Path) -> Row | None:
    """The last whole row of a metrics.jsonl, without reading the rest."""
    return next((row for line in reversed(last_lines(path)) if (row := _parse(line.encode()))), None)


def last_lines(path: Path, *, size: int = 1 << 17) -> list[str]:
    """The whole lines in the last `size` bytes of a text file; none where there is no file."""
    try:
        with open_regular(path) as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - size))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return lines[1:] if end > size else lines


def _parse(line: bytes) -> Row | None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, dict):
        return None
    step = row.get("step")
    return row if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
