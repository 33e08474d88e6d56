"""The errors that users see: each is one line saying what is wrong, where, and what to do.

The command line prints the message and exits with the error's `exit_code`; README lists the codes.
"""


class UserError(Exception):
    """Bad input or environment."""

    exit_code = 2


class UnstableError(UserError):
    """A loss or gradient that is not finite, or a spike: no rank has updated its weights with it."""

    exit_code = 3


class HungRankError(UserError):
    """A rank hangs, is stopped or is dead, and the others cannot go on without it; the message names it."""

    exit_code = 4


class Preempted(UserError):
    """A signal asked the run to stop: it has saved a checkpoint and can be started again to go on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
