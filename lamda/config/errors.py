"""Errors that are told without a traceback."""

from __future__ import annotations

from collections.abc import Callable


class UserError(Exception):
    """Something that the user can mend: what is wrong, where, and what to do (exit code 2)."""


class RunError(Exception):
    """A run that cannot go on, through no mistake of the user's: what happened, and what is safe (exit code 1)."""


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
