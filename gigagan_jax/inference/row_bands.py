"""Images as bands of rows: sources that are read by row numbers, noise by absolute position, and a resize by bands."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from PIL import Image

# Side of the cells of `position_noise`, in pixels. Another side is another noise.
CELL = 64
# Pillow's Lanczos filter reaches this many pixels of the coarser image to each side.
_LANCZOS_SUPPORT = 3.0
# Rows that are resized at once, and rows that are rounded at once: their temporaries are several times as large.
_BAND_ROWS = 64
_ROUNDED_ROWS = 16


class Rows(Protocol):
    """An image whose rows are read by number.

    Attributes:
      height, width: in pixels.
    """

    height: int
    width: int

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), W, C] of these row numbers. Streams forget rows below the smallest number of a call."""


class ArrayRows:
    """Rows of an array in memory.

    Args:
      pixels: [H, W, C]: uint8 or uint16, read as [-1, 1], or float32, read as it is.
    """

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def take(self, rows: np.ndarray) -> np.ndarray:
        # Only these rows become floats.
        return to_float(self.pixels[rows])


class StreamRows:
    """Rows of bands that are made one after the other, each read about once.

    Args:
      bands: float32 [rows, W, C] from top to bottom.
      height, width: of the image.
    """

    def __init__(self, bands: Iterable[np.ndarray], height: int, width: int):
        self.height, self.width = height, width
        self._bands = iter(bands)
        self._kept: list[np.ndarray] = []
        # Row numbers of the kept rows: from _first to before _next.
        self._first = self._next = 0

    def take(self, rows: np.ndarray) -> np.ndarray:
        lowest, highest = int(rows.min()), int(rows.max())
        if lowest < self._first:
            raise ValueError(f"row {lowest} of a stream that keeps rows from {self._first}")
        self._drop_above(lowest)
        while self._next <= highest:
            # The maker of the bands uses its memory again: what is still wanted of the last one is copied, and no more.
            if self._kept:
                self._kept[-1] = self._kept[-1].copy()
            self._kept.append(next(self._bands))
            self._next += len(self._kept[-1])
            self._drop_above(lowest)
        out = np.empty((len(rows), *self._kept[0].shape[1:]), np.float32)
        top = self._first
        for band in self._kept:
            inside = (rows >= top) & (rows < top + len(band))
            out[inside] = band[rows[inside] - top]
            top += len(band)
        return out

    def _drop_above(self, lowest: int) -> None:
        """Forgets the rows above this one, as far as they were made."""
        while self._kept and self._first < lowest:
            n = min(len(self._kept[0]), lowest - self._first)
            self._first += n
            # A view: the rows are released with their band.
            self._kept[0] = self._kept[0][n:]
            if not len(self._kept[0]):
                self._kept.pop(0)


class NoisyRows:
    """Rows with Gaussian noise that is a function of seed and position: sqrt(1 - level^2) x + level noise.

    Upsamplers are trained with this mixture (training/degradations.py).

    Args:
      rows: the image, [-1, 1].
      level: 0 to 1.
      seed: of the noise.
    """

    def __init__(self, rows: Rows, level: float, seed: int):
        self._rows, self._level = rows, level
        self.height, self.width = rows.height, rows.width
        # Neighbouring windows read the same cells again.
        self._strip = functools.lru_cache(maxsize=4)(
            lambda cell: position_noise(seed, cell * CELL, 0, CELL, self.width)
        )

    def take(self, rows: np.ndarray) -> np.ndarray:
        out = self._rows.take(rows) * np.float32((1 - self._level**2) ** 0.5)
        for cell in np.unique(rows // CELL):
            inside = rows // CELL == cell
            out[inside] += self._level * self._strip(int(cell))[rows[inside] - cell * CELL]
        return out


def position_noise(seed: int, y0: int, x0: int, height: int, width: int) -> np.ndarray:
    """Standard normal noise of a window of an endless plane: every window is a slice of it.

    Args:
      seed: 0 to 2^64 - 1.
      y0, x0: of the window's first pixel, at least 0.
      height, width: of the window.

    Returns:
      float32 [height, width, 3]
    """
    # Whole cells are drawn, and the parts outside of the window dropped.
    out = np.empty((height, width, 3), np.float32)
    for cy in range(y0 // CELL, -(-(y0 + height) // CELL)):
        for cx in range(x0 // CELL, -(-(x0 + width) // CELL)):
            # The cell's number is in the upper half of Philox's counter, which no cell's own draws reach.
            cell = np.random.Philox(key=[seed, 0], counter=[0, 0, cy, cx])
            noise = np.random.Generator(cell).standard_normal((CELL, CELL, 3), np.float32)
            top, left = cy * CELL - y0, cx * CELL - x0
            rows = slice(max(0, -top), min(CELL, height - top))
            columns = slice(max(0, -left), min(CELL, width - left))
            out[top + rows.start : top + rows.stop, left + columns.start : left + columns.stop] = noise[rows, columns]
    return out


def resize_bands(
    source: Rows, height: int, width: int, wrap: bool = False, band_rows: int = _BAND_ROWS
) -> Iterator[np.ndarray]:
    """Resizes by Pillow's Lanczos filter, a band of rows at a time.

    Args:
      source: float32 [H, W, C].
      height, width: of the result.
      wrap: the image repeats. It is then read out of order: not a stream.
      band_rows: rows of the result that are made at once.

    Yields:
      float32 [rows, width, C] from top to bottom; together they are the resized whole up to rounding.
    """
    step = source.height / height
    # The kernel is stretched where the image shrinks.
    reach = int(np.ceil(_LANCZOS_SUPPORT * max(step, 1.0))) + 1
    side = int(np.ceil(_LANCZOS_SUPPORT * max(source.width / width, 1.0))) + 1 if wrap else 0
    columns = np.arange(-side, source.width + side) % source.width
    for top in range(0, height, band_rows):
        bottom = min(top + band_rows, height)
        first, last = int(top * step) - reach, int(np.ceil(bottom * step)) + reach
        if not wrap:
            first, last = max(0, first), min(source.height, last)
        rows = source.take(np.arange(first, last) % source.height)
        if wrap:
            rows = rows[:, columns]
        # The box is where the band lies among the pixels that were read, in fractions of a row.
        lowest = min(bottom * step - first, float(len(rows)))
        box = (float(side), top * step - first, float(side + source.width), lowest)
        size = (width, bottom - top)
        # Pillow resizes floats of one channel only.
        planes = [Image.fromarray(np.ascontiguousarray(rows[..., c])) for c in range(rows.shape[-1])]
        yield np.stack([np.asarray(p.resize(size, Image.Resampling.LANCZOS, box=box)) for p in planes], axis=-1)


def to_float(pixels: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> float32 in [-1, 1]; floats become float32."""
    if np.issubdtype(pixels.dtype, np.floating):
        return pixels.astype(np.float32, copy=False)
    # In place: the temporaries of a wide band are large.
    out = pixels.astype(np.float32)
    out /= np.float32(np.iinfo(pixels.dtype).max / 2)
    out -= 1
    return out


def from_float(x: np.ndarray, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """float32 in [-1, 1] -> uint8 or uint16. Values outside are clipped, halves round up.

    Raises:
      FloatingPointError: a value is NaN or infinite.
    """
    half = np.iinfo(dtype).max / 2
    out = np.empty(x.shape, dtype)
    for top in range(0, len(x), _ROUNDED_ROWS):
        block = x[top : top + _ROUNDED_ROWS]
        if not np.isfinite(block).all():
            raise FloatingPointError("a value is NaN or infinite")
        levels = block * np.float32(half)
        levels += np.float32(half + 0.5)
        np.floor(levels, out=levels)
        out[top : top + _ROUNDED_ROWS] = np.clip(levels, 0, np.iinfo(dtype).max, out=levels).astype(dtype)
    return out
