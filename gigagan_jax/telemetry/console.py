"""The terminal output of a run: its progress line and the logging setup."""

from __future__ import annotations

import collections
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Groups of (label, key in the metrics, format). Metrics that a run lacks are left out.
Layout = Sequence[Sequence[tuple[str, str, str]]]
PROGRESS_LAYOUT: Layout = (
    (("MFU", "mfu", ".1%"), ("goodput", "goodput", ".0%")),
    (("D real", "logits/real", "+.2f"), ("fake", "logits/fake", "+.2f"), ("G", "loss/g", ".2f")),
    (("r1", "loss/r1", ".2g"),),
    (("gnorm G", "grad_norm/g", ".2g"), ("D", "grad_norm/d", ".2g")),
    (
        ("GiB host", "memory/host_gib", ".1f"),
        ("workers", "memory/workers_gib", ".1f"),
        ("device", "memory/device_peak_gib", ".1f"),
    ),
)
# Libraries that log their normal work at INFO.
_NOISY_LIBRARIES = (
    "absl",
    "orbax",
    "jax",
    "grain",
    "tensorflow_datasets",
    "etils",
    "tensorboardX",
    "asyncio",
    "PIL",
    "urllib3",
    "fsspec",
    "s3fs",
    "aiobotocore",
    "botocore",
)
# It logs a traceback for each error that it also raises.
_SILENT_LIBRARIES = ("gcsfs",)


class TrainingProgress:
    """The progress line of a run. It has no clock and prints nothing: the caller gives the time and prints the line.

    The line is plain text without control characters, for terminals, files and the logs of clusters.
    The rate is over the last `window` seconds of the caller's clock, which should stand still outside of training. The time
    before the first `update` never counts. The line says "compiling" until there is a rate.

    Args:
      total_kimg: length of the run, in thousands of images.
      start_images: images seen before this process started (a resumed run).
      window: seconds over which the rate is measured.
      layout: the metrics shown; see PROGRESS_LAYOUT.
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
        # (seconds on the caller's clock, images seen)
        self._points: collections.deque[tuple[float, int]] = collections.deque()

    @property
    def rate(self) -> float | None:
        """Images a second over the window; None while it is unknown."""
        if len(self._points) < 2:
            return None
        (t0, n0), (t1, n1) = self._points[0], self._points[-1]
        # Two points at one time: the caller's clock stood still.
        return (n1 - n0) / (t1 - t0) if t1 > t0 else None

    def update(self, images_seen: int, metrics: Mapping[str, Any], now: float) -> str:
        """`advance`, then `format_line`."""
        self.advance(images_seen, now)
        return self.format_line(metrics)

    def advance(self, images_seen: int, now: float) -> None:
        """Records the images seen so far, in this process and before a resume.

        Args:
          images_seen: images since the very start of training.
          now: seconds on any clock that does not go back.
        """
        if self._points and (images_seen < self._points[-1][1] or now < self._points[-1][0]):
            # A rollback to a checkpoint, or a clock that went back: points before it give no rate.
            self._points.clear()
        # The first point is at the end of the first step, so that its compilation is not measured.
        if images_seen > self._start or self._points:
            self._points.append((now, images_seen))
        # The oldest point kept is the last one outside of the window: the rate covers at least `window` seconds.
        while len(self._points) > 2 and self._points[1][0] <= now - self.window:
            self._points.popleft()
        self._images = images_seen

    def restart_rate(self, images_seen: int, now: float) -> None:
        """Measures the rate from now on: the last step was compiled, and its time must not count."""
        self._points.clear()
        self._points.append((now, images_seen))

    def format_line(self, metrics: Mapping[str, Any]) -> str:
        """The progress line with these metrics."""
        images_seen = self._images
        share = 100 * images_seen / self.total_images if self.total_images > 0 else 100.0
        done = f"kimg {images_seen / 1000:.1f}/{self.total_images / 1000:.1f}  {share:.1f} %"
        rate = self.rate
        # With a first point but no second, the next line has a rate: the step is compiled.
        if rate is None:
            speed = "images/s --  ETA --" if self._points else "compiling"
        else:
            eta = _format_eta((self.total_images - images_seen) / rate) if rate > 0 else "--"
            # With one chip both rates are equal, and the line shows one of them.
            chip = metrics.get("images_per_second_per_chip", rate)
            speed = (
                f"images/s {_format_rate(rate)}{f' ({_format_rate(chip)} a chip)' if chip < rate else ''}  ETA {eta}"
            )
        groups = []
        for group in self.layout:
            # A group without any of its metrics disappears with its separator.
            shown = [f"{label} {float(metrics[key]):{spec}}" for label, key, spec in group if key in metrics]
            if shown:
                groups.append("  ".join(shown))
        return "  | ".join([f"{done}  {speed}", *groups])


def _format_rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2f}"


def _format_eta(seconds: float) -> str:
    """`0:11:52`; from one day on `2d 03:00:00`."""
    # Negative after the last image: a batch may pass the end of the run.
    total = max(0, round(seconds))
    days, rest = divmod(total, 86400)
    hours, minutes, secs = rest // 3600, rest // 60 % 60, rest % 60
    return f"{days}d {hours:02d}:{minutes:02d}:{secs:02d}" if days else f"{hours}:{minutes:02d}:{secs:02d}"


class _LogFormatter(logging.Formatter):
    """`12:34:56 message`; other levels than INFO show their level and logger too."""

    def __init__(self, prefix: str):
        super().__init__(datefmt="%H:%M:%S")
        self._prefix = prefix

    def formatMessage(self, record: logging.LogRecord) -> str:
        # INFO is the normal output of a run and needs no label.
        origin = "" if record.levelno == logging.INFO else f"{record.levelname.lower()} [{record.name}] "
        return f"{self.formatTime(record, self.datefmt)} {self._prefix}{origin}{record.message}"


def configure_logging(verbose: bool = False, process_index: int = 0) -> None:
    """Configures logging for a verb: one short format on stderr, each record once. May be called again.

    Libraries that log their normal work are shown from warnings upwards.

    Args:
      verbose: also show debug messages of this package.
      process_index: processes other than 0 log from warnings upwards, with their index in front.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        # Ours of an earlier call, absl's and plain stream handlers would print each record twice. Others, as pytest's, stay.
        ours = isinstance(handler.formatter, _LogFormatter)
        if ours or type(handler) is logging.StreamHandler or type(handler).__module__.startswith("absl"):
            root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormatter(f"[{process_index}] " if process_index else ""))
    root.addHandler(handler)
    # Processes log nearly the same at INFO: process 0 does it for all.
    root.setLevel(logging.WARNING if process_index else logging.INFO)
    # absl has a level of its own and would set it back. Imported here, so that importing this module has no effects.
    import absl.logging

    absl.logging.set_verbosity(absl.logging.WARNING)
    for name in _NOISY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SILENT_LIBRARIES:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    # NOTSET leaves the level to the root logger.
    logging.getLogger("gigagan_jax").setLevel(logging.DEBUG if verbose else logging.NOTSET)
