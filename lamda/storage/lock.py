"""One writer per run directory, across processes, containers and hosts.

Every writer has a file of its own, `lock-<id>.json`: it says who the writer is, the writer holds it with flock while it
lives, and touches it every few seconds. To become the writer, a process first shows its file and then looks at all
others: of two processes at least one sees the other, so never two are writers. Nobody removes another's file unless its
owner is dead: its flock is free (on one machine, whatever the container), or, where flock does not reach, its beat has
been silent for STALE_SECONDS and stays silent while it is watched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lamda.config.errors import RunError, UserError
from lamda.durable import read_regular

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 120
"""A writer on another machine counts as dead after so long without a beat, by the file server's clock."""
WATCH_SECONDS = 15.0
"""How long the beat of a writer that seems dead is watched, which no clock can falsify."""
POLL_SECONDS = 0.05
_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class LostLockError(RunError):
    """Another process writes this run by now, or its lock file was removed."""


@dataclass(frozen=True)
class Owner:
    """A lock file and the process that it names. holds: whether that process is the writer, and not still looking."""

    path: Path
    host: str = "unknown"
    pid: int = 0
    boot: str | None = None
    namespace: str | None = None
    started: int | None = None
    has_flock: bool = False
    holds: bool = True

    @classmethod
    def read(cls, path: Path) -> Owner:
        """What a lock file says; an unknown owner where it says nothing that can be used. Raises OSError."""
        lines = read_regular(path).split(b"\n")
        try:
            fields = json.loads(lines[0])
            fields = {name: fields.get(name) for name in ("host", "pid", "boot", "namespace", "started", "has_flock")}
        except (ValueError, RecursionError, AttributeError):
            return cls(path)
        if not isinstance(fields["host"], str) or not isinstance(fields["pid"], int):
            return cls(path)
        return cls(path, **fields, holds=path.name == "lock.json" or b'{"holds": true}' in lines)

    def lives(self, *, now: float | None = None) -> bool:
        """Whether the process lives. now: the file server's time; default: this machine's."""
        known = self.seen_from_here()
        return self.age(now) < STALE_SECONDS if known is None else known

    def age(self, now: float | None = None) -> float:
        """Seconds since its last sign, or until it where clocks differ; infinite where there is no file any more."""
        try:
            return abs((time.time() if now is None else now) - self.path.stat().st_mtime)
        except OSError:
            return float("inf")

    def seen_from_here(self) -> bool | None:
        """Whether the process lives, as far as this machine knows; None where only its beat can tell."""
        is_held = _is_flocked(self.path)
        if is_held:
            return True
        if self.pid == 0:  # whoever lives has a complete file
            return None if is_held is None else False
        if is_held is False and self.has_flock and self.boot is not None and self.boot == _boot():
            return False
        is_ours = self.host == socket.gethostname() and self.boot in (None, _boot())
        return _is_running(self.pid, self.started) if is_ours and self.namespace in (None, _namespace()) else None


def owners(run: Path) -> list[Owner]:
    """The writers, and would-be writers, that files in a run directory name, living or dead. Raises OSError."""
    found = []
    for path in sorted(run.glob("lock*.json")):
        with suppress(FileNotFoundError):  # it has ended meanwhile
            try:
                found.append(Owner.read(path))
            except PermissionError:
                found.append(Owner(path))
    return found


def living_owner(run: Path) -> Owner | None:
    """The writer of a run directory, if one lives. Raises OSError."""
    return next((owner for owner in owners(run) if owner.lives()), None)


def refusal(owner: Owner, age: float) -> UserError:
    """What a start is told while another writer lives."""
    return UserError(
        f"run.dir {owner.path.parent}: another process writes here (host {owner.host}, process {owner.pid}, last sign "
        f"{age:.0f} s ago); stop it, or choose another run.dir (if no such process exists, remove {owner.path})"
    )


class RunLock:
    """Being the one writer of a run directory; use it as a context, which raises UserError while another one lives."""

    def __init__(self, run: Path) -> None:
        self._id = os.urandom(6).hex()
        self._run, self.path = run, run / f"lock-{self._id}.json"
        self._descriptor = -1
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lock", daemon=True)

    def __enter__(self) -> RunLock:
        try:
            self._announce()
            self._thread.start()
            for dead in self._outlast():
                dead.unlink(missing_ok=True)
        except OSError as error:
            self._release()
            raise UserError(
                f"run.dir {self._run}: cannot be written to ({error.strerror}); free space or permissions are missing"
            ) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def is_mine(self) -> bool:
        """Whether this process is still the writer: read again, not remembered. Raises OSError."""
        try:
            return json.loads(read_regular(self.path).split(b"\n")[0]).get("id") == self._id
        except (FileNotFoundError, ValueError, AttributeError):
            return False

    def require(self) -> None:
        """Raises LostLockError where this process is the writer no more, and OSError."""
        if not self.is_mine():
            raise LostLockError(
                f"run.dir {self._run}: {self.path.name} is gone: another process has taken over this run, or a person "
                "removed the file. This process ends and writes nothing more"
            )

    def _announce(self) -> None:
        """Show the file: complete, and held, from the first moment that others see it."""
        temporary = self._run / f".{self.path.name}.tmp"
        self._descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                has_flock = True
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                has_flock = False
            self._write({"id": self._id, **_this_process(), "has_flock": has_flock})
            temporary.rename(self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _outlast(self) -> set[Path]:
        """Become the writer; files of dead ones. Of processes that look at the same time the smallest name wins."""
        dead: set[Path] = set()
        deadline = time.monotonic() + 2 * WATCH_SECONDS
        while others := [owner for owner in owners(self._run) if owner.path not in {*dead, self.path}]:
            found = [(other, self._judge(other)) for other in others]
            for other in (other for other, lives in found if lives):
                if other.holds or other.path < self.path or time.monotonic() > deadline:
                    raise refusal(other, other.age(self._now()))
            silent = [other for other, lives in found if lives is None]
            dead |= {other.path for other, lives in found if lives is False}
            dead |= _watch(silent)
            for other in silent:
                if other.path not in dead:
                    raise refusal(other, 0.0)
            time.sleep(POLL_SECONDS)
        self._write({"holds": True})
        return dead

    def _judge(self, other: Owner) -> bool | None:
        """Whether another process lives; None where its beat has to be watched before it may be called dead."""
        known = other.seen_from_here()
        if known is not None:
            return known
        try:
            age = self._now() - other.path.stat().st_mtime
        except FileNotFoundError:
            return False
        return True if 0 <= age < STALE_SECONDS else None

    def _now(self) -> float:
        """The file server's time: this process's own beat, made now. Raises OSError."""
        os.utime(self.path)
        return self.path.stat().st_mtime

    def _write(self, content: dict[str, Any]) -> None:
        os.write(self._descriptor, json.dumps(content).encode() + b"\n")
        os.fsync(self._descriptor)

    def _keep_beating(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a network file system that fails once must not end the beat
                os.utime(self.path)

    def _release(self) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._descriptor >= 0:
            with suppress(OSError):  # a name that no other process ever has
                self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _watch(suspects: list[Owner]) -> set[Path]:
    """Those whose beat stays silent for WATCH_SECONDS. Raises OSError."""
    if not suspects:
        return set()
    before = {owner.path: _beat(owner.path) for owner in suspects}
    time.sleep(WATCH_SECONDS)
    return {path for path, beat in before.items() if _beat(path) in (beat, None)}


def _beat(path: Path) -> int | None:
    """When a lock file was touched last, in nanoseconds of the file server's clock; None where it is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    names = {"host": socket.gethostname(), "pid": pid, "boot": _boot(), "namespace": _namespace()}
    return {**names, "started": _started(pid)}


def _is_flocked(path: Path) -> bool | None:
    """Whether a living process holds the file; None where that cannot be known."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _is_running(pid: int, started: int | None) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return started is None or _started(pid) == started


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot: a number that is used again belongs to another start."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return None


def _boot() -> str | None:
    """Which start of which machine this is, in any container."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return None


def _namespace() -> str | None:
    """Where this machine's process numbers mean what they mean here."""
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return None
