"""Low-resolution input of an upsampler, made on the device: downsampling, noise augmentation, and degradations of photographs.

`degrade` is the second-order pipeline of Real-ESRGAN (Wang et al., 2021): twice blur, resize, noise and JPEG, with a sinc
filter at the end. Its settings are those of that paper, but the first round never enlarges. All draws of a batch come from
one key: what happens to an image depends on the key and on its place in the global batch alone, on any mesh.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.training.jpeg import jpeg_compress

_EXACT = jax.lax.Precision.HIGHEST

# ---------------------------------------------------------------- resampling


def _area(x: Any, xp: Any) -> Any:
    return xp.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bilinear(x: Any, xp: Any) -> Any:
    return xp.maximum(1 - xp.abs(x), 0)


def _bicubic(x: Any, xp: Any) -> Any:
    # Keys' cubic with a = -0.5, as in PIL.
    x = xp.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return xp.where(x < 1, near, xp.where(x < 2, far, 0.0))


def _lanczos(x: Any, xp: Any) -> Any:
    return xp.where(xp.abs(x) < 3, xp.sinc(x) * xp.sinc(x / 3), 0.0)


_FILTERS = {"area": _area, "bilinear": _bilinear, "bicubic": _bicubic, "lanczos": _lanczos}


@functools.cache
def resize_matrix(n: int, out: int, kind: str) -> np.ndarray:
    """float32 [out, n]: resizes an axis of n samples, as PIL does.

    A filter is stretched by the factor of a reduction, and its weights are normalised at the borders.

    Args:
      kind: "area", "bilinear", "bicubic" or "lanczos"; "area" is PIL's BOX
    """
    scale = n / out
    offsets = np.arange(n) + 0.5 - (np.arange(out)[:, None] + 0.5) * scale
    weights = _FILTERS[kind](offsets / max(scale, 1.0), np)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def downsample_image(x: jax.Array, size: int | tuple[int, int], kind: str) -> jax.Array:
    """Images at another size, with antialiasing, as PIL.Image.resize gives them.

    Args:
      x: float32 [N, H, W, C]
      size: side, or (height, width), in pixels
      kind: "area", "bicubic" or "lanczos"

    Returns:
      float32 [N, h, w, C]; bicubic and Lanczos overshoot, so values may leave [-1, 1]
    """
    height, width = _height_and_width(size)
    x = jnp.einsum("oh,nhwc->nowc", resize_matrix(x.shape[1], height, kind), x, precision=_EXACT)
    return jnp.einsum("ow,nhwc->nhoc", resize_matrix(x.shape[2], width, kind), x, precision=_EXACT)


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def add_noise(x: jax.Array, level: jax.Array, noise: jax.Array) -> jax.Array:
    """sqrt(1 - level^2) x + level noise: keeps the variance of images of variance one.

    Args:
      x, noise: float32 [N, H, W, C]
      level: float32 [N], 0 to 1
    """
    level = level[:, None, None, None]
    return jnp.sqrt(1 - jnp.square(level)) * x + level * noise


# ---------------------------------------------------------------- draws

# Columns of the table; a draw too many is a StopIteration while the pipeline is traced.
_MOST_DRAWS = 56


class _Draws:
    """Draws for each example of a batch of n; each call takes the next of a fixed number of columns."""

    def __init__(self, key: jax.Array, n: int):
        self._key, self._fields, self._n = key, 0, n
        # One array instead of one for each call: a CPU unrolls the generator at each use of it.
        self._columns = iter(jnp.unstack(jax.random.uniform(jax.random.fold_in(key, 0), (n, _MOST_DRAWS)), axis=1))

    def uniform(self, low: float, high: float) -> jax.Array:
        """float32 [N], evenly from low to high"""
        return low + (high - low) * next(self._columns)

    def chance(self, probability: jax.Array | float) -> jax.Array:
        """bool [N]"""
        return self.uniform(0, 1) < probability

    def choice(self, weights: tuple[float, ...]) -> jax.Array:
        """int32 [N]: a number of `weights`, with their probabilities"""
        edges = np.cumsum(weights)[:-1] / np.sum(weights)
        return (self.uniform(0, 1)[:, None] >= jnp.asarray(edges, jnp.float32)).sum(1)

    def normal(self, shape: tuple[int, ...]) -> jax.Array:
        """float32 [N, *shape]"""
        self._fields += 1
        return jax.random.normal(jax.random.fold_in(self._key, self._fields), (self._n, *shape))


class _Stage(NamedTuple):
    """Settings of one of the two rounds, those of Real-ESRGAN."""

    # Share of images that are blurred, and the deviation of the blur in pixels.
    blur: float
    sigma: tuple[float, float]
    # Factors of the resize, and the weights of enlarging, of reducing and of keeping the size.
    resize: tuple[float, float]
    resize_weights: tuple[float, float, float]
    # Deviation of Gaussian noise in levels of 255; factor of noise that grows with the root of the brightness.
    gaussian: tuple[float, float]
    poisson: tuple[float, float]


# Real-ESRGAN enlarges a fifth of the images in the first round, by up to 1.5: here all images would pay for that canvas.
_FIRST = _Stage(1.0, (0.2, 3.0), (0.15, 1.0), (0, 0.8, 0.2), (1, 30), (0.05, 3.0))
_SECOND = _Stage(0.8, (0.2, 1.5), (0.3, 1.2), (0.3, 0.4, 0.3), (1, 25), (0.05, 2.5))
_GREY_NOISE, _SUBSAMPLED, _SINC_BLUR, _SINC_AT_THE_END = 0.4, 0.75, 0.1, 0.8
_QUALITY = (30.0, 95.0)
# Pixels. Kernels are 7 to 21 wide.
_RADII = (3, 10)
_SINC_CUTOFFS = 16


# ---------------------------------------------------------------- blur


@functools.cache
def _sinc_kernels() -> np.ndarray:
    """float32 [_SINC_CUTOFFS, K, K]: circular low-pass filters, cut off from pi / 3 to pi."""
    # Imported here: runs without degradations do not need it.
    from scipy.special import j1

    most = _RADII[1]
    at = np.arange(-most, most + 1)
    r = np.maximum(np.hypot(at[:, None], at[None]), 1e-6)
    kernels = [w * j1(w * r) / (2 * np.pi * r) for w in np.linspace(np.pi / 3, np.pi, _SINC_CUTOFFS)]
    return np.stack([k / k.sum() for k in kernels]).astype(np.float32)


def _draw_sinc(draws: _Draws) -> jax.Array:
    """float32 [N, K, K]"""
    return jnp.asarray(_sinc_kernels())[draws.uniform(0, _SINC_CUTOFFS).astype(jnp.int32)]


def _draw_kernel(draws: _Draws, stage: _Stage, strength: jax.Array) -> jax.Array:
    """float32 [N, K, K] with sum 1: Gaussian, generalised Gaussian, plateau, or sinc; round or stretched, at any angle."""
    least, most = _RADII
    # At strength 0 the kernel is all but a single one.
    sigma = [jnp.maximum(draws.uniform(*stage.sigma) * strength, 0.05) for _ in range(2)]
    across, along = sigma[0], jnp.where(draws.chance(0.6), sigma[0], sigma[1])
    angle, power, flat = draws.uniform(0, np.pi), draws.uniform(0.5, 4), draws.uniform(1, 2)
    form = draws.choice((0.7, 0.15, 0.15))
    radius = draws.uniform(least, most + 1).astype(jnp.int32)
    at = jnp.arange(-most, most + 1, dtype=jnp.float32)
    wide = lambda v: v[:, None, None]
    cos, sin = wide(jnp.cos(angle)), wide(jnp.sin(angle))
    u, v = cos * at[None] + sin * at[:, None], cos * at[:, None] - sin * at[None]
    q = jnp.square(u / wide(across)) + jnp.square(v / wide(along))
    exponent = jnp.stack([jnp.ones_like(power), power, flat], axis=1)
    powered = q ** wide(jnp.take_along_axis(exponent, form[:, None], axis=1)[:, 0])
    kernel = jnp.where(wide(form == 2), 1 / (1 + powered), jnp.exp(-0.5 * powered))
    kernel *= jnp.maximum(jnp.abs(at[:, None]), jnp.abs(at[None])) <= wide(radius)
    kernel /= kernel.sum((1, 2), keepdims=True)
    kernel = jnp.where(wide(draws.chance(_SINC_BLUR * strength)), _draw_sinc(draws), kernel)
    return jnp.where(wide(draws.chance(stage.blur)), kernel, _delta())


def _delta() -> np.ndarray:
    side = 2 * _RADII[1] + 1
    kernel = np.zeros((side, side), np.float32)
    kernel[side // 2, side // 2] = 1
    return kernel


def _filter_images(x: jax.Array, kernels: jax.Array) -> jax.Array:
    """Each image filtered by its own kernel, its borders repeated: x [N, H, W, C], kernels [N, K, K] -> [N, H, W, C]"""
    n, h, w, channels = x.shape
    side = kernels.shape[1]
    around = side // 2
    padded = jnp.pad(x, ((0, 0), (around, around), (around, around), (0, 0)), mode="edge")
    # Columns and channels are one axis: three channels alone would fill few lanes of a vector unit.
    padded = padded.reshape(n, h + side - 1, -1)

    # Shifted sums, a row of the kernel a turn: a grouped convolution is 40 times slower on a CPU, and Fourier transforms
    # are gathered on one device.
    def add_row(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        rows = jax.lax.dynamic_slice_in_dim(padded, row, h, axis=1)
        weights = jax.lax.dynamic_index_in_dim(kernels, row, axis=1, keepdims=False)
        for column in range(side):
            start = column * channels
            total += rows[:, :, start : start + w * channels] * weights[:, column][:, None, None]
        return total, None

    empty = jnp.zeros((n, h, w * channels), x.dtype)
    return jax.lax.scan(add_row, empty, jnp.arange(side))[0].reshape(x.shape)


# ---------------------------------------------------------------- sizes that differ within a batch


class _Canvas(NamedTuple):
    """Images of different sizes in one array; outside of an image its last row and column go on.

    pixels: float32 [N, H, W, 3] in [-1, 1]
    extent: int32 [N, 2], height and width of each image
    """

    pixels: jax.Array
    extent: jax.Array


def _resize_axis(n: jax.Array, length: int, new: jax.Array, out: int, kind: jax.Array) -> jax.Array:
    """float32 [N, out, length]: `resize_matrix` from n to `new` samples for each image; n, new, kind int32 [N]."""
    scale = (n / new)[:, None, None]
    at = jnp.arange(length)
    rows = jnp.minimum(jnp.arange(out), new[:, None] - 1)[:, :, None]
    # A little wider than PIL's, so that rounding never leaves a row without a sample.
    offsets = (at + 0.5 - (rows + 0.5) * scale) / jnp.maximum(scale, 1) * (1 - 1e-4)
    kind = kind[:, None, None]
    weights = jnp.where(
        kind == 0, _area(offsets, jnp), jnp.where(kind == 1, _bilinear(offsets, jnp), _bicubic(offsets, jnp))
    )
    weights *= at < n[:, None, None]
    return weights / weights.sum(2, keepdims=True)


def _resize_canvas(draws: _Draws, canvas: _Canvas, extent: jax.Array, size: tuple[int, int]) -> _Canvas:
    """The images at the sizes `extent`, on a canvas of `size`; area, bilinear or bicubic, evenly."""
    x, kind = canvas.pixels, draws.choice((1, 1, 1))
    rows = _resize_axis(canvas.extent[:, 0], x.shape[1], extent[:, 0], size[0], kind)
    columns = _resize_axis(canvas.extent[:, 1], x.shape[2], extent[:, 1], size[1], kind)
    x = jnp.einsum("noh,nhwc->nowc", rows, x, precision=_EXACT)
    # Bicubic weights overshoot.
    return _Canvas(jnp.einsum("now,nhwc->nhoc", columns, x, precision=_EXACT).clip(-1, 1), extent)


def _draw_extent(draws: _Draws, stage: _Stage, base: tuple[int, int], strength: jax.Array) -> jax.Array:
    """int32 [N, 2]: height and width of `base` times a factor for each image."""
    (low, high), mode = stage.resize, draws.choice(stage.resize_weights)
    larger, smaller = draws.uniform(1, high), draws.uniform(low, 1)
    factor = jnp.where(mode == 0, larger, jnp.where(mode == 1, smaller, 1.0)) ** strength
    return jnp.maximum(jnp.round(factor[:, None] * jnp.array(base)).astype(jnp.int32), 1)


def _largest_extent(stage: _Stage, base: tuple[int, int]) -> tuple[int, int]:
    """Size of the canvas that holds every image of a stage."""
    # `_draw_extent` rounds to the nearest.
    return int(np.ceil(stage.resize[1] * base[0])), int(np.ceil(stage.resize[1] * base[1]))


# ---------------------------------------------------------------- the pipeline


def _add_sensor_noise(draws: _Draws, x: jax.Array, stage: _Stage, strength: jax.Array) -> jax.Array:
    """Noise of one deviation, or one that grows with the root of the brightness as photons' does; in color or in grey."""
    wide = lambda v: v[:, None, None, None]
    grey = wide(draws.chance(_GREY_NOISE))
    normal = draws.normal(x.shape[1:])
    normal = jnp.where(grey, normal[..., :1], normal)
    # In [0, 1], where photons are counted.
    light = (jnp.where(grey, x.mean(-1, keepdims=True), x) + 1) / 2
    even = wide(draws.uniform(*stage.gaussian)) / 255
    # The Poisson distribution's deviation at 255 counts for white, of which Real-ESRGAN's has about as many.
    counted = wide(draws.uniform(*stage.poisson)) * jnp.sqrt(light / 255)
    deviation = jnp.where(wide(draws.chance(0.5)), even, counted)
    return (x + 2 * wide(strength) * deviation * normal).clip(-1, 1)


def _draw_jpeg(draws: _Draws, x: jax.Array, strength: jax.Array) -> jax.Array:
    quality = 100 - (100 - draws.uniform(*_QUALITY)) * strength
    return jpeg_compress(x, quality, draws.chance(_SUBSAMPLED))


def degrade(key: jax.Array, x: jax.Array, size: int | tuple[int, int], strength: float | jax.Array = 1.0) -> jax.Array:
    """Small images as cameras, resizing and compression leave them.

    Args:
      key: of the step
      x: float32 [N, H, W, 3] in [-1, 1]
      size: side, or (height, width), of what is returned, in pixels
      strength: scalar or float32 [N], 0 to 1; widths, deviations and losses scale with it, and 0 resizes and rounds only

    Returns:
      float32 [N, h, w, 3] in [-1, 1], in steps of 2 / 255
    """
    n, height, width, _ = x.shape
    size = _height_and_width(size)
    strength = jnp.broadcast_to(jnp.asarray(strength, jnp.float32), (n,))
    draws = _Draws(key, n)
    whole = jnp.broadcast_to(jnp.array((height, width)), (n, 2))

    canvas = _Canvas(_filter_images(x.astype(jnp.float32), _draw_kernel(draws, _FIRST, strength)), whole)
    extent = _draw_extent(draws, _FIRST, (height, width), strength)
    canvas = _resize_canvas(draws, canvas, extent, _largest_extent(_FIRST, (height, width)))
    noisy = _add_sensor_noise(draws, canvas.pixels, _FIRST, strength)
    canvas = canvas._replace(pixels=_draw_jpeg(draws, noisy, strength))

    blurred = _filter_images(canvas.pixels, _draw_kernel(draws, _SECOND, strength))
    extent = _draw_extent(draws, _SECOND, size, strength)
    canvas = _resize_canvas(draws, canvas._replace(pixels=blurred), extent, _largest_extent(_SECOND, size))
    noisy = _add_sensor_noise(draws, canvas.pixels, _SECOND, strength)

    # Half of the images are compressed before the last resize and the sinc filter, half after them.
    early = draws.chance(0.5)[:, None, None, None]
    canvas = canvas._replace(pixels=jnp.where(early, _draw_jpeg(draws, noisy, strength), noisy))
    small = _resize_canvas(draws, canvas, jnp.broadcast_to(jnp.array(size), (n, 2)), size).pixels
    ringing = draws.chance(_SINC_AT_THE_END * strength)[:, None, None]
    small = _filter_images(small, jnp.where(ringing, _draw_sinc(draws), _delta())).clip(-1, 1)
    small = jnp.where(early, small, _draw_jpeg(draws, small, strength))
    return jnp.round((small + 1) * 127.5) / 127.5 - 1
