"""Runs an upsampling network over an image in tiles, and yields the result in bands of rows from top to bottom.

The image is padded once to a multiple of the network's strides, whatever the tile. Windows of one shape cover it, at
multiples of the strides, and overlap by twice the halo. Where a network's pixel depends on no more than the halo around
it, the cut lies where both windows have all they need, and the result does not depend on the tiles. Other networks are
cross-faded around the cut.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.row_bands import Rows

_log = logging.getLogger(__name__)

# Input pixels of a tile's side where the device does not say how much memory it has.
DEFAULT_TILE = 192
# Chosen tiles are no larger: the host holds a strip of them, 1 GB for an output of 16,384 pixels at 4x.
_LARGEST_TILE = 1024
# Device bytes that a pass takes per output pixel: about three float32 maps of 128 channels at the full resolution.
_BYTES_PER_OUTPUT_PIXEL = 1536
# Of the free device memory; the rest is for fragmentation and for the compiler's workspace.
_USED_SHARE = 0.7


class TileModel(Protocol):
    """A network that enlarges tiles."""

    @property
    def factor(self) -> int:
        """Output pixels per input pixel."""

    @property
    def multiple(self) -> int:
        """Tile origins and sizes are multiples of it, in input pixels."""

    @property
    def halo(self) -> int:
        """Input pixels around a pixel that its output depends on; where `blends`, the overlap that hides a border."""

    @property
    def blends(self) -> bool:
        """A tile's pixels depend on the whole tile, and neighbours are cross-faded."""

    @property
    def batch(self) -> int:
        """Tiles that are run at once, usually the number of devices. A single tile is run alone: N is 1."""

    @property
    def noise(self) -> float:
        """Level of the noise that the input gets (row_bands.NoisyRows), 0 to 1."""

    @property
    def seed(self) -> int:
        """Of the noise."""

    def __call__(self, low: np.ndarray) -> np.ndarray:
        """float32 [N, h, w, 3] in [-1, 1] -> float32 [N, h * factor, w * factor, 3]."""


class Progress(Protocol):
    """What counts the tiles; core/progress.py has one."""

    done: int
    total: int

    def step(self, n: int = 1) -> None: ...


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a window's output along one axis, in output pixels.

    Attributes:
      start, stop: within the window's output.
      at: where it goes in the image.
      weights: float32 [stop - start]; None where all are one.
    """

    start: int
    stop: int
    at: int
    weights: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Window:
    """A window along one axis.

    Attributes:
      start: in input pixels of the padded image; negative in a repeating one.
      segments: the first is of the window's middle. A second one is of the margin beyond a repeating image's start.
    """

    start: int
    segments: tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class Axis:
    """The windows along one axis.

    Attributes:
      length: of the image, in input pixels.
      window: size of each window.
      windows: from the first to the last.
      wrap: the image repeats.
    """

    length: int
    window: int
    windows: tuple[Window, ...]
    wrap: bool

    def indices(self, window: Window) -> np.ndarray:
        """Pixel numbers of the image that fill the window."""
        i = np.arange(window.start, window.start + self.window)
        if self.wrap:
            return i % self.length
        # Reflected at the last pixel; where the image is smaller than the padding, its edge is repeated.
        last = self.length - 1
        return np.clip(np.where(i > last, 2 * last - i, i), 0, last)


def plan_axis(length: int, model: TileModel, tile: int, wrap: bool = False, first: int = 0) -> Axis:
    """Covers an axis with windows.

    Args:
      length: of the image, in input pixels.
      model: gives strides, halo and factor.
      tile: input pixels that a window contributes, a multiple of `model.multiple`.
      wrap: the image repeats.
      first: first output pixel that is wanted.

    Returns:
      windows whose segments cover the output pixels from `first` on, with weights that sum to one.
    """
    m, f = model.multiple, model.factor
    # Windows begin at multiples, so that the halo has to be one.
    halo = round_up(model.halo, m)
    padded = round_up(length, m)
    # At the border of an image the network pads by itself, in every tiling the same way.
    low, high = (-halo, padded + halo) if wrap else (0, padded)
    window = min(tile + 2 * halo, high - low)
    # After a restart the first window begins where `first` has its whole halo.
    start = low if first == 0 else max(low, first // f // m * m - halo)
    starts = [min(start, high - window)]
    while starts[-1] + window < high:
        starts.append(min(starts[-1] + window - 2 * halo, high - window))
    # In output pixels: the middle of each overlap.
    cuts = [(a + b + window) * f // 2 for a, b in itertools.pairwise(starts)]
    ramp = halo * f // 2 * 2 if model.blends else 0
    end = length * f
    # One-sided at the seam of a repeating image, and half as wide: the outer half of the margin is the network's border.
    seam = ramp // 2 if wrap and first == 0 and length >= 2 * halo else 0
    windows = []
    for i, s in enumerate(starts):
        a = first if i == 0 else min(cuts[i - 1] - ramp // 2, end)
        b = end if i == len(starts) - 1 else min(cuts[i] + ramp // 2, end)
        if a >= b:
            # It lies in the padding of a repeating image.
            continue
        weights = np.ones(b - a, np.float32)
        at = np.arange(a, b)
        if ramp and i > 0:
            weights *= _rise(at, cuts[i - 1] - ramp // 2, ramp)
        if ramp and i < len(starts) - 1:
            weights *= 1 - _rise(at, cuts[i] - ramp // 2, ramp)
        if seam:
            weights *= 1 - _rise(at, end - seam, seam)
        segments = [Segment(a - s * f, b - s * f, a, weights if ramp else None)]
        # The margin before the first pixel is the end of the image before: the last windows give way to it.
        if seam and i == 0:
            at = np.arange(end - seam, end)
            segments.append(Segment(-s * f - seam, -s * f, end - seam, _rise(at, end - seam, seam)))
        windows.append(Window(s, tuple(segments)))
    return Axis(length, window, tuple(windows), wrap)


def _rise(at: np.ndarray, start: int, width: int) -> np.ndarray:
    """A raised cosine from 0 at `start` to 1 at `start + width`, at pixel centres."""
    # Clipped: the axis is longer than the ramp.
    t = np.clip((at + 0.5 - start) / width, 0.0, 1.0)
    return (0.5 - 0.5 * np.cos(np.pi * t)).astype(np.float32)


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is no less than n."""
    return -(-n // multiple) * multiple


class Tiling:
    """A network run in tiles. What it learns of the device's memory it keeps for the images after.

    Args:
      model: the network.
      tile: input pixels that a tile contributes to each axis, rounded up to what the network can take; 0 chooses.
      wrap: images repeat in both directions.
      device: whose free memory chooses the tile; None for the first.

    Attributes:
      tile: the size in use; it shrinks where the device runs out of memory.
    """

    def __init__(self, model: TileModel, tile: int = 0, wrap: bool = False, device: jax.Device | None = None):
        self.model, self.wrap = model, wrap
        halo = round_up(model.halo, model.multiple)
        # A cross-fade needs two halos between two cuts, and the reflected padding a window of two multiples.
        self.smallest = max(2 * model.multiple, 2 * halo if model.blends else 0)
        wanted = tile if tile > 0 else choose_tile(model, device or jax.local_devices()[0])
        self.tile = max(self.smallest, round_up(wanted, model.multiple))

    def count_tiles(self, height: int, width: int) -> int:
        """Number of tiles of an image of this size."""
        return len(self._plan(height, 0).windows) * len(self._plan(width, 0).windows)

    def __call__(self, source: Rows, progress: Progress | None = None) -> Iterator[np.ndarray]:
        """Enlarges an image.

        Args:
          source: float32 [H, W, 3] in [-1, 1]. A repeating image is read out of order: not a stream.
          progress: its `step` gets the number of finished tiles; its `total` changes with the tile size.

        Yields:
          float32 [rows, W * factor, 3] from top to bottom. A band is valid until the next one is asked for.

        Raises:
          UserError: the smallest tile does not fit the device's memory.
        """
        done, end = 0, source.height * self.model.factor
        while done < end:
            # Again after each restart: the tile has changed.
            rows, columns = self._plan(source.height, done), self._plan(source.width, 0)
            counted = progress.done if progress is not None else 0
            try:
                for band in self._run(source, rows, columns, done, progress):
                    yield band
                    done += len(band)
            except (MemoryError, RuntimeError) as error:
                # XLA's errors are all of one type.
                if not is_out_of_memory(error):
                    raise
                # Halves the window that ran, which may have been smaller than a tile.
                ran = min(self.tile, max(rows.window, columns.window))
                if ran <= self.smallest:
                    raise UserError(
                        f"the device has no memory for a tile of {ran} pixels: use another device, or a smaller model"
                    ) from error
                planned = len(rows.windows) * len(columns.windows)
                self.tile = max(self.smallest, ran // 2 // self.model.multiple * self.model.multiple)
                _log.info("out of device memory: going on with tiles of %d pixels", self.tile)
                # Tiles of the row that failed are run again.
                if progress is not None:
                    left = len(self._plan(source.height, done).windows) * len(self._plan(source.width, 0).windows)
                    progress.total += progress.done - counted + left - planned

    def _plan(self, length: int, first: int) -> Axis:
        return plan_axis(length, self.model, self.tile, self.wrap, first)

    def _run(
        self, source: Rows, rows: Axis, columns: Axis, first: int, progress: Progress | None
    ) -> Iterator[np.ndarray]:
        """Bands from output row `first` on."""
        width = columns.length * self.model.factor
        margin: tuple[int, np.ndarray] | None = None
        # Rows of the window before that the next one has a share in.
        shared = np.empty((0, width, 3), np.float32)
        # One strip for all rows of tiles: whoever took the last band may still hold it.
        highest = max(w.segments[0].stop - w.segments[0].start for w in rows.windows)
        buffer = np.empty((highest, width, 3), np.float32)
        for i, window in enumerate(rows.windows):
            strips = self._run_row(source, rows, columns, window, buffer, progress)
            strip = strips[0]
            strip[: len(shared)] += shared
            top = window.segments[0].at
            last = i == len(rows.windows) - 1
            finished = len(strip) if last else rows.windows[i + 1].segments[0].at - top
            # A copy: the next row of tiles is written into the same strip.
            shared = strip[finished:].copy()
            if len(strips) > 1:
                margin = (window.segments[1].at, strips[1])
            if margin is not None:
                _add_rows(strip[:finished], top, *margin)
            yield strip[:finished]

    def _run_row(
        self, source: Rows, rows: Axis, columns: Axis, window: Window, buffer: np.ndarray, progress: Progress | None
    ) -> list[np.ndarray]:
        """One row of tiles, weighted: float32 [rows, W * factor, 3] for each of the window's segments.

        The first one lies in the buffer.
        """
        band = source.take(rows.indices(window))
        heights = [s.stop - s.start for s in window.segments]
        strips = [buffer[: heights[0]], *(np.empty((h, *buffer.shape[1:]), np.float32) for h in heights[1:])]
        # Cross-faded tiles are added up.
        for strip in strips:
            strip.fill(0)
        # A single tile is not repeated for idle devices: the network may spread it over them by itself.
        batch = self.model.batch if len(columns.windows) * len(rows.windows) > 1 else 1
        for i in range(0, len(columns.windows), batch):
            group = columns.windows[i : i + batch]
            # The last batch is filled up with its last tile, so that there is one program.
            padded = [group[min(k, len(group) - 1)] for k in range(batch)]
            tiles = np.stack([band[:, columns.indices(w)] for w in padded])
            results = self.model(tiles)
            for column, result in zip(group, results, strict=False):
                for strip, segment in zip(strips, window.segments, strict=True):
                    _add_tile(strip, result[segment.start : segment.stop], segment.weights, column)
            if progress is not None:
                progress.step(len(group))
        return strips


def _add_tile(strip: np.ndarray, tile: np.ndarray, weights: np.ndarray | None, column: Window) -> None:
    """Adds a tile's rows to a strip, where the segments of its column say."""
    for segment in column.segments:
        place = strip[:, segment.at : segment.at + segment.stop - segment.start]
        piece = tile[:, segment.start : segment.stop]
        # Weights of one need no product, and no pixel is written twice.
        if weights is None and segment.weights is None:
            place[...] = piece
            continue
        if segment.weights is not None:
            piece = piece * segment.weights[:, None]
        place += piece if weights is None else piece * weights[:, None, None]


def _add_rows(band: np.ndarray, top: int, at: int, rows: np.ndarray) -> None:
    """Adds rows that start at `at` to a band that starts at `top`, where they meet."""
    low, high = max(top, at), min(top + len(band), at + len(rows))
    if low < high:
        band[low - top : high - top] += rows[low - at : high - at]


def choose_tile(model: TileModel, device: jax.Device) -> int:
    """A tile that fits the device's free memory: input pixels of its side, halo not included."""
    stats = device.memory_stats() or {}
    # CPUs, and some kinds of accelerators.
    if "bytes_limit" not in stats:
        return DEFAULT_TILE
    free = max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * _USED_SHARE
    side = int((free / (_BYTES_PER_OUTPUT_PIXEL * model.factor**2)) ** 0.5)
    tile = min(max(0, side - 2 * round_up(model.halo, model.multiple)), _LARGEST_TILE)
    return tile // model.multiple * model.multiple


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory for an array."""
    # The status code of XLA, and what CUDA says of it.
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def match_colors(model: TileModel, source: Rows, side: int = 256) -> Callable[[np.ndarray], np.ndarray]:
    """One affine map per channel that gives the enlarged image the input's mean and deviation.

    It is estimated from the network's result for a reduced image, before any tile runs.

    Args:
      model: the network.
      source: float32 [H, W, 3] in [-1, 1], not a stream.
      side: longest side of the reduced image, in pixels.

    Returns:
      the map, which changes a band in place.
    """
    step = max(1, -(-max(source.height, source.width) // side))
    small = _reduce(source, step)
    height, width = (round_up(n, model.multiple) for n in small.shape[:2])
    padding = ((0, height - small.shape[0]), (0, width - small.shape[1]), (0, 0))
    result = model(np.pad(small, padding, mode="edge")[None])[0]
    # Means of blocks of the output, over the part that is no padding: the detail that the network adds does not count.
    blocks = result.reshape(height, model.factor, width, model.factor, 3).mean((1, 3))
    blocks = blocks[: small.shape[0], : small.shape[1]]
    deviation = blocks.std((0, 1))
    # A flat channel has no deviation to match.
    gain = np.where(deviation > 1e-3, small.std((0, 1)) / np.maximum(deviation, 1e-3), 1.0).clip(0.5, 2.0)
    shift = small.mean((0, 1)) - gain * blocks.mean((0, 1))

    def apply(band: np.ndarray) -> np.ndarray:
        band *= gain.astype(np.float32)
        band += shift.astype(np.float32)
        return band

    return apply


def _reduce(source: Rows, step: int) -> np.ndarray:
    """Means of blocks of `step` x `step` pixels; blocks at the right and the lower border may be smaller."""
    columns = np.arange(0, source.width, step)
    # The last block may be narrower.
    counts = np.diff([*columns, source.width])[:, None]
    bands = []
    for top in range(0, source.height, step):
        rows = source.take(np.arange(top, min(top + step, source.height))).mean(0)
        bands.append(np.add.reduceat(rows, columns, axis=0) / counts)
    return np.stack(bands).astype(np.float32)
