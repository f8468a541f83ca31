"""LPIPS (Zhang et al., 2018), version 0.1: the distance of two images in the features of a VGG-16.

VGG-16 (Simonyan and Zisserman, 2015) in torchvision's layout, and the linear heads of the lpips package. They come in two
files and are two modules: load `Vgg` by `vgg_rows`, `Heads` by `head_rows`, and bind {"vgg": ..., "heads": ...} to `Lpips`;
or, from one file that holds both, `Lpips` by `rows`. Proved equal to torch in tests/models/pretrained/test_vgg.py.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gigagan_jax.models.layers.equalized import conv, param
from gigagan_jax.models.pretrained.weights import Row, hwio

# Width and number of convolutions between two pools; a tap is after the last ReLU of each: 1_2, 2_2, 3_3, 4_3, 5_3.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
SMALLEST = 16  # px: four pools
# Of images in [-1, 1].
SHIFT, SCALE = np.array((-0.030, -0.088, -0.188), np.float32), np.array((0.458, 0.448, 0.450), np.float32)


class Conv(nnx.Module):
    """3x3 convolution with zero padding, ReLU."""

    def __init__(self, channels: int, out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        # Whole on every device, as all of this network: 15 million parameters.
        self.weight = param(rngs, (3, 3, channels, out), (None,) * 4)
        self.bias = param(rngs, (out,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] -> [N, H, W, out]"""
        return jax.nn.relu(conv(x, self.weight[...].astype(self.dtype)) + self.bias[...].astype(self.dtype))


class Vgg(nnx.Module):
    """The convolutions of VGG-16.

    Args:
      dtype: of the computation.
    """

    def __init__(self, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        widths = [3, *(width for width, count in STAGES for _ in range(count))]
        self.convs = nnx.List([Conv(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """images [N, H, W, 3], (x - SHIFT) / SCALE of x in [-1, 1] -> five taps [N, H / 2^k, W / 2^k, C], k = 0..4"""
        x = images.astype(self.dtype)
        taps: list[jax.Array] = []
        convs = iter(self.convs)
        for _, count in STAGES:
            if taps:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for _ in range(count):
                x = next(convs)(x)
            taps.append(x)
        return taps


class Heads(nnx.Module):
    """One learned weight, not negative, a channel of each tap."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.weights = nnx.List([param(rngs, (width,), (None,)) for width, _ in STAGES])

    def __call__(self, a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
        """a, b [N, h, w, C] a tap -> float32 [N]: sum over taps of mean over h, w of sum over C of w (unit(a) - unit(b))^2"""
        total = jnp.zeros(a[0].shape[0], jnp.float32)
        for x, y, weight in zip(a, b, self.weights, strict=True):
            difference = jnp.square(unit(x) - unit(y)) * weight[...].astype(jnp.float32)
            total += difference.sum(-1).mean((1, 2))
        return total


def unit(x: jax.Array) -> jax.Array:
    """x / (|x| + 1e-10) along the last axis, in float32; its gradient is finite at zero too.

    x [..., C] -> float32 [..., C]
    """
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # Where all channels are off the root has no gradient: a NaN, unless a ReLU before it happens to drop it.
    some = squares > 0
    return x / (jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0) + 1e-10)


class Lpips(nnx.Module):
    """Perceptual distance of two images; 0 for equal ones.

    Args:
      dtype: of the convolutions; distances are float32.
    """

    def __init__(self, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.vgg = Vgg(dtype=dtype, rngs=rngs)
        self.heads = Heads(rngs=rngs)

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a, b float [N, H, W, 3] in [-1, 1], sides of 16 px or more -> float32 [N]"""
        if a.shape != b.shape or a.shape[3] != 3 or min(a.shape[1:3]) < SMALLEST:
            raise ValueError(f"images {a.shape} and {b.shape}: two batches of one shape, {SMALLEST} px or more")
        # Two passes, not one over both: nothing then goes backward through an image without a gradient.
        taps = [self.vgg((x.astype(jnp.float32) - SHIFT) / SCALE) for x in (a, b)]
        return self.heads(*taps)


# ---------------------------------------------------------------- the key tables


def _layers() -> list[int]:
    """Places of the convolutions in torchvision's `features`, where ReLUs and pools count too."""
    places: list[int] = []
    at = 0
    for _, count in STAGES:
        places += range(at, at + 2 * count, 2)
        at += 2 * count + 1
    return places


def vgg_rows(prefix: str = "") -> list[Row]:
    """Table of `Vgg`, from torchvision's vgg16; `prefix` is put before our paths."""
    table = []
    for i, layer in enumerate(_layers()):
        table.append(Row(f"{prefix}convs/{i}/weight", f"features.{layer}.weight", hwio))
        table.append(Row(f"{prefix}convs/{i}/bias", f"features.{layer}.bias"))
    return table


def head_rows(prefix: str = "") -> list[Row]:
    """Table of `Heads`, from the lpips package's weights/v0.1/vgg; `prefix` is put before our paths."""
    flat = lambda x: x.reshape(-1)
    return [Row(f"{prefix}weights/{k}", f"lin{k}.model.1.weight", flat) for k in range(len(STAGES))]


def rows() -> list[Row]:
    """Table of `Lpips`, from one file that holds the tensors of both."""
    return [*vgg_rows("vgg/"), *head_rows("heads/")]


def ignored(key: str) -> bool:
    """Tensors of VGG-16's classifier, by torchvision's names and timm's."""
    return key.startswith(("classifier.", "pre_logits.", "head."))
