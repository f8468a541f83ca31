"""LPIPS (Zhang et al., 2018), version 0.1: the distance between two images in the features of a VGG-16.

VGG-16 (Simonyan and Zisserman, 2015) has torchvision's layout, and the linear heads are those of the lpips package.
They come in two files and are two modules. Load `Vgg` by `vgg_rows` and `LpipsHeads` by `head_rows`, and bind {"vgg":
..., "heads": ...} to `Lpips`. From one file with both, load `Lpips` by `lpips_rows`. Equal to torch, by
tests/models/pretrained/test_vgg.py.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gigagan_jax.models.layers.equalized import conv, declare_parameter, materialize
from gigagan_jax.models.pretrained.weights import Row, conv_to_hwio

# Width and number of convolutions between two pools.
# A tap follows the last ReLU of each stage: 1_2, 2_2, 3_3, 4_3, 5_3.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
# Pixels: four pools halve the sides four times.
MIN_SIDE = 16
# Constants of the lpips package for images in [-1, 1]: ImageNet's mean and deviation in that range.
SHIFT, SCALE = np.array((-0.030, -0.088, -0.188), np.float32), np.array((0.458, 0.448, 0.450), np.float32)


class Conv(nnx.Module):
    """3 x 3 convolution with zero padding, then ReLU."""

    def __init__(self, channels: int, out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        # Only the widest are cut, by the axis of input channels: their outputs divide over any mesh.
        cut = "conv_in" if out == STAGES[-1][0] else None
        self.weight = declare_parameter(rngs, (3, 3, channels, out), (None, None, None, cut))
        self.bias = declare_parameter(rngs, (out,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] -> [N, H, W, out]"""
        return jax.nn.relu(conv(x, materialize(self.weight, self.dtype)) + self.bias[...].astype(self.dtype))


class Vgg(nnx.Module):
    """The convolutions of VGG-16.

    Args:
      dtype: precision of the computation.
    """

    def __init__(self, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        widths = [3, *(width for width, count in STAGES for _ in range(count))]
        self.convs = nnx.List([Conv(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """images [N, H, W, 3], (x - SHIFT) / SCALE of x in [-1, 1] -> five taps [N, H / 2^k, W / 2^k, C], k = 0..4"""
        # No bound on the size: five taps of any map of MIN_SIDE or more.
        x = images.astype(self.dtype)
        taps: list[jax.Array] = []
        convs = iter(self.convs)
        for _, count in STAGES:
            # A pool stands between two stages, not before the first.
            if taps:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for _ in range(count):
                x = next(convs)(x)
            taps.append(x)
        return taps


class LpipsHeads(nnx.Module):
    """One learned, non-negative weight for each channel of each tap."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.weights = nnx.List([declare_parameter(rngs, (width,), (None,)) for width, _ in STAGES])

    def __call__(self, a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
        """a, b [N, h, w, C] of each tap -> float32 [N]"""
        return tap_distance(a, b, [weight[...] for weight in self.weights])


def normalize_channels(x: jax.Array) -> jax.Array:
    """x / (|x| + 1e-10) along the last axis, in float32; its gradient is finite at zero too.

    x [..., C] -> float32 [..., C]
    """
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # At zero the root has an infinite gradient, and its product with 0 is NaN. The inner where keeps it finite.
    nonzero = squares > 0
    return x / (jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, squares, 1.0)), 0.0) + 1e-10)


def tap_distance(
    a: Sequence[jax.Array], b: Sequence[jax.Array], weights: Sequence[jax.Array] | None = None
) -> jax.Array:
    """The sum over taps of the mean over h and w of sum_C weight (normalize(a) - normalize(b))^2.

    a, b [N, h, w, C] of each tap; weights [C] of each tap, None for ones -> float32 [N]
    """
    total = jnp.zeros(a[0].shape[0], jnp.float32)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        difference = jnp.square(normalize_channels(x) - normalize_channels(y))
        if weights is not None:
            difference *= weights[i].astype(jnp.float32)
        # Each tap counts alike, whatever its size, by the mean over its map.
        total += difference.sum(-1).mean((1, 2))
    return total


def check_pair(a: jax.Array, b: jax.Array) -> None:
    """Raises ValueError for batches whose images cannot be compared."""
    if a.shape != b.shape or a.shape[3] != 3 or min(a.shape[1:3]) < MIN_SIDE:
        raise ValueError(f"images {a.shape} and {b.shape}: two batches of one shape, {MIN_SIDE} px or more")


class Lpips(nnx.Module):
    """Perceptual distance of two images; 0 for equal ones.

    Args:
      dtype: precision of the convolutions; distances are float32.
    """

    def __init__(self, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.vgg = Vgg(dtype=dtype, rngs=rngs)
        self.heads = LpipsHeads(rngs=rngs)

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a, b float [N, H, W, 3] in [-1, 1], sides of 16 px or more -> float32 [N]"""
        check_pair(a, b)
        # Two passes instead of one over both images: an image without a gradient then has no backward pass.
        taps = [self.vgg((x.astype(jnp.float32) - SHIFT) / SCALE) for x in (a, b)]
        return self.heads(*taps)


# ---------------------------------------------------------------- the key tables


def _conv_indices() -> list[int]:
    """Indices of the convolutions in torchvision's `features`, where ReLUs and pools count too."""
    places: list[int] = []
    at = 0
    for _, count in STAGES:
        places += range(at, at + 2 * count, 2)
        # A convolution and a ReLU each, then one pool.
        at += 2 * count + 1
    return places


def vgg_rows(prefix: str = "") -> list[Row]:
    """Table of `Vgg`, from torchvision's vgg16; `prefix` is put before our paths."""
    table = []
    for i, layer in enumerate(_conv_indices()):
        table.append(Row(f"{prefix}convs/{i}/weight", f"features.{layer}.weight", conv_to_hwio))
        table.append(Row(f"{prefix}convs/{i}/bias", f"features.{layer}.bias"))
    return table


def head_rows(prefix: str = "") -> list[Row]:
    """Table of `LpipsHeads`, from the lpips package's weights/v0.1/vgg; `prefix` is put before our paths."""
    # The heads are 1 x 1 convolutions in the file, [1, C, 1, 1].
    flat = lambda x: x.reshape(-1)
    return [Row(f"{prefix}weights/{k}", f"lin{k}.model.1.weight", flat) for k in range(len(STAGES))]


def lpips_rows() -> list[Row]:
    """Table of `Lpips`, from one file that holds the tensors of both."""
    return [*vgg_rows("vgg/"), *head_rows("heads/")]


def is_ignored(key: str) -> bool:
    """Tensors of VGG-16's classifier, by torchvision's names and timm's."""
    return key.startswith(("classifier.", "pre_logits.", "head."))
