"""Errors that are reported without a traceback, and the wording that their messages share."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable

from lamda.console import one_line


class UserError(Exception):
    """Something that the user can fix; the message says what is wrong, where, and what to do (exit code 2)."""


class RunError(Exception):
    """A run that cannot continue, through no fault of the user; the message says what happened (exit code 1)."""


class DataError(UserError):
    """Text that cannot be read as it is; the message names the file and the place."""


class DataUnavailableError(RunError):
    """Text that a network, a server or a disk does not deliver now; a retry may help (exit code 1)."""


_FILE_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.EFBIG,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def refused_by_system(error: OSError) -> str | None:
    """`FILE: REASON` where the disk or its permissions caused the error; None for any other error.

    An error of writing, unlike one of opening, has no file.
    """
    if error.filename is None and error.errno in _FULL:
        return f"a file cannot be written ({error.strerror})"
    if error.errno not in _FILE_ERRORS or error.filename is None:
        return None
    return f"{one_line(str(error.filename))}: {error.strerror}"


def all_of(*checks: Callable[[], object]) -> None:
    """Run all checks. Raises one UserError with the messages of all that fail."""
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name most like `name`, or an empty string."""
    matches = difflib.get_close_matches(name, [each for each in known if each != name], n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
