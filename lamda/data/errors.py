"""What is raised where text cannot be read as it should."""

from lamda.config.errors import RunError, UserError


class DataError(UserError):
    """Text that cannot be read as it should, until a person changes something; names the file and the place."""


class DataUnavailableError(RunError):
    """Text that a network, a server or a disk does not give now: another try may help (exit code 1)."""
