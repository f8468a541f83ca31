"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to mend it.

    The verbs print it without a traceback and leave with exit code 2.
    """
