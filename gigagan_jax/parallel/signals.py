"""SIGTERM and SIGINT: recorded while the loop runs, handled between steps."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Seconds until a signal that fell into a finaliser is sent again.
_AGAIN = 0.05


class Interrupted(BaseException):
    """A signal stopped the run. A BaseException like KeyboardInterrupt, so that no `except Exception` catches it.

    Attributes:
      number: of the signal.
      agreed: all processes stop at the same step, with their state saved; False where this process stops alone: outside of
        the loop, or when it lost a data worker.
    """

    def __init__(self, number: int, agreed: bool):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.agreed = number, agreed


class StopSignals:
    """Within it, SIGTERM and SIGINT stop the run. Within `hold_signals` they only set `number`, which the loop reads.

    Outside of the loop there is nothing to save, and a signal stops the run at once. A second SIGINT also stops at once, for
    a user who does not want to wait. A second SIGTERM does not: the shutdown of a machine follows its notice.
    """

    def __init__(self) -> None:
        self.number = 0
        self._held = False
        # The handlers to restore, by signal.
        self._before: dict[int, Any] = {}
        self._hook = self._hook_before = sys.unraisablehook

    def __enter__(self) -> "StopSignals":
        self.number = 0
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle_signal)
            self._hook_before = sys.unraisablehook
            sys.unraisablehook = self._hook = self._make_hook()
        return self

    @contextlib.contextmanager
    def hold_signals(self) -> Iterator[None]:
        """Within it, signals wait for the loop."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _handle_signal(self, number: int, frame: Any) -> None:
        if self._held and number == self.number == signal.SIGINT:
            # A second SIGINT: the loop may be in a step that takes minutes.
            raise KeyboardInterrupt
        # SIGTERM (15) outranks SIGINT (2): its exit code makes launchers start the run again.
        self.number = max(self.number, number)
        if not self._held:
            raise Interrupted(number, agreed=False)

    def _make_hook(self) -> Callable[[Any], None]:
        """A handler may run within a finaliser or a callback of the garbage collector, whose exceptions Python drops."""
        before = self._hook_before

        def handle_unraisable(unraisable: Any) -> None:
            if not issubclass(unraisable.exc_type, Interrupted):
                before(unraisable)
                return
            again = threading.Timer(_AGAIN, self._send_again, (unraisable.exc_value.number,))
            again.daemon = True
            again.start()

        # What the hook below is known by (checkpoint/orbax_logs.py) holds of this one too, which calls it.
        handle_unraisable.__dict__.update(getattr(before, "__dict__", {}))
        return handle_unraisable

    def _send_again(self, number: int) -> None:
        # Within the loop the recorded number is enough, and a second SIGINT would stop without saving.
        if self._before and not self._held:
            os.kill(os.getpid(), number)

    def __exit__(self, *exception: object) -> None:
        # A hook that was put on top of this one since stays: it calls this one, which passes everything on.
        if self._before and sys.unraisablehook is self._hook:
            sys.unraisablehook = self._hook_before
        for number, handler in self._before.items():
            # signal.signal returned None for a handler that was not installed from Python.
            signal.signal(number, handler or signal.SIG_DFL)
        self._before.clear()
