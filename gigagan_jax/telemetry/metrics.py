"""metrics.jsonl and TensorBoard events of a run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.files import append

_log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_FLUSH_SECONDS = 30.0  # so that TensorBoard can follow a run
_FILE_SECONDS = 900.0  # of one events file: a bucket that is mounted has a file only when it is closed
_RESERVED = ("step", "kimg", "time")


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
