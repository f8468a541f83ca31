"""A progress line for long work: items done, rate, and time left."""

import sys
import time

from gigagan_jax.core.formatting import format_duration

# Seconds between lines in a file. On a terminal one line is rewritten twice a second.
_FILE_PERIOD, _TERMINAL_PERIOD = 10.0, 0.5


class ProgressBar:
    """Prints progress to stderr. Work that ends within one period prints nothing.

    Args:
      title: name of the work.
      total: number of items.
      unit: of the items, with a space in front.
      quiet: print nothing.
    """

    def __init__(self, title: str, total: int, unit: str = "", quiet: bool = False):
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.done = 0
        self._terminal = sys.stderr.isatty()
        self._started = self._printed = time.monotonic()
        self._open = False

    def step(self, n: int = 1) -> None:
        """Counts `n` more items."""
        self.done += n
        now = time.monotonic()
        # The last item must end the line even if nothing is due.
        if self.quiet or now - self._printed < (_TERMINAL_PERIOD if self._terminal else _FILE_PERIOD):
            if self.done >= self.total:
                self.close()
            return
        self._printed = now
        # The mean rate since the start, which varies less than a recent one.
        rate = self.done / max(now - self._started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        line = f"{self.title}: {self.done} of {self.total}{self.unit}  {rate:.1f}/s  ETA {format_duration(left)}"
        # \x1b[K erases the rest of a longer line before.
        print(
            f"\r{line}\x1b[K" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )
        self._open = self._terminal
        if self.done >= self.total:
            self.close()

    def close(self) -> None:
        """Ends a line that is open on a terminal."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False
