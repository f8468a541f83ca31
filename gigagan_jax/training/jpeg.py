"""JPEG's losses on the device: color, blocks of 8 x 8 cosines, and the quantisation of libjpeg; no file is written.

The entropy coding loses nothing and is left out. Equal to PIL's files within a fraction of a grey level, by
tests/training/test_degradations.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_EXACT = jax.lax.Precision.HIGHEST
# Annex K of ITU T.81, rows from the lowest vertical frequency down.
_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)
# High frequencies of color are all alike.
_CHROMINANCE = np.full((8, 8), 99, np.float32)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# JFIF: BT.601 over the full range; rows are Y, Cb and Cr.
_TO_YCBCR = np.array(
    [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]], np.float32
)
_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136286, -0.714136286], [1, 1.772, 0]], np.float32)


@functools.cache
def _cosines() -> np.ndarray:
    """float32 [8, 8]: the orthonormal cosine transform of eight samples."""
    k = np.arange(8)
    matrix = np.sqrt(2 / 8) * np.cos(np.pi * k[:, None] * (2 * k + 1) / 16)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


@functools.cache
def _triangle_matrix(n: int) -> np.ndarray:
    """float32 [2n, n]: libjpeg's upsampling of color, three quarters of the nearer sample and a quarter of the other."""
    matrix = np.zeros((2 * n, n), np.float32)
    for i in range(2 * n):
        matrix[i, i // 2] += 0.75
        matrix[i, np.clip(i // 2 + (1 if i % 2 else -1), 0, n - 1)] += 0.25
    return matrix


def quantization_tables(quality: jax.Array) -> jax.Array:
    """float32 [N] of 1 to 100 -> float32 [N, 2, 8, 8] of luminance and chrominance, by libjpeg's formula."""
    quality = jnp.round(quality).clip(1, 100)
    percent = jnp.where(quality < 50, jnp.floor(5000 / quality), 200 - 2 * quality)
    tables = jnp.stack([jnp.asarray(_LUMINANCE), jnp.asarray(_CHROMINANCE)])
    return jnp.floor((tables * percent[:, None, None, None] + 50) / 100).clip(1, 255)


def _quantize(x: jax.Array, tables: jax.Array) -> jax.Array:
    """Blocks through the quantisation: x [N, H, W, C] around 0, sides multiples of 8; tables [N, C, 8, 8] -> as x"""
    n, h, w, c = x.shape
    blocks = x.reshape(n, h // 8, 8, w // 8, 8, c)
    d = jnp.asarray(_cosines())
    # Products with 8 x 8 matrices: the transform of all blocks is one operation.
    found = jnp.einsum("ui,vj,nhiwjc->nhuwvc", d, d, blocks, precision=_EXACT)
    # Beside the frequencies of the blocks, [N, 1, 8, 1, 8, C].
    steps = tables.transpose(0, 2, 3, 1)[:, None, :, None]
    kept = jnp.round(found / steps) * steps
    return jnp.einsum("ui,vj,nhuwvc->nhiwjc", d, d, kept, precision=_EXACT).reshape(x.shape)


# libjpeg works on bytes between its steps: so do the roundings here.
def _as_bytes(x: jax.Array) -> jax.Array:
    return jnp.round(x).clip(0, 255)


def jpeg_compress(x: jax.Array, quality: jax.Array, subsample: jax.Array) -> jax.Array:
    """Images as they come back from JPEG files.

    Args:
      x: float32 [N, H, W, 3] in [-1, 1]; sides that are no multiples of 16 are filled up as libjpeg does
      quality: float32 [N], 1 to 100 as in libjpeg, rounded
      subsample: bool [N]; color at half the resolution (4:2:0), which is what most programs write

    Returns:
      float32 [N, H, W, 3] in [-1, 1], in steps of 2 / 255
    """
    n, h, w, _ = x.shape
    pixels = _as_bytes((x + 1) * 127.5)
    filled = jnp.pad(pixels, ((0, 0), (0, -h % 16), (0, -w % 16), (0, 0)), mode="edge")
    tables = quantization_tables(quality)
    # Around 0 from here on: for Y by JPEG's shift of 128, for color because the 128 is not added.
    ycbcr = jnp.round(jnp.einsum("kc,nhwc->nhwk", _TO_YCBCR, filled, precision=_EXACT)) - jnp.array((128.0, 0, 0))
    three = _quantize(ycbcr, tables[:, jnp.array((0, 1, 1))])

    # Both forms of the color are computed: images of a batch differ in which one they have.
    half = ycbcr[..., 1:].reshape(n, filled.shape[1] // 2, 2, filled.shape[2] // 2, 2, 2).mean((2, 4))
    half = _quantize(jnp.round(half), tables[:, jnp.array((1, 1))])
    rows, columns = (jnp.asarray(_triangle_matrix(s)) for s in half.shape[1:3])
    wide = jnp.einsum("oh,pw,nhwc->nopc", rows, columns, jnp.round(half).clip(-128, 127), precision=_EXACT)

    color = jnp.where(subsample[:, None, None, None], wide, three[..., 1:])
    whole = jnp.round(jnp.concatenate([three[..., :1], color], axis=-1)).clip(-128, 127) + jnp.array((128.0, 0, 0))
    rgb = _as_bytes(jnp.einsum("kc,nhwc->nhwk", _TO_RGB, whole, precision=_EXACT))
    return rgb[:, :h, :w] / 127.5 - 1
