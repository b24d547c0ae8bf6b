"""Detecting changed files: by a hash of pieces of a file, the tag of a server, or the sha256 of a card.

Name and size are not enough: text that is edited in place, or another corpus with the same shard names, has both.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import file_digest, sha256
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lamda.config.errors import DataError, DataUnavailableError

PIECES = 16
PIECE = 1 << 16
"""Bytes per piece. A file of at most PIECES * PIECE bytes is hashed whole."""

VERIFIED_AT_START = 1 << 32
"""Bytes of local files whose sha256 is checked before training starts."""


def content_of(stream: BinaryIO, size: int) -> str:
    """A hash of `size` and of evenly spaced pieces from the first byte to the last. Moves the stream."""
    if size <= PIECES * PIECE:
        starts, length = [0], size
    else:
        starts, length = [(size - PIECE) * place // (PIECES - 1) for place in range(PIECES)], PIECE
    digest = sha256(f"{size} ".encode())
    for start in starts:
        stream.seek(start)
        digest.update(stream.read(length))
    return f"sample {digest.hexdigest()[:32]}"


class Stored(NamedTuple):
    """The state of a local file; any write changes it."""

    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, file: BinaryIO | Path) -> Stored:
        """The state of an open file or a path. Raises OSError."""
        found = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


def require_sha256(path: str, expected: str) -> None:
    """Raise DataError if a local file does not have its sha256; an unchanged file is read only once."""
    try:
        found = _sha256(path, Stored.of(Path(path)))
    except OSError as error:
        raise cannot_open(path, error) from error
    if found != expected:
        raise DataError(wrong_sha256(path, found, expected))


def wrong_sha256(name: str, found: str, expected: str) -> str:
    """The message for a file with another sha256 than in its card."""
    return f"{name}: its sha256 is {found}, but the card says {expected}; download the file again, or correct the card"


@cache
def _sha256(path: str, _: Stored) -> str:
    with Path(path).open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def verify_some(stated: Sequence[tuple[str, int, str]]) -> list[str]:
    """Check the sha256 of local files, up to VERIFIED_AT_START bytes; returns the files that are left for later.

    stated: (path, size, sha256). Raises DataError, naming a file that differs.
    """
    smallest_first = sorted(stated, key=lambda each: each[1])
    count = sum(total <= VERIFIED_AT_START for total in accumulate(size for _, size, _ in smallest_first))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda each: require_sha256(each[0], each[2]), smallest_first[:count]))
    return [path for path, _, _ in smallest_first[count:]]


TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM)
"""Errors of a disk, a file server or the machine that may disappear on retry."""


def cannot_open(name: str, error: OSError) -> DataError | DataUnavailableError:
    """The error for a file that cannot be opened or read, with a remedy; DataUnavailableError if it is transient."""
    message = f"{name}: cannot be read ({error.strerror or error})"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        message += f"; each lane (at most 64 per source) keeps a file open, and the limit of this process is {limit}: "
        message += "raise it with `ulimit -n`"
    return DataUnavailableError(message) if error.errno in TRANSIENT else DataError(message)
