"""The error that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message says what was found, where, and what would be valid.

    Commands print the message alone, without a traceback, and exit with a code that is not 0.
    """
