"""What Orbax's threads say when they fail, kept for the one line that a user gets."""

import logging
import sys
from typing import Any

_LOGGERS = ("absl", "asyncio")  # that Orbax's threads complain to


class _Heard(logging.Filter):
    """Keeps what Orbax's threads log when they fail: with several processes they hand it over only when all have ended.

    A warning that says no more than that we asked for reading only goes nowhere.
    """

    error: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        left = record.name == "asyncio" and "never retrieved" in record.getMessage()  # the second of two failed writes
        if record.exc_info is None or not ("orbax" in record.pathname or left):
            return "directory is read only" not in record.getMessage()
        self.error = self.error or (record.exc_info[1] if isinstance(record.exc_info, tuple) else None)
        return False  # it is raised too, as one line


def _quiet_about_closed_loops() -> None:
    """One array that cannot be read or written ends the whole while others are still on their way; each of those then
    complains, in a thread, that nobody listens any more. What there is to say is raised.
    """
    unraisable, excepthook = sys.unraisablehook, sys.excepthook
    if getattr(unraisable, "about_closed_loops", False):
        return

    def quiet(problem: Any) -> None:
        if "Event loop is closed" not in str(problem.exc_value):
            unraisable(problem)

    def quiet_print(kind: Any, value: Any, trace: Any) -> None:
        if "Event loop is closed" not in str(value):
            excepthook(kind, value, trace)

    quiet.about_closed_loops = True  # type: ignore[attr-defined]
    sys.unraisablehook, sys.excepthook = quiet, quiet_print
