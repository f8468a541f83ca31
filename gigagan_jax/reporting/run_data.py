"""The report of a run: what its workdir holds, read into one self-contained page, `report.html`."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gigagan_jax.config.migrations import FORMAT_KEY, WITHOUT_KEY
from gigagan_jax.core.errors import UserError
from gigagan_jax.telemetry.goodput import GOODPUT_FILE, Account, read_events
from gigagan_jax.telemetry.metrics import METRICS_FILE

_log = logging.getLogger(__name__)

_CONFIG_FILE, _CHECKPOINTS, _SNAPSHOTS = "config.json", "checkpoints", "snapshots"
_QUARANTINE_FILES, _HEALTH_FILE = "quarantine*.jsonl", "health_report.json"
GRIDS = 24  # at most, of all that were drawn
_GRID_BYTES = 3_500_000  # of all of them
_GRID_WIDTH = 1400  # pixels


@dataclasses.dataclass
class Metrics:
    """metrics.jsonl by columns.

    Attributes:
      columns: (kimg, values) of each metric; NaN where it was not finite.
      steps, kimg: of all lines.
      last_time: of the last line, in seconds since the epoch; 0 without one.
    """

    columns: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    steps: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    kimg: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    last_time: float = 0.0

    def last(self, name: str) -> float | None:
        """The last finite value of a metric; None without one."""
        values = self.columns[name][1] if name in self.columns else np.zeros(0)
        known = values[np.isfinite(values)]
        return float(known[-1]) if len(known) else None

    def kimg_of(self, step: float) -> float:
        """Thousands of images at a step, between those of the lines around it."""
        if not len(self.steps):
            return 0.0
        order = np.argsort(self.steps, kind="stable")
        # From the very beginning on: before the first line no images were seen.
        steps, kimg = np.append(0.0, self.steps[order]), np.append(0.0, self.kimg[order])
        return float(np.interp(step, steps, kimg))


@dataclasses.dataclass
class Grid:
    """A drawn grid: after so many thousand images, as a data URI."""

    kimg: float
    uri: str


@dataclasses.dataclass
class Run:
    """What a workdir holds; whatever is missing or unreadable is empty."""

    workdir: Path
    config: dict[str, Any]
    metrics: Metrics
    account: Account
    grids: list[Grid]
    all_grids: int  # how many were drawn
    bad: collections.Counter[str]  # examples that could not be read, by cause
    health: dict[str, Any]
    checkpoints: list[tuple[str, int, float]]  # name, bytes, seconds since the epoch
    now: float


def read_run(workdir: Path) -> Run:
    """Everything that the report shows.

    Raises:
      UserError: the folder is not the workdir of a run.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: there is no such folder")
    if not any((workdir / name).exists() for name in (_CONFIG_FILE, METRICS_FILE, GOODPUT_FILE, _CHECKPOINTS)):
        raise UserError(
            f"--workdir={workdir} is not the workdir of a training run: it has no {_CONFIG_FILE} and no {METRICS_FILE}"
        )
    grids, count = _grids(workdir / _SNAPSHOTS)
    return Run(
        workdir=workdir,
        config={k: v for k, v in _json(workdir / _CONFIG_FILE).items() if k not in (FORMAT_KEY, WITHOUT_KEY)},
        metrics=read_metrics(workdir / METRICS_FILE),
        account=Account(read_events(workdir)),
        grids=grids,
        all_grids=count,
        bad=_bad(workdir),
        health=_json(workdir / _HEALTH_FILE),
        checkpoints=_checkpoints(workdir / _CHECKPOINTS),
        now=time.time(),
    )


def read_metrics(path: Path) -> Metrics:
    """The metrics of a file; lines that are broken or cut off are passed over."""
    columns: dict[str, tuple[array.array, array.array]] = {}
    steps, kimgs = array.array("d"), array.array("d")
    last = 0.0
    for line in _lines(path):
        try:
            step, kimg, now = float(line.pop("step")), float(line.pop("kimg")), float(line.pop("time", 0.0))
        except (KeyError, TypeError, ValueError):
            continue
        steps.append(step)
        kimgs.append(kimg)
        last = max(last, now)
        for name, value in line.items():
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


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        yield value
    except OSError:
        return


def _bad(workdir: Path) -> collections.Counter[str]:
    """Files by cause, of the lists of all processes; one that several of them met counts once."""
    found = {}
    for path in sorted(workdir.glob(_QUARANTINE_FILES)):
        for line in _lines(path):
            found[str(line.get("name"))] = str(line.get("cause", "unknown"))
    return collections.Counter(found.values())


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def _grids(folder: Path) -> tuple[list[Grid], int]:
    found = []
    for path in folder.glob("*.png"):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)kimg\.png", path.name)
        if match:
            found.append((float(match[1]), path))
    found.sort()
    at = sorted({round(i) for i in np.linspace(0, len(found) - 1, min(GRIDS, len(found)))}) if found else []
    out = []
    for kimg, path in (found[i] for i in at):
        uri = _uri(path, _GRID_BYTES // len(at))
        if uri:
            out.append(Grid(kimg, uri))
    return out, len(found)


def _uri(path: Path, most: int) -> str:
    """A PNG as a data URI of at most about so many bytes, as JPEG where that is needed; "" for a file that is damaged."""
    try:
        original = path.read_bytes()
        with Image.open(io.BytesIO(original)) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    best, kind = original, "png"
    size = min(_GRID_WIDTH, image.width)
    for quality in (90, 80, 70, 60):
        if len(best) <= most and image.width <= _GRID_WIDTH:
            break
        scaled = image
        if size < image.width:
            scaled = image.resize((size, max(1, round(image.height * size / image.width))), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        scaled.save(file, "JPEG", quality=quality, optimize=True)
        best, kind = file.getvalue(), "jpeg"
        if len(best) <= most:
            break
        size = round(size * 0.8)
    return f"data:image/{kind};base64,{base64.b64encode(best).decode()}"


def _checkpoints(folder: Path) -> list[tuple[str, int, float]]:
    out = []
    for entry in sorted(folder.glob("[0-9]*")):
        with contextlib.suppress(OSError):  # it is being removed
            files = [f.stat() for f in entry.rglob("*") if f.is_file()]
            out.append((entry.name, sum(f.st_size for f in files), entry.stat().st_mtime))
    return sorted(out, key=lambda c: (int(re.match(r"\d+", c[0])[0]), c[0]))  # type: ignore[index]
