"""The run directory: paths, status, and skipped sample ranges."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lamda.best_effort import BestEffort
from lamda.config.errors import RunError, UserError
from lamda.config.loading import load_config
from lamda.durable import read_object, read_regular, replace_file, sync_file
from lamda.storage import lock
from lamda.storage.lock import RunLock
from lamda.storage.reading import reading

Status = Literal["running", "finished", "preempted", "failed"]
STARTING = "starting"
"""Phase of a running status before the first step, when the number of steps is not known yet."""
DEPTH = 4
"""Levels below a folder in which `find_runs` searches."""
ENDING_SECONDS = 60.0
"""A lock still held this long after the run ended belongs to a new start."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run (the layout is in README.md)."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def discarded_metrics(self) -> Path:
        """Lines that a resume made void."""
        return self.path / "metrics.discarded.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The run's SentencePiece model."""
        return self.path / "tokenizer.model"

    @property
    def config(self) -> Path:
        """The resolved configuration of the last start."""
        return self.path / "config.yaml"

    @property
    def quarantine(self) -> Path:
        """The first lines that hold no document."""
        return self.path / "quarantine.jsonl"

    @property
    def order(self) -> Path:
        """The windows of the order of the data."""
        return self.path / "order.jsonl"

    @property
    def samples(self) -> Path:
        """Folder of sampled text."""
        return self.path / "samples"

    @property
    def log(self) -> Path:
        """What the console showed, and warnings."""
        return self.path / "train.log"

    @property
    def stop(self) -> Path:
        """Asks the run to save and leave."""
        return self.path / "STOP"

    @property
    def heartbeats(self) -> Path:
        """Folder of the ranks' signs of life."""
        return self.path / "heartbeats"

    @property
    def profile(self) -> Path:
        """Folder of traces."""
        return self.path / "profile"

    @property
    def holds_a_run(self) -> bool:
        """Whether a run was here before."""
        return self.metrics.exists() or self.checkpoints.exists() or self._last_checkpoint.exists()

    def create(self) -> bool:
        """Make the folder; whether it was not there. Raises UserError where it cannot be made or written to."""
        try:
            if run := self._run_around():
                raise UserError(f"run.dir {self.path}: lies among the checkpoints of {run}; choose another")
            is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"run.dir {self.path}: cannot be written to ({error.strerror}); choose another") from error
        return is_new

    def _run_around(self) -> Path | None:
        """The run among whose checkpoints this folder lies."""
        around = (path for path in (self.path.resolve() / "x").parents if path.name == "checkpoints")
        return next((path.parent for path in around if (path / "LATEST").is_file()), None)

    def forget_refused(self, kind: type[BaseException] | None, value: BaseException | None, _: object) -> None:
        """Remove a folder that a start made and that was then refused; what a person or a later start can use stays."""
        signs = {self.log, self.path / "status.json", self.heartbeats, self.path / "hang"}
        with suppress(OSError):
            if isinstance(value, UserError) and {*self.path.iterdir()} <= signs:
                shutil.rmtree(self.path)

    def write_status(self, status: Status, **details: Any) -> None:
        """Tell in status.json how the run stands; the launcher's exit code does not."""
        self.restore_status(
            {"status": status, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), **details}
        )

    def restore_status(self, content: dict[str, Any]) -> None:
        """Write what `read_status` gave once."""
        with BestEffort(f"status.json cannot say that the run is {content['status']}"):
            replace_file(self.path / "status.json", json.dumps(content, indent=1))

    def read_status(self) -> dict[str, Any]:
        """What status.json says; nothing where it is not there, or holds no status."""
        try:
            told = read_object(self.path / "status.json")
        except (OSError, ValueError):
            return {}
        is_status = told.get("status") in (*get_args(Status),) and isinstance(told.get("time", 0.0), int | float)
        return told if is_status else {}

    def sync_metrics(self) -> None:
        """Bring the rows so far to the disk. Raises OSError."""
        if self.metrics.exists():
            sync_file(self.metrics)

    def note_checkpoint(self, step: int) -> None:
        """Keep outside the folder of checkpoints that one was committed: that folder may be away at the next start."""
        with BestEffort(f"{self._last_checkpoint} cannot be written", then="the checkpoint is complete all the same"):
            replace_file(self._last_checkpoint, json.dumps({"step": step}))

    def noted_checkpoint(self) -> int | None:
        """The step of the last checkpoint noted here. Raises UserError where the note is none, and UnreadableError."""
        try:
            with reading(self._last_checkpoint):
                step = read_object(self._last_checkpoint).get("step")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{self._last_checkpoint}: cannot be read ({error})") from error
        return step if isinstance(step, int) else 0

    @property
    def _last_checkpoint(self) -> Path:
        return self.path / "last_checkpoint.json"

    def note_skipped(self, window: tuple[int, int], *, step: int, reason: str) -> None:
        """Keep a window of the order that the run jumps over from now on, before any checkpoint tells of it."""
        noted = {"from": window[0], "to": window[1], "step": step, "reason": reason}
        then = "a run that ends before its next checkpoint meets these samples again, and goes back again"
        with BestEffort(f"{self._skipped} cannot be written", errors=(OSError, RunError, UserError), then=then):
            replace_file(self._skipped, json.dumps([*self._notes(), noted], indent=1))

    def skipped(self) -> tuple[tuple[int, int], ...]:
        """Every window that was noted here."""
        return tuple((noted["from"], noted["to"]) for noted in self._notes())

    @property
    def rollbacks(self) -> int:
        """How many of the windows are of this run's own rollbacks."""
        return sum("inherited_from" not in noted for noted in self._notes())

    def inherit_skipped(self, other: RunDirectory) -> None:
        """Note the windows of the run whose checkpoint this one begins with, as they are read in the same order."""
        known = self.skipped()
        new = [noted for noted in other._notes() if (noted["from"], noted["to"]) not in known]
        if new:
            inherited = [{"inherited_from": str(other.path), **noted} for noted in new]
            replace_file(self._skipped, json.dumps([*self._notes(), *inherited], indent=1))

    @property
    def _skipped(self) -> Path:
        return self.path / "skipped.json"

    def _notes(self) -> list[dict[str, Any]]:
        try:
            with reading(self._skipped):
                notes = json.loads(read_regular(self._skipped))
            if not (isinstance(notes, list) and all(_is_window(note["from"], note["to"]) for note in notes)):
                raise ValueError("is no list of windows, whole numbers `from` and `to`")
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{self._skipped}: cannot be read ({error}); it names the samples that the run never uses again: bring "
                "it back from the newest checkpoint's run_state.json (skipped)"
            ) from error
        return notes

    def require_no_writer(self) -> None:
        """Raises UserError while a process that holds the lock lives."""
        if owner := lock.living_owner(self.path):
            raise lock.refusal(owner, owner.age())

    def writer_elsewhere(self) -> str | None:
        """The other machine whose rank 0 writes here, if one does."""
        host = socket.gethostname()
        others = (owner for owner in lock.owners(self.path) if owner.host != host)
        return next((owner.host for owner in others if owner.lives()), None)

    def lock(self) -> RunLock:
        """Be the one writer while it is entered (`lamda.storage.lock`)."""
        return RunLock(self.path)


def _is_window(first: Any, last: Any) -> bool:
    """Whether these are the first sample of a window and the one after its last."""
    return type(first) is int and type(last) is int and 0 <= first <= last


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    state: starting, running, finished, preempted, failed; died, if status.json says running and no living
    process holds the lock; unknown, if there is no status. steps: of the whole run, if known.
    """

    state: str
    reason: str | None = None
    steps: int | None = None


def read_run_status(directory: RunDirectory) -> RunStatus:
    """status.json, checked against the lock and the process that holds it."""
    content, writer = directory.read_status(), _lock_holder(directory)
    if content.get("status") == "running" and not (writer and writer.is_alive):
        content = directory.read_status()  # the run may have ended between the two reads
        state = "died" if content.get("status") == "running" else content.get("status", "unknown")
    elif not content and writer:
        state = "starting" if writer.is_alive else "died"
    elif content.get("phase") == STARTING or (content.get("status") != "running" and _is_restarted(content, writer)):
        state = "starting"
    else:
        state = content.get("status", "unknown")
    return RunStatus(state, content.get("reason"), content.get("steps") or _configured_steps(directory))


class _Writer(NamedTuple):
    is_alive: bool
    pid: int


def _lock_holder(directory: RunDirectory) -> _Writer | None:
    """The process that holds the lock: a living one, else a dead one; None if there is no lock."""
    try:
        found = [_Writer(owner.lives(), owner.pid) for owner in lock.owners(directory.path)]
    except OSError:
        return None
    return max(found, key=lambda writer: writer.is_alive, default=None)


def _is_restarted(ended: dict[str, Any], writer: _Writer | None) -> bool:
    """Whether the writer is a new start of a run that had ended, rather than its last process shutting down."""
    age = time.time() - ended.get("time", 0.0)
    return writer is not None and writer.is_alive and writer.pid != ended.get("pid") and age > ENDING_SECONDS


def _configured_steps(directory: RunDirectory) -> int | None:
    """The number of steps in config.yaml; None if the file is missing or of another version."""
    try:
        return load_config(["--config", str(directory.config)]).steps
    except UserError:
        return None


def find_runs(folder: Path, *, depth: int = DEPTH) -> list[Path]:
    """Folders with a status.json or metrics.jsonl: `folder` itself, or at most `depth` levels below it.

    Does not search inside a run or in hidden folders; a folder reached through several links counts once.
    """
    found: dict[Path, Path] = {}
    for path in sorted(_walk(folder, depth), key=lambda path: len(path.parts)):
        found.setdefault(path.resolve(), path)
    return list(found.values())


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    with suppress(OSError):  # a folder without read permission is skipped
        if any((folder / name).is_file() for name in ("status.json", "metrics.jsonl")):
            yield folder
        elif depth:
            for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
                yield from _walk(path, depth - 1)


def modified_at(path: Path) -> float | None:
    """When a file was last written, in seconds since the epoch; None if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None
