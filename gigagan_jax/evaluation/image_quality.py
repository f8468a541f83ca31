"""How close an image is to a reference: PSNR, SSIM, and the seams of tiles.

Images are [H, W, 3], uint8 or float in [-1, 1]; floats are taken to 0 to 255 without rounding. Channel "rgb" averages over the
three channels. Channel "y" is the luma of BT.601 in studio range, 16 to 235, as super-resolution papers have it. `border`
pixels at each side are left out. All work is done in strips of rows: memory does not grow with the height.

Equal to scikit-image by tests/evaluation/test_image_quality.py.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from gigagan_jax.core.errors import UserError

CHANNELS = ("rgb", "y")
# Largest value of a pixel, and of luma too: papers keep 255 though studio range ends at 235.
_RANGE = 255.0
# Wang et al. (2004): a Gaussian window of deviation 1.5, cut to 11 x 11 pixels; constants of numerator and denominator.
_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
# BT.601 of red, green and blue for pixels 0 to 255; the offset is 16.
_LUMA = np.array((65.481, 128.553, 24.966)) / 255
# Pixels of one strip: float64 arrays of a few megabytes each.
_STRIP = 2**18


def psnr(a: np.ndarray, b: np.ndarray, border: int = 0, channel: str = "rgb") -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean squared difference); infinite for equal images.

    Raises:
      UserError: the shapes differ, or nothing is left within the border.
    """
    total = 0.0
    for x, y in _strips(a, b, border, channel):
        total += np.square(x - y).sum()
    height, width = _inner_size(a, border)
    mean = total / (height * width * (3 if channel == "rgb" else 1))
    return 10 * math.log10(_RANGE**2 / mean) if mean else math.inf


def ssim(a: np.ndarray, b: np.ndarray, border: int = 0, channel: str = "rgb") -> float:
    """Structural similarity (Wang et al., 2004), 1 for equal images; its mean over all windows that lie in the image.

    Raises:
      UserError: the shapes differ, or less than 11 pixels are left within the border.
    """
    height, width = _inner_size(a, border)
    if min(height, width) <= 2 * _RADIUS:
        raise UserError(f"images of {height}x{width} px: SSIM needs {2 * _RADIUS + 1} or more at each side")
    total = 0.0
    count = 0
    for x, y in _strips(a, b, border, channel, overlap=_RADIUS):
        values = _similarity(x, y)
        total += values.sum()
        count += values.size
    return float(total / count)


def _similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Similarity at each place of [H, W, C] that has its whole window -> [H - 10, W - 10, C]."""
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    # Population moments, as in the paper.
    var_x, var_y = _window_mean(x * x) - mean_x**2, _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return above / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))


def _window_mean(x: np.ndarray) -> np.ndarray:
    weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    weights /= weights.sum()
    # The window is a product of two: 22 weights a pixel instead of 121.
    for axis in (0, 1):
        x = scipy.ndimage.correlate1d(x, weights, axis=axis)
    return x[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]


# ---------------------------------------------------------------- seams


class SeamErrors(NamedTuple):
    """Mean absolute difference to the untiled result, in levels of 255: near tile borders, and elsewhere."""

    at_borders: float
    inside: float

    @property
    def ratio(self) -> float:
        """1 where tiling changes both alike, or nothing; infinite where it changes the borders alone."""
        if not self.inside:
            # A windowed network: tiling changes nothing anywhere, which is as good as can be.
            return math.inf if self.at_borders else 1.0
        return self.at_borders / self.inside


def measure_seams(
    image: np.ndarray, untiled: np.ndarray, rows: Sequence[int], columns: Sequence[int], band: int = 8
) -> SeamErrors:
    """Compares an image that was made in tiles with the same one made at once.

    Args:
      image, untiled: [H, W, 3]
      rows: tile borders; y stands for the line between the rows of pixels y - 1 and y
      columns: tile borders, likewise
      band: pixels at each side of a border that count as near it

    Raises:
      UserError: the shapes differ, or all pixels or none are near a border.
    """
    _check_shapes(image, untiled)
    height, width = image.shape[:2]
    # Seams are whole rows and columns: the pixels inside are a product of two masks.
    near_row, near_column = _near_borders(rows, height, band), _near_borders(columns, width, band)
    inside = int((~near_row).sum() * (~near_column).sum())
    if inside in (0, height * width):
        raise UserError(
            f"tile borders {list(rows)} and {list(columns)} with a band of {band} px leave "
            f"{'nothing' if not inside else 'all'} of {height}x{width} px inside tiles"
        )
    total = total_inside = 0.0
    start = 0
    for x, y in _strips(image, untiled, 0, "rgb"):
        # Signs would cancel: a seam is often light on one side and dark on the other.
        difference = np.abs(x - y).mean(-1)
        total += difference.sum()
        total_inside += difference[~near_row[start : start + len(x)]][:, ~near_column].sum()
        start += len(x)
    return SeamErrors((total - total_inside) / (height * width - inside), total_inside / inside)


def seam_ratio(
    image: np.ndarray, untiled: np.ndarray, rows: Sequence[int], columns: Sequence[int], band: int = 8
) -> float:
    """Mean absolute difference to the untiled result near tile borders, over that inside tiles; see `measure_seams`."""
    return measure_seams(image, untiled, rows, columns, band).ratio


def _near_borders(borders: Sequence[int], length: int, band: int) -> np.ndarray:
    """bool [length]"""
    near = np.zeros(length, bool)
    for border in borders:
        near[max(border - band, 0) : max(border + band, 0)] = True
    return near


# ---------------------------------------------------------------- strips


def _check_shapes(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 3 or a.shape[2] != 3:
        raise UserError(f"images of shapes {a.shape} and {b.shape}: both must be [H, W, 3] and of one size")


def _inner_size(a: np.ndarray, border: int) -> tuple[int, int]:
    return a.shape[0] - 2 * border, a.shape[1] - 2 * border


def _strips(
    a: np.ndarray, b: np.ndarray, border: int, channel: str, overlap: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields float64 strips [h, W, C] of both images, 0 to 255, top to bottom.

    Args:
      overlap: rows that a strip has more at each of its two sides that lie in the image
    """
    _check_shapes(a, b)
    if channel not in CHANNELS:
        raise ValueError(f"channel {channel!r} is none of {CHANNELS}")
    height, width = _inner_size(a, border)
    if border < 0 or min(height, width) < 1:
        raise UserError(f"a border of {border} px leaves nothing of an image of {a.shape[0]}x{a.shape[1]} px")
    step = max(_STRIP // width, 1)
    # The windows of a strip begin where those of the one before end.
    for start in range(overlap, height - overlap, step):
        stop = min(start + step, height - overlap)
        rows = slice(border + start - overlap, border + stop + overlap)
        x, y = (_as_levels(image[rows, border : border + width], channel) for image in (a, b))
        yield x, y


def _as_levels(x: np.ndarray, channel: str) -> np.ndarray:
    """float64 [H, W, C], 0 to 255"""
    # float64: sums over millions of pixels would lose digits.
    levels = x.astype(np.float64) if x.dtype == np.uint8 else (x.astype(np.float64) + 1) * (_RANGE / 2)
    return levels if channel == "rgb" else (levels @ _LUMA + 16)[..., None]
