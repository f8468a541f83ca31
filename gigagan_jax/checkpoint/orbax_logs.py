"""Filters the log of Orbax's threads: their errors become the one line that a user reads."""

import logging
import sys
from typing import Any

# Orbax's threads report errors to these loggers.
ORBAX_LOGGERS = ("absl", "asyncio")


class BackgroundErrors(logging.Filter):
    """Keeps the first error that a thread of Orbax logs.

    With several processes Orbax raises such an error only after all processes have finished their write.

    Attributes:
      error: the first error; None without one.
    """

    error: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        # asyncio reports the second of two failed writes.
        unretrieved = record.name == "asyncio" and "never retrieved" in record.getMessage()
        if record.exc_info is None or not ("orbax" in record.pathname or unretrieved):
            # Orbax warns about every read-only manager; a reader asks for exactly that.
            return "directory is read only" not in record.getMessage()
        self.error = self.error or (record.exc_info[1] if isinstance(record.exc_info, tuple) else None)
        # The caller raises the error as one line: a traceback in the log would repeat it.
        return False


def silence_closed_loop_errors() -> None:
    """Hides "Event loop is closed" errors of Orbax's threads.

    When one array fails, Orbax closes the loop while other arrays are in flight, and each of them then prints an error.
    The first failure is raised all the same.
    """
    unraisable, excepthook = sys.unraisablehook, sys.excepthook
    # Every Checkpoints installs the hooks: wrapping them again and again would nest them.
    if getattr(unraisable, "about_closed_loops", False):
        return

    def hide_unraisable(problem: Any) -> None:
        if "Event loop is closed" not in str(problem.exc_value):
            unraisable(problem)

    def hide_exception(kind: Any, value: Any, trace: Any) -> None:
        if "Event loop is closed" not in str(value):
            excepthook(kind, value, trace)

    hide_unraisable.about_closed_loops = True  # type: ignore[attr-defined]
    sys.unraisablehook, sys.excepthook = hide_unraisable, hide_exception
