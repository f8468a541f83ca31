"""Resampling by two: the [1, 3, 3, 1] filter of StyleGAN2, and area averaging for the pyramid of a real image.

Each axis is a product with a small constant matrix. It runs on the matrix units, traces and compiles to few
operations, and its backward pass is the product with the transpose. Up to 64 px it costs a few percent of the
convolution beside it. Its cost for a pixel grows with the side: longer axes are filtered by shifted sums instead, of which
a device that holds a strip of the image needs its neighbour's last rows only.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def _filter_matrix(kind: str, n: int) -> np.ndarray:
    """[out, n] weights of the filter along one axis of n samples, zeros outside."""
    taps = np.array([1.0, 3.0, 3.0, 1.0], np.float32) / 8
    # Upsampling doubles the gain on each axis, because every other sample is zero.
    length, stride, gain = {"up": (2 * n, 1, 2.0), "down": (n // 2, 2, 1.0), "blur": (n + 1, 1, 1.0)}[kind]
    m = np.zeros((length, n), np.float32)
    for o in range(length):
        for k, tap in enumerate(taps):
            if kind == "up":
                # Zeros lie between the samples, so only every other tap reads a sample.
                i, rest = divmod(o + k - 2, 2)
                if rest:
                    continue
            else:
                # One zero of padding before the samples, or two for a blur that widens the map by one.
                i = o * stride + k - (1 if kind == "down" else 2)
            if 0 <= i < n:
                m[o, i] += gain * tap
    return m


# Samples of the longest axis that is filtered by a matrix.
_LONGEST_MATRIX = 64


def _shift(x: jax.Array, by: int, axis: int) -> jax.Array:
    """x moved along an axis by one or two samples, zeros where nothing comes from."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (by, 0) if by > 0 else (0, -by)
    start = 0 if by > 0 else -by
    return jax.lax.slice_in_dim(jnp.pad(x, pad), start, start + x.shape[axis], axis=axis)


def _filter_axis(x: jax.Array, kind: str, axis: int) -> jax.Array:
    """The filter along one axis, by shifted sums."""
    n = x.shape[axis]
    if kind == "up":
        near = 0.75 * x
        pair = jnp.stack([near + 0.25 * _shift(x, 1, axis), near + 0.25 * _shift(x, -1, axis)], axis=axis + 1)
        return pair.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    if kind == "down":
        pair = x.reshape(*x.shape[:axis], n // 2, 2, *x.shape[axis + 1 :])
        even, odd = (jax.lax.index_in_dim(pair, i, axis + 1, keepdims=False) for i in (0, 1))
        return 0.375 * (even + odd) + 0.125 * (_shift(odd, 1, axis) + _shift(even, -1, axis))
    pad = [(0, 0)] * x.ndim
    pad[axis] = (2, 2)
    x = jnp.pad(x, pad)
    a, b, c, d = (jax.lax.slice_in_dim(x, i, i + n + 1, axis=axis) for i in range(4))
    return 0.375 * (b + c) + 0.125 * (a + d)


def _apply_filter(x: jax.Array, kind: str) -> jax.Array:
    """The filter along both axes of [..., H, W, C]."""
    *lead, h, w, c = x.shape
    x = x.reshape(-1, h, w, c)
    # A TPU multiplies float32 in bfloat16 by default; in bfloat16 the taps n / 8 are exact anyway.
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    for axis, n, product in ((1, h, "oh,nhwc->nowc"), (2, w, "ow,nhwc->nhoc")):
        # A symbolic length, of an artefact for any size, has no matrix.
        if not isinstance(n, int) or n > _LONGEST_MATRIX:
            x = _filter_axis(x, kind, axis)
        else:
            x = jnp.einsum(product, jnp.asarray(_filter_matrix(kind, n), x.dtype), x, precision=exact)
    return x.reshape(*lead, *x.shape[1:])


def upsample(x: jax.Array) -> jax.Array:
    """[..., H, W, C] -> [..., 2H, 2W, C], filter [1, 3, 3, 1] x [1, 3, 3, 1] / 16, zeros outside."""
    return _apply_filter(x, "up")


def _lanczos_taps() -> tuple[float, ...]:
    """Weights of the six nearest samples for a place a quarter behind the third of them."""
    sinc = lambda t: math.sin(math.pi * t) / (math.pi * t)
    taps = [sinc(d) * sinc(d / 3.0) for d in (2.25, 1.25, 0.25, 0.75, 1.75, 2.75)]
    return tuple(t / sum(taps) for t in taps)


def enlarge(x: jax.Array) -> jax.Array:
    """[..., H, W, C] -> [..., 2H, 2W, C], by Lanczos interpolation over six samples; border pixels are repeated outside.

    For pictures, whose border would be dark beside zeros.
    """
    taps = _lanczos_taps()
    for axis in (x.ndim - 3, x.ndim - 2):
        n = x.shape[axis]
        pad = [(0, 0)] * x.ndim
        pad[axis] = (3, 3)
        wide = jnp.pad(x, pad, mode="edge")
        part = [jax.lax.slice_in_dim(wide, start, start + n, axis=axis) for start in range(7)]
        # Two samples of the result lie about each of the source, a quarter before it and a quarter behind it.
        odd = sum(t * y for t, y in zip(taps, part[1:], strict=True))
        even = sum(t * y for t, y in zip(taps, part[5::-1], strict=True))
        x = jnp.stack([jnp.asarray(even), jnp.asarray(odd)], axis=axis + 1)
        x = x.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 2 :])
    return x


def downsample(x: jax.Array) -> jax.Array:
    """[..., H, W, C] -> [..., H/2, W/2, C], filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64, zeros outside."""
    return _apply_filter(x, "down")


def blur(x: jax.Array) -> jax.Array:
    """[..., H, W, C] -> [..., H + 1, W + 1, C], filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64.

    The extra row and column serve a 3 x 3 convolution of stride two without padding.
    """
    return _apply_filter(x, "blur")


def image_pyramid(x: jax.Array, levels: int) -> list[jax.Array]:
    """[N, R, R, C] -> [x_0 .. x_(levels - 1)], by area averaging; each has half the side of the previous one."""
    images = [x]
    for _ in range(levels - 1):
        n, h, w, c = images[-1].shape
        images.append(images[-1].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4)))
    return images
