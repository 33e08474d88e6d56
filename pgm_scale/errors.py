"""The one error type that users see: a line saying what is wrong, where, and what to do."""


class UserError(Exception):
    """Bad input or environment. The command line prints its message and exits with `exit_code`."""

    exit_code = 2
