"""Errors of reading text."""

from lamda.config.errors import RunError, UserError


class DataError(UserError):
    """Text that cannot be read until a person fixes something; names the file and the position."""


class DataUnavailableError(RunError):
    """Text that a network, server or disk cannot deliver now: retrying may help (exit code 1)."""
