"""The run directory: who may write to it, what the run is doing, and where things lie."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lamda.config.errors import UserError
from lamda.durable import replace_file

log = logging.getLogger(__name__)

Status = Literal["running", "finished", "preempted", "failed"]

HEARTBEAT_SECONDS = 10
STALE_SECONDS = 120


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
        return self.metrics.exists() or self.checkpoints.exists()

    def create(self) -> None:
        """Make the folder. Raises UserError where that cannot be, or where it cannot be written to."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"run.dir {self.path}: cannot be written to ({error.strerror}); choose another") from error

    def write_status(self, status: Status, **details: Any) -> None:
        """Tell in status.json how the run stands; the launcher's exit code does not.

        A disk that takes no more is told in the log, and does not end the run.
        """
        content = {"status": status, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), **details}
        try:
            replace_file(self.path / "status.json", json.dumps(content, indent=1))
        except OSError as error:
            log.warning("status.json cannot say that the run is %s (%s)", status, error.strerror)

    def read_status(self) -> dict[str, Any]:
        """What status.json says; nothing where it is not there."""
        try:
            return json.loads((self.path / "status.json").read_text("utf-8"))
        except FileNotFoundError:
            return {}

    def note_skipped(self, window: tuple[int, int], *, step: int, reason: str) -> None:
        """Keep a window of the order that the run jumps over from now on, before any checkpoint tells of it."""
        noted = {"from": window[0], "to": window[1], "step": step, "reason": reason}
        replace_file(self._skipped, json.dumps([*self._notes(), noted], indent=1))

    def skipped(self) -> tuple[tuple[int, int], ...]:
        """Every window that was noted here."""
        return tuple((noted["from"], noted["to"]) for noted in self._notes())

    @property
    def _skipped(self) -> Path:
        return self.path / "skipped.json"

    def _notes(self) -> list[dict[str, Any]]:
        return json.loads(self._skipped.read_text("utf-8")) if self._skipped.exists() else []

    @property
    def _lock(self) -> Path:
        return self.path / "lock.json"

    def require_no_writer(self) -> None:
        """Raises UserError while a process that holds the lock lives."""
        _refuse_living(self._lock)

    def writer_elsewhere(self) -> str | None:
        """The other machine whose rank 0 writes here, if one does."""
        try:
            host, age = json.loads(self._lock.read_text("utf-8"))["host"], time.time() - self._lock.stat().st_mtime
        except (OSError, ValueError):
            return None
        return host if host != socket.gethostname() and age < STALE_SECONDS else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one writer, as told by lock.json with host, process and a heartbeat.

        A lock whose process is gone (this host) or silent for two minutes (another) is taken over.
        Raises UserError while its owner lives.
        """
        path = self._lock
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        while not _create(path, owner):
            _refuse_living(path)
            path.unlink(missing_ok=True)
        stopped = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, stopped), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stopped.set()
            beat.join()
            path.unlink(missing_ok=True)


def _create(path: Path, content: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


def _refuse_living(path: Path) -> None:
    try:
        owner = json.loads(path.read_text("utf-8"))
        age = time.time() - path.stat().st_mtime
    except (FileNotFoundError, json.JSONDecodeError):
        return
    here = owner["host"] == socket.gethostname()
    alive = _is_running(owner["pid"]) if here else age < STALE_SECONDS
    if alive:
        raise UserError(
            f"run.dir {path.parent}: another process writes here (host {owner['host']}, process {owner['pid']}, last "
            f"sign {age:.0f} s ago); stop it, or choose another run.dir"
        )


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        # A restarted container gives the new process the number of the old one.
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beat(path: Path, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_SECONDS):
        # A network file system that fails once must not end the heartbeat.
        with suppress(OSError):
            os.utime(path)
