"""The run directory: paths, status, and skipped sample ranges."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from lamda.best_effort import BestEffort
from lamda.config.errors import RunError, UserError
from lamda.config.loading import load_config
from lamda.durable import append_line, read_object, read_regular, replace_file, sync_file
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


class _RelativePath:
    """A path relative to the run directory."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, directory: RunDirectory, owner: type[RunDirectory]) -> Path:
        return directory.path / self._name


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run (for the layout see README.md)."""

    path: Path

    checkpoints = _RelativePath("checkpoints")
    metrics = _RelativePath("metrics.jsonl")  # one JSON object per step
    discarded_metrics = _RelativePath("metrics.discarded.jsonl")  # rows that a resume or rollback discarded
    tokenizer = _RelativePath("tokenizer.model")
    config = _RelativePath("config.yaml")  # the resolved configuration of the last start
    quarantine = _RelativePath("quarantine.jsonl")  # the first lines without a valid document
    order = _RelativePath("order.jsonl")  # the windows of the data order
    stages = _RelativePath("stages.jsonl")  # where the text of each stage began
    branch = _RelativePath("branch.json")  # the run and step that this run began from
    starts = _RelativePath("starts.jsonl")  # where each start came from
    mirror = _RelativePath("mirror.json")  # the state of the copies in checkpoint.mirror
    data = _RelativePath("data")  # the held-out text of a run without validation text
    samples = _RelativePath("samples")  # sampled text
    log = _RelativePath("train.log")  # console output and warnings
    stop = _RelativePath("STOP")  # its presence asks the run to save and exit
    heartbeats = _RelativePath("heartbeats")  # of the ranks
    profile = _RelativePath("profile")  # profiler traces
    _status = _RelativePath("status.json")
    _last_checkpoint = _RelativePath("last_checkpoint.json")
    _skipped = _RelativePath("skipped.json")

    @property
    def holds_a_run(self) -> bool:
        """Whether the folder holds an earlier run."""
        return self.metrics.exists() or self.checkpoints.exists() or self._last_checkpoint.exists()

    def create(self) -> bool:
        """Create the folder if needed; returns whether it is new. Raises UserError if it is not writable."""
        try:
            if run := self._enclosing_run():
                raise UserError(f"run.dir {self.path}: is inside the checkpoints of {run}; choose another")
            is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"run.dir {self.path}: cannot be written to ({error.strerror}); choose another") from error
        return is_new

    def _enclosing_run(self) -> Path | None:
        """The run whose checkpoint folder contains this folder."""
        folders = (path for path in (self.path.resolve() / "x").parents if path.name == "checkpoints")
        return next((path.parent for path in folders if (path / "LATEST").is_file()), None)

    def remove_if_rejected(self, kind: type[BaseException] | None, value: BaseException | None, _: object) -> None:
        """Remove a new folder if its start was rejected and it holds nothing of use."""
        leftovers = {self.log, self._status, self.heartbeats, self.data, self.path / "hang"}
        with suppress(OSError):
            if isinstance(value, UserError) and {*self.path.iterdir()} <= leftovers:
                shutil.rmtree(self.path)

    def write_status(self, status: Status, **details: Any) -> None:
        """Write status.json, which is more reliable than the launcher's exit code."""
        self.restore_status(
            {"status": status, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), **details}
        )

    def restore_status(self, content: dict[str, Any]) -> None:
        """Write what an earlier `read_status` returned."""
        with BestEffort(f"status.json cannot say that the run is {content['status']}"):
            replace_file(self._status, json.dumps(content, indent=1))

    def amend_status(self, **details: Any) -> None:
        """Add details to status.json."""
        if content := self.read_status():
            self.restore_status({**content, **details})

    def read_status(self) -> dict[str, Any]:
        """The content of status.json; empty if it is missing or invalid."""
        try:
            content = read_object(self._status)
        except (OSError, ValueError):
            return {}
        is_status = content.get("status") in (*get_args(Status),) and isinstance(content.get("time", 0.0), int | float)
        return content if is_status else {}

    def note_start(self, record: Mapping[str, Any]) -> None:
        """Append the record of a start to starts.jsonl."""
        with BestEffort(f"{self.starts} cannot be written"):
            append_line(self.starts, json.dumps(record))

    def sync_metrics(self) -> None:
        """Sync metrics.jsonl to disk. Raises OSError."""
        if self.metrics.exists():
            sync_file(self.metrics)

    def note_checkpoint(self, step: int) -> None:
        """Record a commit outside the checkpoint folder, which may be missing at the next start."""
        with BestEffort(f"{self._last_checkpoint} cannot be written", then="the checkpoint is complete nevertheless"):
            replace_file(self._last_checkpoint, json.dumps({"step": step}))

    def noted_checkpoint(self) -> int | None:
        """The step of the last recorded checkpoint. Raises UserError if the record is invalid, and UnreadableError."""
        try:
            with reading(self._last_checkpoint):
                step = read_object(self._last_checkpoint).get("step")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{self._last_checkpoint}: cannot be read ({error})") from error
        return step if isinstance(step, int) else 0

    def parent(self) -> Path | None:
        """The run that this one is a branch of, if it is one."""
        with suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
            return Path(read_object(self.branch)["run"]).resolve()
        return None

    def note_skipped(
        self,
        window: tuple[int, int],
        *,
        step: int,
        reason: str,
        parked: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    ) -> None:
        """Record a range of samples that the run skips from now on, before any checkpoint holds it.

        parked: sources of later stages, and how far they were read (`lamda.storage.state.ParkedSource`).
        """
        entry: dict[str, Any] = {"from": window[0], "to": window[1], "step": step, "reason": reason}
        if parked:
            entry["parked"] = dict(parked)
        then = "a run that ends before its next checkpoint reads these samples again, and rolls back again"
        with BestEffort(f"{self._skipped} cannot be written", errors=(OSError, RunError, UserError), then=then):
            replace_file(self._skipped, json.dumps([*self._skipped_ranges(), entry], indent=1))

    def skipped(self) -> tuple[tuple[int, int], ...]:
        """All recorded ranges."""
        return tuple((each["from"], each["to"]) for each in self._skipped_ranges())

    def parked(self, known: Collection[tuple[int, int]]) -> dict[str, dict[str, Any]]:
        """Sources of later stages from which the run has rolled back, except with the ranges `known`."""
        entries = (each for each in self._skipped_ranges() if (each["from"], each["to"]) not in known)
        parked = (each.get("parked", {}) for each in entries)
        return {name: source for each in parked for name, source in each.items()}

    @property
    def rollbacks(self) -> int:
        """The number of ranges from rollbacks of this run."""
        return sum("inherited_from" not in each for each in self._skipped_ranges())

    def inherit_skipped(self, other: RunDirectory) -> None:
        """Record the ranges of the run whose checkpoint this one starts from; both have the same data order."""
        known = self.skipped()
        new = [each for each in other._skipped_ranges() if (each["from"], each["to"]) not in known]
        if new:
            inherited = [{"inherited_from": str(other.path), **each} for each in new]
            replace_file(self._skipped, json.dumps([*self._skipped_ranges(), *inherited], indent=1))

    def _skipped_ranges(self) -> list[dict[str, Any]]:
        try:
            with reading(self._skipped):
                ranges = json.loads(read_regular(self._skipped))
            if not (isinstance(ranges, list) and all(_is_range(each["from"], each["to"]) for each in ranges)):
                raise ValueError("is no list of ranges with integers `from` and `to`")
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{self._skipped}: cannot be read ({error}); it names the samples that the run skips: restore it "
                "from `skipped` in the newest checkpoint's run_state.json"
            ) from error
        return ranges

    def require_no_writer(self) -> None:
        """Raises UserError while a living process holds the lock."""
        if owner := lock.living_owner(self.path):
            raise lock.refusal(owner, owner.age())

    def writer_elsewhere(self) -> str | None:
        """The host of a living writer on another machine, if there is one."""
        host = socket.gethostname()
        others = (owner for owner in lock.owners(self.path) if owner.host != host)
        return next((owner.host for owner in others if owner.lives()), None)

    def lock(self) -> RunLock:
        """A context in which this process is the only writer (`lamda.storage.lock`)."""
        return RunLock(self.path)


def _is_range(first: Any, last: Any) -> bool:
    """Whether these are the first sample of a range and the one after its last."""
    return type(first) is int and type(last) is int and 0 <= first <= last


@dataclass(frozen=True)
class RunStatus:
    """The state of a run, for listings.

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
        writers = [_Writer(owner.lives(), owner.pid) for owner in lock.owners(directory.path)]
    except OSError:
        return None
    return max(writers, key=lambda writer: writer.is_alive, default=None)


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
    runs: dict[Path, Path] = {}
    for path in sorted(_walk(folder, depth), key=lambda path: len(path.parts)):
        runs.setdefault(path.resolve(), path)
    return list(runs.values())


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
