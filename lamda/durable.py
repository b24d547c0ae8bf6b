"""Files that are whole or not there, and that last through a power cut."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

Progress = Callable[[], object]
"""Called while a long job goes on."""

SYNC_BYTES = 1 << 26
HASH_BYTES = 1 << 20
_WAIT_WRITE_WAIT = 7  # the flags of sync_file_range: wait for what is being written, write the rest, wait for it


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a small file: readers see the old content or the new, never half, however many processes write at once.

    Which of several writers comes last is left to chance. A killed one leaves a hidden `*.tmp`. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        write_file(temporary, content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file and bring it to the disk. Raises OSError."""
    with path.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_file(path: Path, *, progress: Progress = lambda: None) -> None:
    """Bring what others wrote into a file to the disk. progress: called for each piece on it. Raises OSError."""
    with path.open("rb") as stream:
        for start in range(0, os.fstat(stream.fileno()).st_size, SYNC_BYTES):
            _write_back(stream.fileno(), start)
            progress()
        os.fsync(stream.fileno())


def _write_back(descriptor: int, start: int) -> None:
    """Wait until a piece is written: a single fsync of many gigabytes would show nothing for minutes.

    Best effort, on Linux alone; fsync, which comes after it, makes the file last.
    """
    write_back = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if write_back is not None:
        write_back(descriptor, ctypes.c_int64(start), ctypes.c_int64(SYNC_BYTES), _WAIT_WRITE_WAIT)


def hash_file(path: Path, *, progress: Progress = lambda: None) -> str:
    """The sha256 of a file in hex digits. progress: called for each piece that is read. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(HASH_BYTES):
            digest.update(piece)
            progress()
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames in a folder last. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """A file to read; a pipe is never waited for, and counts as no file. Raises OSError."""
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
    """The JSON object in a small file. Raises OSError, and ValueError where it holds anything else."""
    try:
        content = json.loads(read_regular(path))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("is no JSON object")
    return content


@contextmanager
def umask_mode(path: Path) -> Iterator[None]:
    """Give a file that a library writes meanwhile the mode that the umask asks for, whatever the library's own.

    Raises OSError.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)
