"""Errors that are told without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Callable

from lamda.console import one_line


class UserError(Exception):
    """Something that the user can mend: what is wrong, where, and what to do (exit code 2)."""


class RunError(Exception):
    """A run that cannot go on, through no mistake of the user's: what happened, and what is safe (exit code 1)."""


_SYSTEMS_ANSWERS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


def refused_by_system(error: OSError) -> str | None:
    """`FILE: REASON` for a file that the disk or its permissions refuse, whoever asked; None for any other error."""
    if error.errno not in _SYSTEMS_ANSWERS or error.filename is None:
        return None
    return f"{one_line(str(error.filename))}: {error.strerror}"


def all_of(*checks: Callable[[], object]) -> None:
    """Run all checks. Raises one UserError with everything that they refuse."""
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
