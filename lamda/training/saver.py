"""Asynchronous checkpointing: the state is copied to host memory and written while training continues.

The engine copies its state (`lamda.engines.protocol.Engine.snapshot`); this file makes a checkpoint of it. A save has
two parts, and each ends when all ranks have completed theirs: every rank writes its own files; then rank 0 commits them
(`lamda.storage.commit`). The ranks learn about each other from the counters of the steps in between, so that no rank
waits. A save that fails leaves the last checkpoint unchanged.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich import filesize

from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.distributed import gather, on_main
from lamda.durable import Progress
from lamda.engines.protocol import Engine
from lamda.storage.commit import commit, make_fresh, sync_and_describe
from lamda.storage.lock import LostLockError
from lamda.storage.manifest import START
from lamda.storage.state import RunState
from lamda.training import fault_injection

SPARE = 1.2  # free disk space that a save needs / its size
POLL_SECONDS, POLL_SECONDS_PER_RANK = 1.0, 0.02  # of a save that is waited for; every rank reads the sizes of all files


@dataclass(frozen=True)
class SaveResult:
    """How a save ended: `problem` is None where the checkpoint at `path` is complete."""

    step: int
    path: Path
    problem: str | None = None


class Saver:
    """Saves one checkpoint at a time. Every rank has one and makes the same calls at the same steps."""

    def __init__(
        self,
        folder: Path,
        *,
        engine: Engine,
        tokenizer: Path,
        config: Config | None = None,
        start: Mapping[str, Any] = MappingProxyType({}),
        require_lock: Callable[[], None] = lambda: None,
        sync_rows: Callable[[], None] = lambda: None,
        note: Callable[[int], None] = lambda step: None,
        is_used: Callable[[Path], bool] = lambda path: False,
        progress: Progress = lambda: None,
    ) -> None:
        """start: the record of this start (`lamda.training.provenance`).

        require_lock: raises LostLockError on rank 0 if another process has taken over the run; then every rank does.

        sync_rows: syncs the metrics up to a checkpoint before it is complete. note: records the step of a
        complete one. config: to save, if it is not the engine's. is_used: whether an old checkpoint must stay for now.
        progress: called while a save that is waited for makes progress.
        """
        self._require_lock, self._sync_rows, self._note, self._is_used = require_lock, sync_rows, note, is_used
        self._folder, self._engine, self._tokenizer, self._start_record = folder, engine, tokenizer, start
        self._world, self._config = engine.world, config or engine.config
        self._bytes = engine.checkpoint_bytes()  # now, and not in the first save, which would take longer
        self._state = RunState()
        self._attachments: Mapping[str, str] = {}
        self._job: _Job | None = None
        self._is_written = False
        self._jobs = 0
        self._progress, self._pieces = progress, 0

    @property
    def completed_parts(self) -> int:
        """Parts of saves that this rank has completed since the start; their sum over the ranks is for `advance`."""
        return self._jobs - (self._job is not None and not self._job.is_done)

    def begin(self, state: RunState, attachments: Mapping[str, str] = MappingProxyType({})) -> SaveResult | None:
        """Copy the state and begin to write it; no other save is in progress. Returns a failure for lack of room.

        attachments: further small files, by name; of rank 0.
        """
        self._state, self._attachments, self._is_written = state, attachments, False
        self._mark("save.begin")
        size = sum(gather(self._bytes))
        problem = on_main(self._world, lambda: self._make_room(size))
        if isinstance(problem, LostLockError):
            raise problem
        if problem is not None:
            return SaveResult(state.step, self._final, problem)
        write = self._engine.snapshot(self._temporary)
        self._mark("save.copied")
        self._start(lambda: self._write(write))
        return None

    def advance(self, completed_parts: int) -> SaveResult | None:
        """Begin the next part if all ranks have completed theirs; returns the result once the save has ended.

        completed_parts: summed over the ranks.
        """
        if self._job is None or completed_parts < self._jobs * self._world.world_size:
            return None
        return self._next_part(self._job)

    def finish(self) -> SaveResult | None:
        """Wait for the save in progress, if there is one; returns its result."""
        saved = None
        while self._job is not None:
            self._wait(self._job)
            saved = self._next_part(self._job)
        return saved

    def _wait(self, job: _Job) -> None:
        """Wait for a part and report its progress: pieces that are synced and hashed, files that grow or disappear."""
        before = None
        while not job.wait(max(POLL_SECONDS, POLL_SECONDS_PER_RANK * self._world.world_size)):
            now = self._pieces, _sizes(self._folder)
            if now != before:
                self._progress()
            before = now

    def _count_piece(self) -> None:
        self._pieces += 1

    @property
    def _final(self) -> Path:
        return self._folder / f"step-{self._state.step:08d}"

    @property
    def _temporary(self) -> Path:
        return self._folder / f".{self._final.name}.tmp"

    def _mark(self, point: str, path: Path | None = None) -> None:
        fault_injection.maybe_inject(point, rank=self._world.rank, step=self._state.step, path=path)

    def _start(self, work: Callable[[], dict[str, Any]]) -> None:
        self._jobs += 1
        self._job = _Job(work)

    def _next_part(self, job: _Job) -> SaveResult | None:
        """All ranks have completed a part: gather failures, then commit what was written."""
        outcomes = gather((job.result, job.problem))
        self._job = None
        self._mark("save.done" if self._is_written else "save.settled")
        failures = [f"rank {rank} {problem}" for rank, (_, problem) in enumerate(outcomes) if problem is not None]
        if failures:
            lock_errors = [problem for _, problem in outcomes if isinstance(problem, LostLockError)]
            if lock_errors:  # the folder belongs to another process by now
                raise lock_errors[0]
            if self._world.is_main_process:
                shutil.rmtree(self._temporary, ignore_errors=True)
            return SaveResult(self._state.step, self._final, "; ".join(failures))
        if self._is_written:
            return SaveResult(self._state.step, self._final)
        self._is_written = True
        files = {name: entry for part, _ in outcomes for name, entry in part.items()}
        self._start(lambda: self._commit(files) if self._world.is_main_process else {})
        return None

    def _make_room(self, size: int) -> str | LostLockError | None:
        """Make an empty temporary folder and check the disk space; returns the problem, or None."""
        try:
            self._require_lock()
            make_fresh(self._temporary)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            return f"cannot write to {self._folder} ({error.strerror})"
        except LostLockError as error:
            return error
        if free < SPARE * size:
            shutil.rmtree(self._temporary, ignore_errors=True)
            sizes = filesize.decimal(free), filesize.decimal(size)
            return f"{sizes[0]} are free; a checkpoint of {sizes[1]} needs {SPARE} times its size"
        return None

    def _write(self, write: Callable[[], list[Path]]) -> dict[str, Any]:
        folder, files = self._temporary, write()
        if self._world.is_main_process:
            self._state.write(folder / "run_state.json")
            shutil.copyfile(self._tokenizer, folder / "tokenizer.model")
            start = json.dumps(dict(self._start_record))
            texts = {"config.yaml": to_yaml(self._config), START: start, **self._attachments}
            for name, text in texts.items():
                (folder / name).write_text(text, "utf-8")
            files = [*files, *(folder / name for name in ("run_state.json", "tokenizer.model", *texts))]
        first = next(iter(files), None)
        self._mark("save.written", first)
        described = {
            file.relative_to(folder).as_posix(): sync_and_describe(file, progress=self._count_piece) for file in files
        }
        self._mark("save.synced", first)
        return described

    def _commit(self, files: dict[str, Any]) -> dict[str, Any]:
        self._require_lock()
        self._sync_rows()
        content = {
            "step": self._state.step,
            "ranks": self._world.world_size,
            **self._engine.manifest_entries(),
            "model": self._config.model.dimensions,
            "optimizer": self._config.train.optimizer,
            "lora_rank": self._config.train.lora_rank,
            "data": sha256(json.dumps(self._state.fingerprint, sort_keys=True).encode()).hexdigest(),
            "tokenizer": files["tokenizer.model"]["sha256"],
            "configuration": files["config.yaml"]["sha256"],
            "files": files,
        }
        commit(
            self._temporary,
            self._final,
            content,
            keep=self._config.checkpoint.keep,
            keep_every=self._config.checkpoint.keep_every,
            is_used=self._is_used,
            on_point=self._mark,
        )
        self._note(self._state.step)
        return {}


def _sizes(folder: Path) -> list[int]:
    """Blocks on disk of each file of checkpoints that are being written or deleted."""
    sizes = []
    for file in folder.glob(".step-*.tmp/**/*"):
        with suppress(OSError):  # deleted meanwhile
            sizes.append(file.stat().st_blocks)
    return sizes


class _Job:
    """Work in a thread, and its result."""

    def __init__(self, work: Callable[[], dict[str, Any]]) -> None:
        self.result: dict[str, Any] = {}
        self.problem: str | LostLockError | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds`; returns whether it is done."""
        self._thread.join(seconds)
        return self.is_done

    def _run(self) -> None:
        try:
            self.result = self._work()
        except LostLockError as error:
            self.problem = error
        except OSError as error:
            self.problem = f"cannot write ({error.strerror or error})"
        except Exception as error:
            self.problem = f"failed ({type(error).__name__}: {error})"
