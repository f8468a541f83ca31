"""Reads a workdir for the report of its run. Missing, truncated and damaged files leave gaps and raise nothing."""

import array
import base64
import collections
import contextlib
import dataclasses
import io
import json
import logging
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gigagan_jax.config.migrations import FORMAT_KEY, WITHOUT_KEY
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.files import read_json_lines
from gigagan_jax.core.workdir_files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    GOODPUT_FILE,
    HEALTH_REPORT_FILE,
    METRICS_FILE,
    QUARANTINE_PATTERN,
    SNAPSHOTS_FOLDER,
)
from gigagan_jax.telemetry.goodput import Account, read_events
from gigagan_jax.telemetry.history import read_history

_log = logging.getLogger(__name__)

# Grids in the report; a longer run shows an even selection of its grids.
MAX_GRIDS = 24
# Bytes of all grids together, which are most of the page.
_MAX_GRID_BYTES = 3_500_000
# Pixels.
_MAX_GRID_WIDTH = 1400


@dataclasses.dataclass
class Metrics:
    """The columns of metrics.jsonl.

    Attributes:
      columns: (kimg, values) of each metric; NaN where it was not finite.
      steps, kimg: step and thousands of images of all lines.
      last_time: time of the last line in seconds since the epoch; 0 without one.
    """

    columns: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    steps: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    kimg: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    last_time: float = 0.0

    def last_value(self, name: str) -> float | None:
        """Returns the last finite value of a metric; None without one."""
        values = self.columns[name][1] if name in self.columns else np.zeros(0)
        known = values[np.isfinite(values)]
        return float(known[-1]) if len(known) else None

    def kimg_at_step(self, step: float) -> float:
        """Returns thousands of images at a step, interpolated between the lines of the log."""
        if not len(self.steps):
            return 0.0
        # After a rollback the steps of the file are not sorted, and np.interp needs them sorted.
        order = np.argsort(self.steps, kind="stable")
        # Step 0 has seen no images.
        steps, kimg = np.append(0.0, self.steps[order]), np.append(0.0, self.kimg[order])
        return float(np.interp(step, steps, kimg))


@dataclasses.dataclass
class Grid:
    """A snapshot grid as a data URI, drawn after `kimg` thousand images."""

    kimg: float
    uri: str


@dataclasses.dataclass
class RunData:
    """The content of a workdir; a field is empty if its files are missing or unreadable.

    Attributes:
      address: folder of the run, or its address in a bucket.
      all_grids: number of grids in the workdir, of which `grids` is a selection.
      bad: number of unreadable examples by cause.
      checkpoints: (name, bytes, seconds since the epoch) of each.
      now: time of the reading in seconds since the epoch.
      history: what the run was begun from, and what was changed in it.
    """

    address: str
    config: dict[str, Any]
    metrics: Metrics
    account: Account
    grids: list[Grid]
    all_grids: int
    bad: collections.Counter[str]
    health: dict[str, Any]
    checkpoints: list[tuple[str, int, float]]
    now: float
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rstrip("/").rpartition("/")[2]


def read_run(workdir: Path, address: str = "", checkpoints: Sequence[tuple[str, int, float]] | None = None) -> RunData:
    """Reads everything that the report shows.

    Args:
      workdir: folder with the files of the run.
      address: of the run, where that is not the folder.
      checkpoints: of the run, where they are not in the folder.

    Raises:
      UserError: the folder is not the workdir of a run.
    """
    address = address or str(workdir.resolve())
    if not workdir.is_dir():
        raise UserError(f"--workdir={address}: there is no such folder")
    if not any((workdir / name).exists() for name in (CONFIG_FILE, METRICS_FILE, GOODPUT_FILE, CHECKPOINTS_FOLDER)):
        raise UserError(
            f"--workdir={address} is not the workdir of a training run: it has no {CONFIG_FILE} and no {METRICS_FILE}"
        )
    # Every reader returns something empty for a missing file: a run that has just started has few of them.
    grids, count = _read_grids(workdir / SNAPSHOTS_FOLDER)
    return RunData(
        address=address,
        # Without the keys of the file format, which are no settings.
        config={k: v for k, v in _read_json(workdir / CONFIG_FILE).items() if k not in (FORMAT_KEY, WITHOUT_KEY)},
        metrics=read_metrics(workdir / METRICS_FILE),
        account=Account(read_events(workdir)),
        history=read_history(workdir),
        grids=grids,
        all_grids=count,
        bad=_count_bad_files(workdir),
        health=_read_json(workdir / HEALTH_REPORT_FILE),
        checkpoints=_list_checkpoints(workdir / CHECKPOINTS_FOLDER)
        if checkpoints is None
        else sort_checkpoints(checkpoints),
        now=time.time(),
    )


def read_metrics(path: Path) -> Metrics:
    """Reads the metrics of a file, and skips damaged and truncated lines."""
    # array.array takes 8 bytes a number: a long run has millions, and a list would take 32.
    columns: dict[str, tuple[array.array, array.array]] = {}
    steps, kimgs = array.array("d"), array.array("d")
    last = 0.0
    for line in read_json_lines(path):
        try:
            step, kimg, now = float(line.pop("step")), float(line.pop("kimg")), float(line.pop("time", 0.0))
        # A line without step or kimg has no place on an axis.
        except (KeyError, TypeError, ValueError):
            continue
        steps.append(step)
        kimgs.append(kimg)
        last = max(last, now)
        for name, value in line.items():
            # JSON has no NaN: the logger writes null for what is not finite.
            number = float("nan") if value is None else value
            if not isinstance(number, (int, float)):
                continue
            if name not in columns:
                columns[name] = array.array("d"), array.array("d")
            x, y = columns[name]
            x.append(kimg)
            y.append(number)
    numbers = lambda a: np.frombuffer(a, np.float64) if len(a) else np.zeros(0)
    return Metrics({k: (numbers(x), numbers(y)) for k, (x, y) in columns.items()}, numbers(steps), numbers(kimgs), last)


def _count_bad_files(workdir: Path) -> collections.Counter[str]:
    """Counts bad files by cause over the lists of all processes."""
    # Keyed by name: several processes can list the same file.
    causes = {}
    for path in sorted(workdir.glob(QUARANTINE_PATTERN)):
        for line in read_json_lines(path):
            causes[str(line.get("name"))] = str(line.get("cause", "unknown"))
    return collections.Counter(causes.values())


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def _read_grids(folder: Path) -> tuple[list[Grid], int]:
    found = []
    for path in folder.glob("*.png"):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)kimg\.png", path.name)
        if match:
            found.append((float(match[1]), path))
    found.sort()
    # Evenly spaced, with the first and the last.
    selected = sorted({round(i) for i in np.linspace(0, len(found) - 1, min(MAX_GRIDS, len(found)))}) if found else []
    grids = []
    for kimg, path in (found[i] for i in selected):
        uri = _image_data_uri(path, _MAX_GRID_BYTES // len(selected))
        if uri:
            grids.append(Grid(kimg, uri))
    return grids, len(found)


def _image_data_uri(path: Path, max_bytes: int) -> str:
    """Encodes a PNG as a data URI of about `max_bytes` or less; as JPEG if the PNG is larger. "" for a damaged file."""
    try:
        original = path.read_bytes()
        with Image.open(io.BytesIO(original)) as opened:
            image = opened.convert("RGB")
    # Pillow raises SyntaxError for a damaged PNG chunk.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    best, kind = original, "png"
    size = min(_MAX_GRID_WIDTH, image.width)
    for quality in (90, 80, 70, 60):
        if len(best) <= max_bytes and image.width <= _MAX_GRID_WIDTH:
            break
        scaled = image
        if size < image.width:
            scaled = image.resize((size, max(1, round(image.height * size / image.width))), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        scaled.save(file, "JPEG", quality=quality, optimize=True)
        best, kind = file.getvalue(), "jpeg"
        if len(best) <= max_bytes:
            break
        size = round(size * 0.8)
    return f"data:image/{kind};base64,{base64.b64encode(best).decode()}"


def _list_checkpoints(folder: Path) -> list[tuple[str, int, float]]:
    checkpoints = []
    # Digits first: "12.damaged" is listed too.
    for entry in sorted(folder.glob("[0-9]*")):
        # The run may be deleting this checkpoint.
        with contextlib.suppress(OSError):
            files = [f.stat() for f in entry.rglob("*") if f.is_file()]
            checkpoints.append((entry.name, sum(f.st_size for f in files), entry.stat().st_mtime))
    return sort_checkpoints(checkpoints)


def sort_checkpoints(checkpoints: Iterable[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    """By number: as text "10" would come before "9"."""
    return sorted(checkpoints, key=lambda c: (int(re.match(r"\d+", c[0])[0]), c[0]))  # type: ignore[index]
