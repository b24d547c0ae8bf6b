"""Atomic, durable writes: a file is complete or absent, and survives a power loss."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

Progress = Callable[[], object]  # called while a long job runs

SYNC_BYTES = 1 << 26
HASH_BYTES = 1 << 20
_WAIT_WRITE_WAIT = 7  # flags of sync_file_range: wait for pages under write-back, write the rest, wait for them


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a small file atomically: readers see the old content or the new, with any number of writers.

    The last writer wins. A killed one leaves a hidden `*.tmp`. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        write_file(temporary, content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    sync_folder(path.parent)


def create_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write a new file atomically, part by part. Raises FileExistsError if there is one already, and OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file and fsync it. Raises OSError."""
    try:
        with path.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is met in writing, which knows no name
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line and fsync it; one that a kill or a full disk has cut short before ends first. Raises OSError."""
    with path.open("ab+") as stream:
        is_cut = False
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            is_cut = stream.read(1) != b"\n"
        stream.write(b"\n" * is_cut + line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def sync_file(path: Path, *, progress: Progress = lambda: None) -> None:
    """Fsync a file that others wrote. progress: called after each piece. Raises OSError."""
    with path.open("rb") as stream:
        for start in range(0, os.fstat(stream.fileno()).st_size, SYNC_BYTES):
            _write_back(stream.fileno(), start)
            progress()
        os.fsync(stream.fileno())


def _write_back(descriptor: int, start: int) -> None:
    """Wait until a piece is written: one fsync of many gigabytes reports no progress for minutes.

    Best effort, on Linux alone; only the fsync that follows makes the file durable.
    """
    write_back = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if write_back is not None:
        write_back(descriptor, ctypes.c_int64(start), ctypes.c_int64(SYNC_BYTES), _WAIT_WRITE_WAIT)


def hash_file(path: Path, *, progress: Progress = lambda: None) -> str:
    """The sha256 of a file in hex digits. progress: called after each piece. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(HASH_BYTES):
            digest.update(piece)
            progress()
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never blocks on a pipe. Raises OSError, also for any other kind of file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """The content of a file, as `open_regular`. Raises OSError."""
    with open_regular(path) as stream:
        return stream.read()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises OSError, and ValueError for any other content."""
    try:
        content = json.loads(read_regular(path))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("is no JSON object")
    return content


@contextmanager
def umask_mode(path: Path) -> Iterator[None]:
    """Give a file that a library writes in this context the mode of the umask, not the library's. Raises OSError."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)
