"""Reads drawn objects back from pixels, by drawing: the hypothesis that explains most of a region is what it shows.

A region is a connected set of pixels that differ from the background. For each shape and material the reader draws the
object at many places and radii around the region, fits its color by least squares, and keeps the best. It knows how
objects are drawn (data/sources/shapes_drawing.py) and needs no training and no network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import scipy.ndimage

from gigagan_jax.data.sources.shapes_drawing import coverage, tone
from gigagan_jax.data.sources.shapes_scenes import COLORS, MATERIALS, SHAPES

# Levels of 255 by which a pixel of an object differs from the background: in a channel, or between its channels.
_DIFFERENT = 28
_DIFFERENT_CHROMA = 40
_SMOOTHING = 0.5
# Smaller regions are specks: a small object has a radius of 0.08 of the side.
_SMALLEST_AREA = 0.004
# What a drawing may be blurred by, in pixels: generated pictures are softer than drawn ones.
_BLURS = (0.0, 0.5, 0.9)
# A region that the best drawing explains to less than this share of its energy is no object.
READABLE = 0.5


@dataclasses.dataclass(frozen=True)
class ReadObject:
    """What one region shows.

    Attributes:
      shape, color, material: words; the best hypothesis.
      x, y, radius: shares of the side.
      rgb: the fitted color, 0 to 255.
      explained: share of the region's energy that the drawing explains, up to 1.
      by_shape: [6], the same for the best drawing of each of SHAPES.
      by_material: [3], the same for each of MATERIALS.
    """

    shape: str
    color: str
    material: str
    x: float
    y: float
    radius: float
    rgb: np.ndarray
    explained: float
    by_shape: np.ndarray
    by_material: np.ndarray

    @property
    def readable(self) -> bool:
        return self.explained >= READABLE


def read_objects(image: np.ndarray, most: int = 6) -> list[ReadObject]:
    """Reads the objects of an image, the largest first.

    Args:
      image: uint8 [R, R, 3].
      most: regions that are read.

    Raises:
      ValueError: another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"scenes are read from uint8 [R, R, 3], got {image.dtype} {list(image.shape)}")
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    difference = pixels - background
    # Noise of single pixels joins regions and widens them.
    smooth = scipy.ndimage.gaussian_filter(difference, (_SMOOTHING, _SMOOTHING, 0))
    # The dark stripes of an object are as dark as the ground, but not as grey.
    chroma = smooth.max(axis=2) - smooth.min(axis=2)
    different = (np.abs(smooth).max(axis=2) > _DIFFERENT) | (chroma > _DIFFERENT_CHROMA)
    regions, count = scipy.ndimage.label(different, structure=np.ones((3, 3)))
    areas = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    order = [int(k) + 1 for k in np.argsort(-areas, kind="stable") if areas[k] >= _SMALLEST_AREA * different.size]
    return [_read_region(difference, background, regions, k) for k in order[:most]]


def _read_region(difference: np.ndarray, background: np.ndarray, regions: np.ndarray, k: int) -> ReadObject:
    side = len(difference)
    rows, columns = np.nonzero(regions == k)
    top, bottom = max(0, int(rows.min()) - 2), min(side, int(rows.max()) + 3)
    left, right = max(0, int(columns.min()) - 2), min(side, int(columns.max()) + 3)
    window = (slice(top, bottom), slice(left, right))
    pixels = (np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
    own = ((regions[window] == 0) | (regions[window] == k)).astype(np.float32)
    # Pixels of other objects count for nothing.
    target = _Target(pixels, (difference[window] * own[..., None]).reshape(-1, 3), own, background)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
    fits = {}
    for shape in SHAPES:
        near = _best_fit(shape, _place_of_box(shape, box), _GRID_COARSE, target, (0.5,)).place
        fits[shape] = _best_fit(shape, near, _GRID_FINE, target, _BLURS)
    shape = max(fits, key=lambda s: fits[s].explained.max())
    fit = fits[shape]
    material = int(fit.explained.argmax())
    rgb = fit.colors[material]
    return ReadObject(
        shape=shape,
        color=nearest_color(rgb),
        material=MATERIALS[material],
        x=float(fit.place[0] / side),
        y=float(fit.place[1] / side),
        radius=float(fit.place[2] / side),
        rgb=rgb,
        explained=float(fit.explained.max()),
        by_shape=np.array([fits[s].explained.max() for s in SHAPES]),
        by_material=fit.explained,
    )


@dataclasses.dataclass(frozen=True)
class _Fit:
    place: np.ndarray  # [3], x, y and radius in pixels
    explained: np.ndarray  # [3], by material
    colors: np.ndarray  # [3, 3], by material


# Steps around a place: x and y in pixels, and factors of the radius.
def _grid(step: float, factors: tuple[float, ...]) -> np.ndarray:
    return np.array([(dx, dy, f) for dx in (-step, 0, step) for dy in (-step, 0, step) for f in factors])


_GRID_COARSE = _grid(0.6, (0.8, 0.87, 0.94, 1.0, 1.07))
_GRID_FINE = _grid(0.3, (0.96, 1.0, 1.04))


@dataclasses.dataclass(frozen=True)
class _Target:
    """Pixels of a window that a drawing is to explain.

    Attributes:
      pixels: ([W], [H]) x and y of their centres.
      difference: [H W, 3], from the background; zero where another object lies.
      own: [H, W], 0 where another object lies, otherwise 1.
      background: [3].
    """

    pixels: tuple[np.ndarray, np.ndarray]
    difference: np.ndarray
    own: np.ndarray
    background: np.ndarray


def _best_fit(shape: str, start: np.ndarray, grid: np.ndarray, target: _Target, blurs: tuple[float, ...]) -> _Fit:
    """The place near `start` that explains most, with its color for each material.

    A drawn pixel differs from the ground by `255 b - a ground + f color`, where `a` is its coverage, `b` its white and
    `f` what it keeps of the color; a blur of the picture is a blur of each. The sums over pixels are dot products.
    """
    places = np.column_stack([start[0] + grid[:, 0], start[1] + grid[:, 1], start[2] * grid[:, 2]])
    places[:, 2] = np.maximum(places[:, 2], 1.0)
    covered, u, v = coverage(shape, target.pixels, places)
    wanted, ground = target.difference, target.background
    energy = (wanted**2).sum(axis=0)
    explained, colors = [], []
    for blur in blurs:
        soften = _blur_of(blur, target.own)
        a = soften(covered)
        a_dot = (a**2).sum(axis=1)[:, None]
        a_rest = energy + a_dot * ground**2 + 2 * ground * (a @ wanted)
        for material in MATERIALS:
            white, factor = tone(material, u, v)
            f = a if material == "plain" else soften(covered * factor)
            product = f @ wanted + ground * (f * a).sum(axis=1)[:, None]
            rest = a_rest
            if material == "shiny":
                b = soften(covered * white)
                b_dots = [(b * other).sum(axis=1)[:, None] for other in (a, b, f)]
                rest = rest - 510 * (b @ wanted) - 510 * ground * b_dots[0] + 255**2 * b_dots[1]
                product = product - 255 * b_dots[2]
            norm = np.maximum((f**2).sum(axis=1), 1e-6)[:, None]
            # Clipped: a color brighter than white would explain anything.
            color = np.clip(product / norm, 0, 255)
            residual = (rest - 2 * color * product + color**2 * norm).sum(axis=1)
            explained.append(1 - residual / max(float(energy.sum()), 1e-6))
            colors.append(color)
    # [blur, material, place]
    table = np.stack(explained).reshape(len(blurs), len(MATERIALS), -1)
    blur_index, _, place = np.unravel_index(int(table.argmax()), table.shape)
    color = np.stack(colors).reshape(len(blurs), len(MATERIALS), -1, 3)[blur_index, :, place]
    return _Fit(places[place], table[blur_index, :, place], color)


def _blur_of(sigma: float, own: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A Gaussian blur of [K, H, W] by `sigma` pixels, without the pixels of other objects: [K, H W]."""
    height, width = own.shape
    if not sigma:
        return lambda x: (x * own).reshape(len(x), -1)
    down, across = _blur_matrix(height, sigma), _blur_matrix(width, sigma)

    def blur(x: np.ndarray) -> np.ndarray:
        # Two products of whole matrices: NumPy multiplies a stack of small ones one by one.
        rows = (np.ascontiguousarray(x).reshape(-1, width) @ across).reshape(len(x), height, width)
        columns = (rows.transpose(0, 2, 1).reshape(-1, height) @ down).reshape(len(x), width, height)
        return (columns.transpose(0, 2, 1) * own).reshape(len(x), -1)

    return blur


@functools.cache
def _blur_matrix(size: int, sigma: float) -> np.ndarray:
    """[size, size], symmetric."""
    steps = np.arange(size, dtype=np.float32)
    kernel = np.exp(-((steps[:, None] - steps[None, :]) ** 2) / (2 * sigma**2))
    # By the middle row: what leaves the window is lost on both sides alike.
    whole = np.exp(-(np.arange(-size, size + 1, dtype=np.float32) ** 2) / (2 * sigma**2)).sum()
    # Denormal numbers make a product a hundred times slower.
    return np.where(kernel > 1e-6, kernel / whole, 0).astype(np.float32)


def _box_of_shape(shape: str) -> np.ndarray:
    """[4], left, top, right and bottom of a shape of radius 1."""
    steps = np.linspace(-1.2, 1.2, 241)
    covered = coverage(shape, (steps, steps), np.array([[0.0, 0.0, 1.0]]), softness=0.01)[0][0] > 0.5
    rows, columns = np.nonzero(covered)
    return np.array([steps[columns.min()], steps[rows.min()], steps[columns.max()], steps[rows.max()]])


_BOXES = {shape: _box_of_shape(shape) for shape in SHAPES}


def _place_of_box(shape: str, box: np.ndarray) -> np.ndarray:
    """[3], x, y and radius at which a shape fills a box; both in pixels."""
    unit = _BOXES[shape]
    radius = ((box[2] - box[0]) / (unit[2] - unit[0]) + (box[3] - box[1]) / (unit[3] - unit[1])) / 2
    x = (box[0] + box[2]) / 2 - radius * (unit[0] + unit[2]) / 2
    y = (box[1] + box[3]) / 2 - radius * (unit[1] + unit[3]) / 2
    return np.array([x, y, radius])


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [..., 3] in 0..255 to CIE L*a*b* (D65), where distances are near to what eyes see (IEC 61966-2-1, CIE 1976)."""
    value = np.asarray(rgb, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = _TO_XYZ.sum(axis=1)
_NAMES = tuple(COLORS)
_LAB = to_lab(np.array(list(COLORS.values())))


def nearest_color(rgb: np.ndarray) -> str:
    """The word of COLORS whose color is nearest in L*a*b*; rgb is [3] in 0..255."""
    return _NAMES[int(((to_lab(rgb) - _LAB) ** 2).sum(axis=1).argmin())]
