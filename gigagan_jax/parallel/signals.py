"""SIGTERM and SIGINT: noted while the loop runs, acted on between steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupted(BaseException):
    """A signal asked the run to stop; its state is saved. Like KeyboardInterrupt it is no error that anybody should mend.

    Attributes:
      number: of the signal.
      agreed: all processes of the run stop with it; False before the first step and after the last one.
    """

    def __init__(self, number: int, agreed: bool):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.agreed = number, agreed


class _Signals:
    """While it is open, SIGTERM and SIGINT stop the run; while it is held, once the loop looks at `number`.

    Outside of the loop nothing is to be saved, and a signal stops the run where it is. A second SIGINT acts at once too, for a
    user who does not want to wait; a second SIGTERM does not: a machine's shutdown comes after its notice.
    """

    def __init__(self) -> None:
        self.number = 0
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What comes in it waits for the loop."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _handle(self, number: int, frame: Any) -> None:
        if self._held and number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = max(self.number, number)
        if not self._held:
            raise Interrupted(number, agreed=False)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python
        self._before.clear()
