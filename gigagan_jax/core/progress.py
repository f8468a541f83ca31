"""One line of progress for work that takes a while: how many, how fast, how long still."""

import sys
import time

from gigagan_jax.core.formatting import duration

_PERIOD = 10.0  # seconds between lines where the output is a file; a terminal's line is rewritten


class Progress:
    """Prints to stderr; nothing for work that ends within a period.

    Args:
      title: what is being done.
      total: number of steps.
      unit: what is counted.
      quiet: print nothing.
    """

    def __init__(self, title: str, total: int, unit: str = "", quiet: bool = False):
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.done = 0
        self._terminal = sys.stderr.isatty()
        self._began = self._said = time.monotonic()
        self._open = False

    def step(self, n: int = 1) -> None:
        """`n` more steps are done."""
        self.done += n
        now = time.monotonic()
        if self.quiet or now - self._said < (0.5 if self._terminal else _PERIOD):
            if self.done >= self.total:
                self.close()
            return
        self._said = now
        rate = self.done / max(now - self._began, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        line = f"{self.title}: {self.done} of {self.total}{self.unit}  {rate:.1f}/s  ETA {duration(left)}"
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
        """Ends the line."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False
