"""One writer per run directory, across processes, containers and hosts.

Every writer has its own file, `lock-<id>.json`: it identifies the process, which holds a flock on it while it lives and
touches it every few seconds (the heartbeat). To become the writer, a process first creates its file and then checks all
others: of two processes at least one sees the other, so there are never two writers. A process removes another's file
only if its owner is dead: its flock is free (on one machine, in any container), or, where flock does not work, its
heartbeat is older than STALE_SECONDS and stays silent while it is watched.
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
from typing import Any

from lamda.config.errors import RunError, UserError
from lamda.durable import read_regular

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 120
"""A writer on another machine counts as dead after this long without a heartbeat, by the file server's clock."""
WATCH_SECONDS = 15.0
"""How long the heartbeat of a seemingly dead writer is watched, which is independent of clocks."""
POLL_SECONDS = 0.05
_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class LostLockError(RunError):
    """Another process has become the writer of this run, or the lock file was removed."""


@dataclass(frozen=True)
class Owner:
    """A lock file and its process. holds: whether the process is the writer, rather than still checking others."""

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
        """Read a lock file; returns an unknown owner if its content is invalid. Raises OSError."""
        lines = read_regular(path).split(b"\n")
        try:
            fields = json.loads(lines[0])
            fields = {name: fields.get(name) for name in ("host", "pid", "boot", "namespace", "started", "has_flock")}
        except (ValueError, RecursionError, AttributeError):
            return cls(path)
        if not isinstance(fields["host"], str) or not isinstance(fields["pid"], int):
            return cls(path)
        return cls(path, **fields, holds=path.name == "lock.json" or b'{"holds": true}' in lines)

    def lives(self) -> bool:
        """Whether the process is alive, by this machine's clock."""
        known = self.seen_from_here()
        return self.age() < STALE_SECONDS if known is None else known

    def age(self, now: float | None = None) -> float:
        """Absolute seconds since the last heartbeat; infinite if the file is gone. now: default this machine's time."""
        try:
            return abs((time.time() if now is None else now) - self.path.stat().st_mtime)
        except OSError:
            return float("inf")

    def seen_from_here(self) -> bool | None:
        """Whether the process is alive, as far as this machine knows; None if only its heartbeat can tell."""
        is_held = _is_flocked(self.path)
        if is_held:
            return True
        if self.pid == 0:  # a living owner has a complete file
            return None if is_held is None else False
        if is_held is False and self.has_flock and self.boot is not None and self.boot == _boot():
            return False
        is_ours = self.host == socket.gethostname() and self.boot in (None, _boot())
        return _is_running(self.pid, self.started) if is_ours and self.namespace in (None, _namespace()) else None


def owners(run: Path) -> list[Owner]:
    """The owners of all lock files in a run directory, alive or dead. Raises OSError."""
    all_owners = []
    for path in sorted(run.glob("lock*.json")):
        with suppress(FileNotFoundError):  # released meanwhile
            try:
                all_owners.append(Owner.read(path))
            except PermissionError:
                all_owners.append(Owner(path))
    return all_owners


def living_owner(run: Path) -> Owner | None:
    """The owner of a lock file that is alive, if there is one. Raises OSError."""
    return next((owner for owner in owners(run) if owner.lives()), None)


def refusal(owner: Owner, age: float, *, option: str = "run.dir") -> UserError:
    """The error of a start while another writer is alive. option: the one that names the folder."""
    return UserError(
        f"{option} {owner.path.parent}: another process writes here (host {owner.host}, process {owner.pid}, last sign "
        f"{age:.0f} s ago); stop it, or choose another {option} (if no such process exists, remove {owner.path})"
    )


class RunLock:
    """A context that makes this process the only writer of a run directory. Raises UserError if there is another.

    option: the one that names the folder, for errors.
    """

    def __init__(self, run: Path, *, option: str = "run.dir") -> None:
        self._id, self._option = os.urandom(6).hex(), option
        self._run, self.path = run, run / f"lock-{self._id}.json"
        self._descriptor = -1
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="lock", daemon=True)

    def __enter__(self) -> RunLock:
        try:
            self._create()
            self._thread.start()
            for dead in self._acquire():
                dead.unlink(missing_ok=True)
        except OSError as error:
            self._release()
            raise UserError(
                f"{self._option} {self._run}: cannot be written to ({error.strerror}); check free space and permissions"
            ) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def is_mine(self) -> bool:
        """Whether this process is still the writer, read from disk. Raises OSError."""
        try:
            return json.loads(read_regular(self.path).split(b"\n")[0]).get("id") == self._id
        except (FileNotFoundError, ValueError, AttributeError):
            return False

    def require(self) -> None:
        """Raises LostLockError if this process is no longer the writer, and OSError."""
        if not self.is_mine():
            raise LostLockError(
                f"run.dir {self._run}: {self.path.name} is gone: another process has taken over this run, or the file "
                "was removed. This process exits without further writes"
            )

    def _create(self) -> None:
        """Create the file atomically: complete and locked when others first see it."""
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

    def _acquire(self) -> set[Path]:
        """Become the writer; returns the files of dead ones. Among simultaneous starts the smallest name wins."""
        dead: set[Path] = set()
        deadline = time.monotonic() + 2 * WATCH_SECONDS
        while others := [owner for owner in owners(self._run) if owner.path not in {*dead, self.path}]:
            states = [(other, self._is_alive(other)) for other in others]
            for other in (other for other, is_alive in states if is_alive):
                if other.holds or other.path < self.path or time.monotonic() > deadline:
                    raise refusal(other, other.age(self._now()), option=self._option)
            silent = [other for other, is_alive in states if is_alive is None]
            dead |= {other.path for other, is_alive in states if is_alive is False}
            dead |= _watch(silent)
            for other in silent:
                if other.path not in dead:
                    raise refusal(other, 0.0, option=self._option)
            time.sleep(POLL_SECONDS)
        self._write({"holds": True})
        return dead

    def _is_alive(self, other: Owner) -> bool | None:
        """Whether another process is alive; None if its heartbeat must be watched before it counts as dead."""
        known = other.seen_from_here()
        if known is not None:
            return known
        try:
            age = self._now() - other.path.stat().st_mtime
        except FileNotFoundError:
            return False
        return True if 0 <= age < STALE_SECONDS else None

    def _now(self) -> float:
        """The file server's time, from a heartbeat of this process. Raises OSError."""
        os.utime(self.path)
        return self.path.stat().st_mtime

    def _write(self, content: dict[str, Any]) -> None:
        os.write(self._descriptor, json.dumps(content).encode() + b"\n")
        os.fsync(self._descriptor)

    def _send_heartbeats(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # one failure of a network file system must not end the heartbeat
                os.utime(self.path)

    def _release(self) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._descriptor >= 0:
            with suppress(OSError):  # the name is unique to this process
                self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _watch(suspects: list[Owner]) -> set[Path]:
    """The files whose heartbeat stays silent for WATCH_SECONDS. Raises OSError."""
    if not suspects:
        return set()
    before = {owner.path: _heartbeat(owner.path) for owner in suspects}
    time.sleep(WATCH_SECONDS)
    return {path for path, last in before.items() if _heartbeat(path) in (last, None)}


def _heartbeat(path: Path) -> int | None:
    """When a lock file was last touched, in nanoseconds of the file server's clock; None if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    names = {"host": socket.gethostname(), "pid": pid, "boot": _boot(), "namespace": _namespace()}
    return {**names, "started": _started(pid)}


def _is_flocked(path: Path) -> bool | None:
    """Whether a living process holds the flock of a file; None if unknown."""
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
    """When a process started, in ticks since boot, which tells apart processes that reuse a PID."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return None


def _boot() -> str | None:
    """The boot id of this machine, the same in all containers."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return None


def _namespace() -> str | None:
    """The PID namespace of this process."""
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return None
