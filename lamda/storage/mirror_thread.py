"""Copies checkpoints to the mirror while training continues.

One thread of rank 0 looks at the folder of checkpoints, copies the newest one that the mirror lacks, and deletes there
what `checkpoint.keep` no longer keeps. So there is no queue: what is deleted here before its turn is not copied. No
step waits for it, and a failure is reported once per outage.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from lamda.best_effort import BestEffort, reason_of
from lamda.config.errors import UserError
from lamda.config.schema import CheckpointConfig
from lamda.durable import replace_file
from lamda.storage.lock import LostLockError, RunLock
from lamda.storage.manifest import MANIFEST, complete, rolled_back, step_in_name
from lamda.storage.mirror import Mirror, beside
from lamda.storage.run_directory import RunDirectory

POLL_SECONDS = 5.0
FIRST_WAIT, MAX_WAIT = 1.0, 60.0
"""Between attempts; doubles from the first to the longest, each with random jitter down to half."""
END_SECONDS = 600.0
"""How long the end of a run waits for the last copy."""
OUTAGE_SECONDS = 60.0
"""The same while the mirror fails."""

log = logging.getLogger(__name__)


class MirrorThread:
    """A context in which the checkpoints of a run directory are copied; its end waits for the newest.

    state: what mirror.json says: the newest checkpoint copied, when, and the present problem.
    """

    def __init__(self, mirror: Mirror, directory: RunDirectory, *, keep: CheckpointConfig, lock: RunLock) -> None:
        self._mirror, self._directory, self._keep, self._lock = mirror, directory, keep, lock
        self.state: dict[str, Any] = {"address": mirror.address, "copied": None, "time": None, "problem": None}
        self._copied: dict[str, int] = {}  # name -> when its manifest was written here, in ns
        self._waiting: set[str] = set()
        self._current: Path | None = None
        self._failures = 0
        self._ending = threading.Event()
        self._keeping = BestEffort(f"{directory.mirror} cannot be written")
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def is_copying(self, path: Path) -> bool:
        """Whether a checkpoint is being copied, and so must stay."""
        return path == self._current

    def __enter__(self) -> MirrorThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the newest copy, unless the run has failed."""
        self._ending.set()
        newest = self._newest_missing()
        if value is None:
            if (awaited := newest or self._current) is not None:
                log.info(
                    "waiting for the copy of %s to %s, at most %g s", awaited.name, self._mirror.address, END_SECONDS
                )
            self._wait()
        if (newest := self._newest_missing()) is not None:
            problem = self.state["problem"] or "there was no time"
            self.state["problem"] = f"{newest.name} is not copied: {problem}"
            log.warning("%s is not on %s (%s); the same command copies it", newest.name, self._mirror.address, problem)
            self._note()

    def _wait(self) -> None:
        began = time.monotonic()
        while self._thread.is_alive():
            if time.monotonic() - began > (OUTAGE_SECONDS if self._failures else END_SECONDS):
                return
            self._thread.join(0.1)

    def _work(self) -> None:
        is_prepared = is_clean = False
        while True:
            is_ending = self._ending.is_set()  # before looking: a checkpoint may come meanwhile
            try:
                if not is_prepared:
                    self._mirror.prepare()
                    is_prepared = True
                if not is_clean:
                    self._mirror.require_own(self._directory)
                    self._prune()
                    is_clean = True
                has_copied = self._copy_newest()
            except LostLockError:
                return  # the run is another process's; training reports it
            except Exception as error:
                self._failed(error)
                is_clean = False  # a torn copy may take the room of the next one
                continue
            self._succeeded()
            if is_ending:
                return
            if not has_copied:
                self._ending.wait(POLL_SECONDS)

    def _missing(self) -> list[Path]:
        """Checkpoints to copy, oldest first."""
        here = complete(self._directory.checkpoints)
        kept = [path for path in here if path in here[-self._keep.keep :] or self._stays(path.name)]
        return [path for path in kept if self._copied.get(path.name) != _written(path)]

    def _newest_missing(self) -> Path | None:
        """The newest checkpoint, if it is not on the mirror."""
        here = complete(self._directory.checkpoints)
        return here[-1] if here and here[-1] in self._missing() else None

    def _copy_newest(self) -> bool:
        """Copy the newest checkpoint that is not on the mirror, at the end only the last; whether there was one."""
        missing, void = self._missing(), rolled_back(self._directory.checkpoints)
        names = {path.name for path in missing}
        for name in sorted(self._waiting - names - void):
            log.warning(
                "%s was deleted before it was copied to %s, which is slower than checkpoint.every",
                name,
                self._mirror.address,
            )
        self._waiting = names
        if void & self._copied.keys():
            self._prune()
        if not missing or (self._ending.is_set() and self._newest_missing() is None):
            return False
        path, written = missing[-1], _written(missing[-1])
        self._current = path
        try:
            self._copy(path)
        except FileNotFoundError:
            if path.exists():
                raise
            return True  # deleted here, or rolled back
        finally:
            self._current = None
        self._prune()
        self._copied[path.name] = written
        self._waiting.discard(path.name)
        copied = [each.name for each in complete(self._directory.checkpoints) if each.name in self._copied]
        self.state |= {"copied": next(iter(copied[::-1]), None), "time": time.time(), "problem": None}
        self._note()
        return True

    def _copy(self, path: Path) -> None:
        self._lock.require()
        self._mirror.require_own(self._directory)
        if self._mirror.holds(path):
            return
        for file in filter(Path.is_file, beside(self._directory)):
            self._mirror.upload_beside(file)
        self._mirror.upload(path, before_manifest=self._lock.require)
        log.info("copied %s to %s", path.name, self._mirror.address)

    def _prune(self) -> None:
        """Delete on the mirror what is torn, rolled back, or not kept by the rules of the run directory."""
        here = complete(self._directory.checkpoints)
        if not here:
            return
        there, void = self._mirror.checkpoints(), rolled_back(self._directory.checkpoints)
        # Newer ones are another disk's, which could not be fetched: they stay.
        ours = [name for name in there if name not in void and step_in_name(name) <= step_in_name(here[-1].name)]
        whole = [name for name in ours if there[name]]
        old = [name for name in whole[: -self._keep.keep] if not self._stays(name)]
        torn = [name for name in ours if not there[name]]
        for name in (*sorted(void & there.keys()), *old, *torn):
            self._mirror.remove(name)
        for name in void:
            self._copied.pop(name, None)

    def _stays(self, name: str) -> bool:
        every = self._keep.keep_every
        return every is not None and step_in_name(name) % every == 0

    def _failed(self, error: Exception) -> None:
        """Report the first failure of an outage, and wait before the next attempt."""
        self._failures += 1
        self.state["problem"] = reason = str(error) if isinstance(error, UserError) else reason_of(error)
        if self._failures == 1:
            log.warning("%s cannot be used (%s): trying again, training continues", self._mirror.address, reason)
            self._note()
        seconds = min(MAX_WAIT, FIRST_WAIT * 2.0 ** min(self._failures - 1, 20)) * random.uniform(0.5, 1)
        if self._ending.is_set():
            time.sleep(seconds)
        else:
            self._ending.wait(seconds)

    def _succeeded(self) -> None:
        if self._failures:
            self._failures, self.state["problem"] = 0, None
            log.info("%s can be used again", self._mirror.address)
            self._note()

    def _note(self) -> None:
        with self._keeping:
            replace_file(self._directory.mirror, json.dumps(self.state, indent=1))


def _written(path: Path) -> int:
    """When the manifest of a checkpoint was written, 0 if it is gone: a step is saved again after a rollback."""
    try:
        return (path / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return 0
