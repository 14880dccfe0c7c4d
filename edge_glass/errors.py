"""The errors that are meant for the person at the keyboard."""

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again


class UserError(Exception):
    """Something the user can mend: the message says what was found, where, and what would be valid.

    Commands print the message alone, without a traceback, and exit with a code that is not 0.
    """


class LostRank(UserError):
    """Another rank has died or does not answer."""


class Stopped(SystemExit):
    """A run was told to stop and has saved itself first; the command exits with `RESUMABLE`.

    Not an `Exception`: it ends a sweep too, instead of being one more failed job.
    """

    def __init__(self) -> None:
        super().__init__(RESUMABLE)
