"""Errors that the user reads, and the classification of errors."""

import errno


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to fix it.

    The verbs print it without a traceback and exit with its code. Launchers do not restart a run that exits with 2.
    """

    code = 2


class Unreachable(UserError):
    """A machine, process or disk that the run needs is unavailable. It is not the user's fault, and a restart may succeed."""

    code = 1


# Errors of a network file system with an unreachable server. Every other error of a local file is final.
_TRANSIENT_ERRORS = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENOTCONN,
    errno.EAGAIN,
)


def is_transient(error: BaseException) -> bool:
    """Whether the error is of a file system that is unavailable for a while."""
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRORS


def error_chain(error: BaseException) -> list[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    chain = [error]
    # `not in`: an error may be in its own chain, when it was raised again while another was handled.
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
