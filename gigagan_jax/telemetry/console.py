"""What a run says on the terminal: the progress line and quiet logs."""

from __future__ import annotations

import collections
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Of the progress line: groups of (text before the number, key in the metrics, format). What a run lacks is left out.
Layout = Sequence[Sequence[tuple[str, str, str]]]
PROGRESS_LAYOUT: Layout = (
    (("MFU", "mfu", ".1%"), ("goodput", "goodput", ".0%")),
    (("D real", "logits/real", "+.2f"), ("fake", "logits/fake", "+.2f"), ("G", "loss/g", ".2f")),
    (("r1", "loss/r1", ".2g"),),
    (("gnorm G", "grad_norm/g", ".2g"), ("D", "grad_norm/d", ".2g")),
)
_NOISY = ("absl", "orbax", "jax", "grain", "tensorflow_datasets", "etils", "tensorboardX", "asyncio", "PIL", "urllib3")


class Progress:
    """The line that says how far a run is. It holds no clock and writes nothing: print what `update` returns.

    The line is plain text without control characters, so that a terminal, a file and a cluster's log all take it.
    The rate is that of the last `window` seconds of the caller's clock, which best stands still while something else than
    training is done. The time before the first `update` never counts; until there is a rate the line says "compiling".

    Args:
      total_kimg: length of the run, in thousands of images.
      start_images: images that were seen before this process started (a resumed run).
      window: seconds that the rate is taken over.
      layout: what is shown of the metrics; see PROGRESS_LAYOUT.
    """

    def __init__(
        self,
        total_kimg: float,
        start_images: int = 0,
        window: float = 60.0,
        layout: Layout = PROGRESS_LAYOUT,
    ):
        self.total_images = total_kimg * 1000
        self.window = window
        self.layout = layout
        self._start = self._images = start_images
        self._points: collections.deque[tuple[float, int]] = collections.deque()  # (seconds, images)

    @property
    def rate(self) -> float | None:
        """Images a second over the window; None while it is not known."""
        if len(self._points) < 2:
            return None
        (t0, n0), (t1, n1) = self._points[0], self._points[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else None

    def update(self, images_seen: int, metrics: Mapping[str, Any], now: float) -> str:
        """`advance` and `line` in one."""
        self.advance(images_seen, now)
        return self.line(metrics)

    def advance(self, images_seen: int, now: float) -> None:
        """Takes note of the images seen so far, this run's and those before a resume.

        Args:
          images_seen: images since the very start of training.
          now: seconds on any clock that does not go back.
        """
        if self._points and (images_seen < self._points[-1][1] or now < self._points[-1][0]):
            self._points.clear()  # the run went back to a checkpoint, or the clock did: start afresh
        # The first point ends the first step, so that its compilation lies before everything that is measured.
        if images_seen > self._start or self._points:
            self._points.append((now, images_seen))
        while len(self._points) > 2 and self._points[1][0] <= now - self.window:
            self._points.popleft()
        self._images = images_seen

    def restart(self, images_seen: int, now: float) -> None:
        """Takes the rate from here on: the step before was compiled, and its time counts nowhere."""
        self._points.clear()
        self._points.append((now, images_seen))

    def line(self, metrics: Mapping[str, Any]) -> str:
        """The line to print, with these numbers by name."""
        images_seen = self._images
        share = 100 * images_seen / self.total_images if self.total_images > 0 else 100.0
        done = f"kimg {images_seen / 1000:.1f}/{self.total_images / 1000:.1f}  {share:.1f} %"
        rate = self.rate
        if rate is None:
            speed = "images/s --  ETA --" if self._points else "compiling"
        else:
            eta = _duration((self.total_images - images_seen) / rate) if rate > 0 else "--"
            chip = metrics.get("images_per_second_per_chip", rate)
            speed = f"images/s {_short(rate)}{f' ({_short(chip)} a chip)' if chip < rate else ''}  ETA {eta}"
        groups = []
        for group in self.layout:
            shown = [f"{label} {float(metrics[key]):{spec}}" for label, key, spec in group if key in metrics]
            if shown:
                groups.append("  ".join(shown))
        return "  | ".join([f"{done}  {speed}", *groups])


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2f}"


def _duration(seconds: float) -> str:
    """`0:11:52`, and with days in front from one day on: `2d 03:00:00`."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, minutes, secs = rest // 3600, rest // 60 % 60, rest % 60
    return f"{days}d {hours:02d}:{minutes:02d}:{secs:02d}" if days else f"{hours}:{minutes:02d}:{secs:02d}"


class _Formatter(logging.Formatter):
    """`12:34:56 message`; what is no plain information also says what it is and who says it."""

    def __init__(self, prefix: str):
        super().__init__(datefmt="%H:%M:%S")
        self._prefix = prefix

    def formatMessage(self, record: logging.LogRecord) -> str:
        origin = "" if record.levelno == logging.INFO else f"{record.levelname.lower()} [{record.name}] "
        return f"{self.formatTime(record, self.datefmt)} {self._prefix}{origin}{record.message}"


def configure(verbose: bool = False, process_index: int = 0) -> None:
    """Sets logging up for a verb: one short format, on stderr, once per record. May be called again.

    Libraries that narrate their work are heard from warnings upwards.

    Args:
      verbose: also show debug messages of this package.
      process_index: processes other than 0 log from warnings upwards, with their number in front.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        # absl's handler and plain stream handlers would print every record a second time. Others (a test's) may stay.
        ours = isinstance(handler.formatter, _Formatter)
        if ours or type(handler) is logging.StreamHandler or type(handler).__module__.startswith("absl"):
            root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"[{process_index}] " if process_index else ""))
    root.addHandler(handler)
    root.setLevel(logging.WARNING if process_index else logging.INFO)
    # absl keeps a level of its own and would set it back; it is imported here and not above, so that importing this
    # package starts nothing.
    import absl.logging

    absl.logging.set_verbosity(absl.logging.WARNING)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("gigagan_jax").setLevel(logging.DEBUG if verbose else logging.NOTSET)
