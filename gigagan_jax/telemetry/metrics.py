"""Writes metrics.jsonl and the TensorBoard events of a run."""

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
from gigagan_jax.core.files import append_text
from gigagan_jax.core.workdir_files import METRICS_FILE, TENSORBOARD_FOLDER

_log = logging.getLogger(__name__)

# TensorBoard can follow a run with this delay.
_FLUSH_SECONDS = 30.0
# Then a new events file begins: a mounted bucket shows a file only once it is closed.
_FILE_SECONDS = 900.0
# Fields of every line of metrics.jsonl.
_RESERVED = ("step", "kimg", "time")


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hides torch from tensorboardX, which imports it for its graph writer only: two seconds at every start."""
    # A torch that is imported already costs nothing more.
    if "torch" in sys.modules:
        yield
        return
    # None in sys.modules makes `import torch` raise ImportError, which tensorboardX catches.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


class MetricLogger:
    """Writes `metrics.jsonl` and TensorBoard events into the workdir of a run.

    Each line of the file is one JSON object: `step`, `kimg` (thousands of images), `time` (seconds since the epoch) and
    the metrics. NaN and infinite metrics are `null` there, since JSON lacks them; the events keep them. The kernel has
    a line when `log_scalars` returns, so a killed run loses at most the line being written.

    Args:
      workdir: a local folder, made if missing.
      enabled: False, on all processes but the first, makes every method do nothing.
      resume_step: the step of the checkpoint that the run resumes from; None for a new run. Lines of later steps and
        incomplete lines are removed from the file, and TensorBoard drops those steps. So no step appears twice.
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
        # Processes other than 0 import nothing and open nothing.
        if not enabled:
            return
        # Imported here: only the process that writes metrics pays for it.
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import SessionLog

        if "://" in str(workdir):
            raise UserError(f"metrics are written to a local folder, got {workdir}: name one on this machine's disk")
        workdir = Path(workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            # A new run keeps no line of an earlier one in the same folder.
            last_step = -1 if resume_step is None else resume_step
            self._path = workdir / METRICS_FILE
            _drop_later_lines(self._path, last_step)
            events = workdir / TENSORBOARD_FOLDER
            resumed = events.is_dir() and any(events.iterdir())
            events.mkdir(exist_ok=True)
            # Fails now, and not after the first steps, if the file cannot be written.
            append_text(self._path, "")
            # Not SummaryWriter: its flush misses events that its thread has not taken yet, and a second writer within one
            # second truncates the first one's file. The suffix keeps such files apart, in order.
            self._new_events = lambda: EventsWriter(str(events / "events"), filename_suffix=f".{time.time_ns()}")
            self._events = self._new_events()
            self._flushed = self._opened = clock()
            if resumed:
                # TensorBoard's purge: it drops this step and later ones of earlier files.
                self._write_event(last_step + 1, session_log=SessionLog(status=SessionLog.START))
        except OSError as e:
            raise UserError(
                f"cannot write metrics to {workdir}: {e.strerror or e}; choose a workdir that you may write to"
            ) from None

    def log_scalars(self, step: int, kimg: float, values: Mapping[str, Any]) -> None:
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
            # Objects, text and dates: NumPy would turn some of them into a float.
            if array.ndim or array.dtype.kind in "OUSM":
                raise ValueError(f"metric {name!r} must be one number, got {array.dtype} of shape {list(array.shape)}")
            numbers[name] = float(array)
        now = self._clock()
        # JSON has no NaN and no infinity: readers in other languages would reject the whole line.
        line: dict[str, Any] = {"step": int(step), "kimg": float(kimg), "time": round(now, 3)}
        line |= {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        with self._explain_errors():
            append_text(self._path, json.dumps(line, allow_nan=False) + "\n")
            # The file first: the events are buffered, and a killed run keeps the line.
            self._write_summary(step, [{"tag": name, "simple_value": number} for name, number in numbers.items()])

    def log_image(self, tag: str, step: int, image: np.ndarray) -> None:
        """Puts an image, uint8 `[H, W, 3]`, into the TensorBoard events.

        Raises:
          ValueError: shape or dtype is another.
        """
        if not self.enabled:
            return
        # A JAX array is copied to the host here.
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"image {tag!r} must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        png = io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        height, width, colours = image.shape
        value = {"height": height, "width": width, "colorspace": colours, "encoded_image_string": png.getvalue()}
        with self._explain_errors():
            self._write_summary(step, [{"tag": tag, "image": value}])

    def rewind_to(self, step: int) -> None:
        """Removes the metrics of later steps after a rollback to this step."""
        if not self.enabled:
            return
        from tensorboardX.proto.event_pb2 import SessionLog

        _drop_later_lines(self._path, step)
        self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def flush(self) -> None:
        """Writes all buffered events to the disk."""
        if self.enabled:
            now = self._clock()
            with self._explain_errors():
                self._events.flush()
                # TensorBoard reads all files of the folder as one run.
                if now - self._opened > _FILE_SECONDS:
                    self._events.close()
                    self._events, self._opened = self._new_events(), now
            self._flushed = now

    def close(self) -> None:
        """Flushes and closes. A second call, or one after a failed write, does nothing."""
        if not self.enabled:
            return
        # First, so that a failure to write below is not tried again.
        self.enabled = False
        with self._explain_errors():
            try:
                self._events.flush()
            finally:
                self._events.close()

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"cannot write metrics to {self._path}: {e.strerror or e}; free some space or repair the folder, "
                "and run the same command again"
            ) from None

    def _write_summary(self, step: int, values: list[dict[str, Any]]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self._write_event(step, summary=Summary(value=[Summary.Value(**value) for value in values]))
        # By time and not by count: steps take from milliseconds to minutes.
        if self._clock() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write_event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=self._clock(), step=step, **content))

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *exc: object) -> None:
        # If an error ended the run, a failure to write its last metrics must not hide it.
        with contextlib.suppress(UserError) if exc[0] is not None else contextlib.nullcontext():
            self.close()


def _drop_later_lines(path: Path, step: int) -> None:
    """Atomically removes the lines of later steps and incomplete lines from a metrics file."""
    if not path.exists():
        return
    kept, later, broken = [], 0, 0
    # Bytes: a line cut within a character of UTF-8 must not fail the whole file.
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
    content = b"".join(kept)
    if content != text:
        # A rename in the same folder is atomic: a run killed here keeps the old file or has the new one.
        temporary = path.parent / f".{secrets.token_hex(6)}.tmp"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
