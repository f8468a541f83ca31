"""What a user is meant to read."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to mend it.

    The verbs print it without a traceback and leave with its exit code: 2, with which launchers do not start again.
    """

    code = 2


class Unreachable(UserError):
    """Other machines of the run did not come: not the user's fault, and another try may do."""

    code = 1
