"""Errors that are told without a traceback."""


class UserError(Exception):
    """Something that the user can mend: what is wrong, where, and what to do (exit code 2)."""


class RunError(Exception):
    """A run that cannot go on, through no mistake of the user's: what happened, and what is safe (exit code 1)."""
