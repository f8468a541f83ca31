"""What a user is meant to read, and what can be told of an error."""

import errno


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to mend it.

    The verbs print it without a traceback and leave with its exit code: 2, with which launchers do not start again.
    """

    code = 2


class Unreachable(UserError):
    """Something that the run needs is away, a machine, a process of its own or a disk: not the user's fault, and another
    try may do.
    """

    code = 1


# What a network file system says when its server is away; every other error of a local file is final.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.EAGAIN)


def passing(error: BaseException) -> bool:
    """Is it that of a file system which is away for a while?"""
    return isinstance(error, OSError) and error.errno in _PASSING


def causes(error: BaseException) -> list[BaseException]:
    """An error, and what it came of."""
    out = [error]
    while (cause := out[-1].__cause__ or out[-1].__context__) is not None and cause not in out:
        out.append(cause)
    return out
