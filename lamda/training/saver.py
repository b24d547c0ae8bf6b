"""Saving in the background: the state is copied to host memory at once and written while training goes on.

The engine knows what its state is (`lamda.engines.protocol.Engine.snapshot`), this file how it becomes a checkpoint.
A save has two parts, and each ends when all ranks have settled theirs: every rank writes its own
files; then rank 0 commits them (`lamda.storage.commit`). The ranks tell each other with the figures
of the steps in between, so that nobody waits. A save that fails leaves the last checkpoint as it was.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich import filesize

from lamda.config.help import to_yaml
from lamda.distributed import gather, on_main
from lamda.durable import Progress
from lamda.engines.protocol import Engine
from lamda.storage.commit import commit, make_fresh, sync_and_describe
from lamda.storage.lock import LostLockError
from lamda.storage.state import RunState
from lamda.training import fault_injection

SPARE = 1.2
"""Free space that a save asks for / its own size."""
POLL_SECONDS, POLL_SECONDS_A_RANK = 1.0, 0.02
"""Between two looks at a save that is waited for; with more ranks fewer, for each looks at all files."""


@dataclass(frozen=True)
class Saved:
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
        require_lock: Callable[[], None] = lambda: None,
        sync_rows: Callable[[], None] = lambda: None,
        note: Callable[[int], None] = lambda step: None,
        progress: Progress = lambda: None,
    ) -> None:
        """require_lock: raises LostLockError on rank 0 where another process writes the run by now; then every rank
        does. sync_rows: brings the rows up to a checkpoint to the disk, before the checkpoint is complete. note: keeps
        the step of a complete one. progress: called while a save that is waited for makes progress.
        """
        self._require_lock, self._sync_rows, self._note = require_lock, sync_rows, note
        self._folder, self._engine, self._tokenizer = folder, engine, tokenizer
        self._world, self._config = engine.world, engine.config
        self._state = RunState()
        self._job: _Job | None = None
        self._is_written = False
        self._jobs = 0
        self._progress, self._pieces = progress, 0

    @property
    def settled(self) -> int:
        """Parts of saves that this rank has settled since the start; their sum over the ranks is for `advance`."""
        return self._jobs - (self._job is not None and not self._job.is_done)

    def begin(self, state: RunState) -> Saved | None:
        """Copy the state, and start to write it; no other save is under way.

        Returns how it ended where it cannot even begin: there is no room.
        """
        self._state, self._is_written = state, False
        self._at("save.begin")
        size = sum(gather(self._engine.checkpoint_bytes()))
        problem = on_main(self._world, lambda: self._make_room(size))
        if isinstance(problem, LostLockError):
            raise problem
        if problem is not None:
            return Saved(state.step, self._final, problem)
        write = self._engine.snapshot(self._temporary)
        self._at("save.copied")
        self._start(lambda: self._write(write))
        return None

    def advance(self, settled: int) -> Saved | None:
        """Go on where every rank has settled this part; how the save ended, once. settled: sum over the ranks."""
        if self._job is None or settled < self._jobs * self._world.size:
            return None
        return self._next_part()

    def finish(self) -> Saved | None:
        """Wait for the save that is under way, if one is; how it ended."""
        saved = None
        while self._job is not None:
            self._wait(self._job)
            saved = self._next_part()
        return saved

    def _wait(self, job: _Job) -> None:
        """Wait for a part, and tell of its progress: pieces that are synced and hashed, files that grow or go."""
        before = None
        while not job.wait(max(POLL_SECONDS, POLL_SECONDS_A_RANK * self._world.size)):
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

    def _at(self, point: str, path: Path | None = None) -> None:
        fault_injection.reach(point, rank=self._world.rank, step=self._state.step, path=path)

    def _start(self, work: Callable[[], dict[str, Any]]) -> None:
        self._jobs += 1
        self._job = _Job(work)

    def _next_part(self) -> Saved | None:
        """All ranks are done with a part: hear of failures, then commit what was written."""
        found = gather((self._job.result, self._job.problem))
        self._job = None
        self._at("save.done" if self._is_written else "save.settled")
        failures = [f"rank {rank} {problem}" for rank, (_, problem) in enumerate(found) if problem is not None]
        if failures:
            lost = [problem for _, problem in found if isinstance(problem, LostLockError)]
            if lost:  # the folder is another process's by now
                raise lost[0]
            if self._world.is_main:
                shutil.rmtree(self._temporary, ignore_errors=True)
            return Saved(self._state.step, self._final, "; ".join(failures))
        if self._is_written:
            return Saved(self._state.step, self._final)
        self._is_written = True
        files = {name: entry for part, _ in found for name, entry in part.items()}
        self._start(lambda: self._commit(files) if self._world.is_main else {})
        return None

    def _make_room(self, size: int) -> str | LostLockError | None:
        """An empty temporary folder on a disk with room enough; what is wrong, or None."""
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
            return f"{sizes[0]} are free; a checkpoint of {sizes[1]} asks for {SPARE} times its size"
        return None

    def _write(self, write: Callable[[], list[Path]]) -> dict[str, Any]:
        """Write this rank's files; their entries in the manifest."""
        folder, files = self._temporary, write()
        if self._world.is_main:
            self._state.write(folder / "run_state.json")
            (folder / "config.yaml").write_text(to_yaml(self._config), "utf-8")
            shutil.copyfile(self._tokenizer, folder / "tokenizer.model")
            files = [*files, *(folder / name for name in ("run_state.json", "config.yaml", "tokenizer.model"))]
        first = next(iter(files), None)
        self._at("save.written", first)
        described = {
            file.relative_to(folder).as_posix(): sync_and_describe(file, progress=self._count_piece) for file in files
        }
        self._at("save.synced", first)
        return described

    def _commit(self, files: dict[str, Any]) -> dict[str, Any]:
        self._require_lock()
        self._sync_rows()
        content = {
            "step": self._state.step,
            "ranks": self._world.size,
            **self._engine.manifest_entries(),
            "model": self._config.model.dimensions,
            "optimizer": self._config.train.optimizer,
            "lora_rank": self._config.train.lora_rank,
            "data": sha256(json.dumps(self._state.fingerprint, sort_keys=True).encode()).hexdigest(),
            "tokenizer": files["tokenizer.model"]["sha256"],
            "configuration": files["config.yaml"]["sha256"],
            "files": files,
        }
        keep = self._config.checkpoint
        commit(self._temporary, self._final, content, keep=keep.keep, keep_every=keep.keep_every, at=self._at)
        self._note(self._state.step)
        return {}


def _sizes(folder: Path) -> list[int]:
    """Bytes on the disk of each file of checkpoints that are being written or deleted."""
    sizes = []
    for file in folder.glob(".step-*.tmp/**/*"):
        with suppress(OSError):  # it has gone meanwhile
            sizes.append(file.stat().st_blocks)
    return sizes


class _Job:
    """Work in a thread, and how it ended."""

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
        """Wait so long at the most; whether it is done."""
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
