"""Resampling by two: the [1, 3, 3, 1] filter of StyleGAN2, and area averaging for the pyramid of a real image.

Written as shifts and weighted sums, separably: no convolution, and gradients that are as cheap.
"""

import jax
import jax.numpy as jnp


def _shift(x: jax.Array, axis: int, by: int) -> jax.Array:
    """x moved by one along `axis`, zero at the border: by=1 gives x[i - 1], by=-1 gives x[i + 1]."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (1, 0) if by > 0 else (0, 1)
    n = x.shape[axis]
    return jax.lax.slice_in_dim(jnp.pad(x, pads), 0 if by > 0 else 1, n if by > 0 else n + 1, axis=axis)


def _upsample(x: jax.Array, axis: int) -> jax.Array:
    even = 0.25 * _shift(x, axis, 1) + 0.75 * x
    odd = 0.75 * x + 0.25 * _shift(x, axis, -1)
    shape = list(x.shape)
    shape[axis] *= 2
    return jnp.stack([even, odd], axis=axis + 1).reshape(shape)


def _downsample(x: jax.Array, axis: int) -> jax.Array:
    n = x.shape[axis]
    pairs = x.reshape(*x.shape[:axis], n // 2, 2, *x.shape[axis + 1 :])
    even, odd = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return 0.125 * (_shift(odd, axis, 1) + _shift(even, axis, -1)) + 0.375 * (even + odd)


def blur(x: jax.Array) -> jax.Array:
    """[..., H, W, C] -> [..., H + 1, W + 1, C], filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64: before a 3 x 3 convolution of stride two."""
    for axis in (x.ndim - 3, x.ndim - 2):
        n = x.shape[axis]
        pads = [(0, 0)] * x.ndim
        pads[axis] = (2, 2)
        padded = jnp.pad(x, pads)
        tap = [jax.lax.slice_in_dim(padded, i, i + n + 1, axis=axis) for i in range(4)]
        x = 0.125 * (tap[0] + tap[3]) + 0.375 * (tap[1] + tap[2])
    return x


def upsample(x: jax.Array) -> jax.Array:
    """[..., H, W, C] -> [..., 2H, 2W, C], filter [1, 3, 3, 1] x [1, 3, 3, 1], zeros outside."""
    return _upsample(_upsample(x, x.ndim - 3), x.ndim - 2)


def downsample(x: jax.Array) -> jax.Array:
    """[..., H, W, C] -> [..., H/2, W/2, C], filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64, zeros outside."""
    return _downsample(_downsample(x, x.ndim - 3), x.ndim - 2)


def pyramid(x: jax.Array, levels: int) -> list[jax.Array]:
    """[N, R, R, C] -> [x_0 .. x_(levels - 1)], each half the side of the one before, by area averaging."""
    out = [x]
    for _ in range(levels - 1):
        n, h, w, c = out[-1].shape
        out.append(out[-1].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4)))
    return out
