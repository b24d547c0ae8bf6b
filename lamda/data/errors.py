"""What is raised where text cannot be read as it should."""

from lamda.config.errors import UserError


class DataError(UserError):
    """Text that cannot be read as it should; names the file and the place."""
