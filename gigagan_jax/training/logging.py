"""What a run leaves to read: metrics.jsonl, TensorBoard events, the progress line, and quiet logs."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gigagan_jax.errors import UserError

_log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_FLUSH_SECONDS = 30.0  # so that TensorBoard can follow a run
_FILE_SECONDS = 900.0  # of one events file: a bucket that is mounted has a file only when it is closed
_RESERVED = ("step", "kimg", "time")

# Of the progress line: groups of (text before the number, key in the metrics, format). What a run lacks is left out.
Layout = Sequence[Sequence[tuple[str, str, str]]]
PROGRESS_LAYOUT: Layout = (
    (("MFU", "mfu", ".1%"), ("goodput", "goodput", ".0%")),
    (("D real", "logits/real", "+.2f"), ("fake", "logits/fake", "+.2f"), ("G", "loss/g", ".2f")),
    (("r1", "loss/r1", ".2g"),),
    (("gnorm G", "grad_norm/g", ".2g"), ("D", "grad_norm/d", ".2g")),
)
_NOISY = ("absl", "orbax", "jax", "grain", "tensorflow_datasets", "etils", "tensorboardX", "asyncio", "PIL", "urllib3")


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports torch where it is installed, for its graph writer alone: two seconds at every start."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


class MetricLogger:
    """Writes `metrics.jsonl` and TensorBoard events into the workdir of a run.

    Each line of the file is one JSON object: `step`, `kimg` (thousands of images), `time` (seconds since the epoch) and
    the metrics. A metric that is NaN or infinite is `null` there, since JSON has no such numbers, and as it is in the
    events. The system has a line when `scalars` returns, so a killed run loses at most the one being written.

    Args:
      workdir: a local folder, made if missing.
      enabled: False, on all processes but the first, makes every method do nothing.
      resume_step: the step of the checkpoint that the run goes on from; None for a start from nothing. What was logged
        for later steps, by a run that was stopped before its next checkpoint, is taken out of the file, as is a last
        line that was cut off; TensorBoard is told to forget it. So no step is there twice.
      clock: seconds since the epoch.

    Raises:
      UserError: the workdir is not a local folder that can be written to.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        enabled: bool = True,
        resume_step: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.enabled = enabled
        self._clock = clock
        if not enabled:
            return
        with _without_torch():  # here and not above: only who writes metrics pays for the import
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import SessionLog

        if "://" in str(workdir):
            raise UserError(f"metrics are written to a local folder, got {workdir}: name one on this machine's disk")
        workdir = Path(workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            last_step = -1 if resume_step is None else resume_step
            self._path = workdir / METRICS_FILE
            _cut_after(self._path, last_step)
            events = workdir / TENSORBOARD_FOLDER
            went_before = events.is_dir() and any(events.iterdir())
            events.mkdir(exist_ok=True)
            append(self._path, "")  # can it be written?
            # Not SummaryWriter: its flush leaves behind what its thread has not taken up yet, and a second writer
            # within one second would empty the first one's file. The suffix keeps such files apart, in order.
            self._new_events = lambda: EventsWriter(str(events / "events"), filename_suffix=f".{time.time_ns()}")
            self._events = self._new_events()
            self._flushed = self._opened = clock()
            if went_before:
                # TensorBoard's purge: it forgets what earlier files hold of this step and later ones.
                self._event(last_step + 1, session_log=SessionLog(status=SessionLog.START))
        except OSError as e:
            raise UserError(
                f"cannot write metrics to {workdir}: {e.strerror or e}; choose a workdir that you may write to"
            ) from None

    def scalars(self, step: int, kimg: float, values: Mapping[str, Any]) -> None:
        """Logs numbers (Python's, NumPy's or JAX's, of shape `[]`) under their names.

        Raises:
          ValueError: a value is not one number, or a name is 'step', 'kimg' or 'time'.
        """
        if not self.enabled:
            return
        numbers: dict[str, float] = {}
        for name, value in values.items():
            if name in _RESERVED:
                raise ValueError(f"a metric cannot be named {name!r}: that is a field of every line")
            array = np.asarray(value)
            if array.ndim or array.dtype.kind in "OUSM":
                raise ValueError(f"metric {name!r} must be one number, got {array.dtype} of shape {list(array.shape)}")
            numbers[name] = float(array)
        now = self._clock()
        line: dict[str, Any] = {"step": int(step), "kimg": float(kimg), "time": round(now, 3)}
        line |= {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        with self._writing():
            append(self._path, json.dumps(line, allow_nan=False) + "\n")
            self._summary(step, [{"tag": name, "simple_value": number} for name, number in numbers.items()])

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        """Puts an image, uint8 `[H, W, 3]`, into the TensorBoard events.

        Raises:
          ValueError: shape or dtype is another.
        """
        if not self.enabled:
            return
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"image {tag!r} must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        png = io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        height, width, colours = image.shape
        value = {"height": height, "width": width, "colorspace": colours, "encoded_image_string": png.getvalue()}
        with self._writing():
            self._summary(step, [{"tag": tag, "image": value}])

    def rewind(self, step: int) -> None:
        """Takes out what was logged for steps after this one: the run went back to it."""
        if not self.enabled:
            return
        from tensorboardX.proto.event_pb2 import SessionLog

        _cut_after(self._path, step)
        self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def flush(self) -> None:
        """Sends everything to the disk."""
        if self.enabled:
            now = self._clock()
            with self._writing():
                self._events.flush()
                if now - self._opened > _FILE_SECONDS:
                    self._events.close()
                    self._events, self._opened = self._new_events(), now
            self._flushed = now

    def close(self) -> None:
        """Flushes and closes; harmless when called again, and after what could not be written."""
        if not self.enabled:
            return
        self.enabled = False
        with self._writing():
            try:
                self._events.flush()
            finally:
                self._events.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"cannot write metrics to {self._path}: {e.strerror or e}; free some space or mend the folder, "
                "and run the same command again"
            ) from None

    def _summary(self, step: int, values: list[dict[str, Any]]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self._event(step, summary=Summary(value=[Summary.Value(**value) for value in values]))
        if self._clock() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=self._clock(), step=step, **content))

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *exc: object) -> None:
        # What ended the run is said, not that its last metrics could not be written either.
        with contextlib.suppress(UserError) if exc[0] is not None else contextlib.nullcontext():
            self.close()


def append(path: Path, text: str) -> None:
    """Adds to a file, which is opened for it and closed: of a bucket that is mounted others see what was there at a closing."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def _cut_after(path: Path, step: int) -> None:
    """Removes from a metrics file, atomically, what is of a later step and what is no whole line."""
    if not path.exists():
        return
    kept, later, broken = [], 0, 0
    text = path.read_bytes()
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            keep = entry["step"] <= step
        except (ValueError, KeyError, TypeError):
            broken += 1
            continue
        if keep:
            kept.append(line + b"\n")
        else:
            later += 1
    if later:
        _log.info("%s: took out %d line%s of steps after %d", path, later, "s" if later > 1 else "", max(step, 0))
    if broken:
        _log.warning("%s: dropped %d unreadable line%s", path, broken, "s" if broken > 1 else "")
    whole = b"".join(kept)
    if whole != text:
        temporary = path.parent / f".{secrets.token_hex(6)}.tmp"
        try:
            temporary.write_bytes(whole)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


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
