"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A user's mistake, told as what, where and what to do; entry points print it and exit with 2."""
