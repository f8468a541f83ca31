"""Inception-v3 (Szegedy et al., 2016), for the Frechet Inception distance of its features (Heusel et al., 2017).

One network in the layout of torchvision's Inception3, in two variants:

- "fid": the TensorFlow graph of 2015-12-05, with the weights of pytorch-fid's `pt_inception-2015-12-05`;
- "torchvision": torchvision's inception_v3 with its pretrained weights.

Both read the same names of tensors. Equal to a torch definition, by tests/models/pretrained/test_inception.py.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.layers.equalized import LAYOUT, declare_parameter
from gigagan_jax.models.pretrained.transformer import Dense
from gigagan_jax.models.pretrained.vit import IMAGENET
from gigagan_jax.models.pretrained.weights import Row, conv_to_hwio, transpose_linear

# Side of the input in pixels, and channels of the pooled features.
SIZE = 299
FEATURES = 2048
# Of every batch norm; torch's default would be 1e-5.
EPS = 1e-3
# Mean and standard deviation of RGB values in 0..1, for "torchvision".
MEAN, STD = (np.array(v, np.float32) for v in IMAGENET)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Differences between the two networks.

    classes: number of logits
    count_padding: whether average pools count the zeros around the map
    last_pool: kind of the pool branch of Mixed_7c
    imagenet: whether images come normalised by MEAN and STD. Then they are mapped back to [-1, 1] first, which is
      `transform_input` of torchvision's pretrained weights
    """

    classes: int
    count_padding: bool
    last_pool: str
    imagenet: bool


# The TensorFlow graph has 1008 classes, averages without padding, and a max pool in the last block.
VARIANTS = {
    "fid": Variant(classes=1008, count_padding=False, last_pool="max", imagenet=False),
    "torchvision": Variant(classes=1000, count_padding=True, last_pool="average", imagenet=True),
}


def _find_variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise UserError(f"Inception variant {name!r} is unknown; known: {', '.join(VARIANTS)}")
    return VARIANTS[name]


# ---------------------------------------------------------------- the architecture, as data


@dataclasses.dataclass(frozen=True)
class Unit:
    """One convolution: name in the file, output channels, kernel (height, width), stride, size-keeping padding."""

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


# A branch is a chain of units, pools by name, and forks (units side by side).
# The pool "shrink" halves the map; "last" is the variant's `last_pool`.
Step = Unit | str | tuple[Unit, ...]
Branches = tuple[tuple[Step, ...], ...]


# The letters are those of torchvision's classes InceptionA, InceptionC and InceptionE.
def _inception_a(pool: int) -> Branches:
    return (
        (Unit("branch1x1", 64),),
        (Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5))),
        (Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, (3, 3)), Unit("branch3x3dbl_3", 96, (3, 3))),
        ("average", Unit("branch_pool", pool)),
    )


def _inception_c(width: int) -> Branches:
    return (
        (Unit("branch1x1", 192),),
        (Unit("branch7x7_1", width), Unit("branch7x7_2", width, (1, 7)), Unit("branch7x7_3", 192, (7, 1))),
        (
            Unit("branch7x7dbl_1", width),
            Unit("branch7x7dbl_2", width, (7, 1)),
            Unit("branch7x7dbl_3", width, (1, 7)),
            Unit("branch7x7dbl_4", width, (7, 1)),
            Unit("branch7x7dbl_5", 192, (1, 7)),
        ),
        ("average", Unit("branch_pool", 192)),
    )


def _inception_e(pool: str) -> Branches:
    fork = lambda name, a, b: (Unit(f"{name}{a}", 384, (1, 3)), Unit(f"{name}{b}", 384, (3, 1)))
    return (
        (Unit("branch1x1", 320),),
        (Unit("branch3x3_1", 384), fork("branch3x3_", "2a", "2b")),
        (Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_", "3a", "3b")),
        (pool, Unit("branch_pool", 192)),
    )


BLOCKS: dict[str, Branches] = {
    "stem": (
        (
            Unit("Conv2d_1a_3x3", 32, (3, 3), stride=2, padded=False),
            Unit("Conv2d_2a_3x3", 32, (3, 3), padded=False),
            Unit("Conv2d_2b_3x3", 64, (3, 3)),
            "shrink",
            Unit("Conv2d_3b_1x1", 80),
            Unit("Conv2d_4a_3x3", 192, (3, 3), padded=False),
            "shrink",
        ),
    ),
    "Mixed_5b": _inception_a(32),
    "Mixed_5c": _inception_a(64),
    "Mixed_5d": _inception_a(64),
    "Mixed_6a": (
        (Unit("branch3x3", 384, (3, 3), stride=2, padded=False),),
        (
            Unit("branch3x3dbl_1", 64),
            Unit("branch3x3dbl_2", 96, (3, 3)),
            Unit("branch3x3dbl_3", 96, (3, 3), stride=2, padded=False),
        ),
        ("shrink",),
    ),
    "Mixed_6b": _inception_c(128),
    "Mixed_6c": _inception_c(160),
    "Mixed_6d": _inception_c(160),
    "Mixed_6e": _inception_c(192),
    "Mixed_7a": (
        (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), stride=2, padded=False)),
        (
            Unit("branch7x7x3_1", 192),
            Unit("branch7x7x3_2", 192, (1, 7)),
            Unit("branch7x7x3_3", 192, (7, 1)),
            Unit("branch7x7x3_4", 192, (3, 3), stride=2, padded=False),
        ),
        ("shrink",),
    ),
    "Mixed_7b": _inception_e("average"),
    "Mixed_7c": _inception_e("last"),
}


def _block_units(block: str, channels: int) -> tuple[list[tuple[Unit, int]], int]:
    """([(unit, its input channels)], output channels) of a block with `channels` input channels."""
    found: list[tuple[Unit, int]] = []
    total = 0
    for branch in BLOCKS[block]:
        width = channels
        for step in branch:
            if not isinstance(step, str):
                fork = step if isinstance(step, tuple) else (step,)
                found += [(unit, width) for unit in fork]
                width = sum(unit.out for unit in fork)
        total += width
    return found, total


# ---------------------------------------------------------------- the network


class ConvNormRelu(nnx.Module):
    """Convolution, batch norm by its running statistics, ReLU."""

    def __init__(self, unit: Unit, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        self.stride, self.padding, self.dtype = unit.stride, "SAME" if unit.padded else "VALID", dtype
        # Replicated: 24 million parameters are few, and widths such as 48, 80 and 1008 divide over few meshes.
        vector = lambda: declare_parameter(rngs, (unit.out,), (None,))
        self.weight = declare_parameter(rngs, (*unit.kernel, channels, unit.out), (None,) * 4)
        self.gain, self.bias, self.mean, self.variance = vector(), vector(), vector(), vector()

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] -> [N, H', W', out]"""
        gain, bias, mean, variance, weight = (
            p[...].astype(jnp.float32) for p in (self.gain, self.bias, self.mean, self.variance, self.weight)
        )
        # The batch norm is folded into the weights in float32: one product, and no rounding between the two.
        scale = gain * jax.lax.rsqrt(variance + EPS)
        weight = (weight * scale).astype(self.dtype)
        y = jax.lax.conv_general_dilated(x, weight, (self.stride,) * 2, self.padding, dimension_numbers=LAYOUT)
        return jax.nn.relu(y + (bias - mean * scale).astype(self.dtype))


def _apply_pool(x: jax.Array, kind: str, count_padding: bool) -> jax.Array:
    if kind == "shrink":
        return nnx.max_pool(x, (3, 3), strides=(2, 2))
    if kind == "max":
        return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")
    # Sums are float32. The divisor is nine or, without padding, the number of samples inside the map.
    add = lambda y: jax.lax.reduce_window(y, np.float32(0), jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    count = np.float32(9) if count_padding else add(jnp.ones((1, *x.shape[1:3], 1), jnp.float32))
    return (add(x.astype(jnp.float32)) / count).astype(x.dtype)


class InceptionBlock(nnx.Module):
    """Branches over one input, joined along the channels.

    Args:
      name: key of BLOCKS.
      channels: input channels.
      variant: name in VARIANTS.
    """

    def __init__(self, name: str, channels: int, variant: str, *, dtype: Any, rngs: nnx.Rngs):
        self.name, self.variant = name, variant
        for unit, width in _block_units(name, channels)[0]:
            # Attributes have the names of the file, which are the paths of the key table.
            setattr(self, unit.name, ConvNormRelu(unit, width, dtype=dtype, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] -> [N, H', W', out]"""
        return jnp.concatenate([self._apply_branch(x, branch) for branch in BLOCKS[self.name]], axis=-1)

    def _apply_branch(self, x: jax.Array, branch: tuple[Step, ...]) -> jax.Array:
        v = VARIANTS[self.variant]
        for step in branch:
            if isinstance(step, str):
                x = _apply_pool(x, v.last_pool if step == "last" else step, v.count_padding)
            else:
                fork = step if isinstance(step, tuple) else (step,)
                x = jnp.concatenate([getattr(self, unit.name)(x) for unit in fork], axis=-1)
        return x


class InceptionOutput(NamedTuple):
    """Outputs of the network, in float32.

    pool3: [N, 2048] features averaged over the last map, for the Frechet distance
    logits: [N, classes]
    """

    pool3: jax.Array
    logits: jax.Array


class Inception(nnx.Module):
    """Inception-v3 without its auxiliary classifier.

    Args:
      variant: "fid" or "torchvision".
      dtype: precision of the computation. In float32, products run in full precision on every device, for the metrics.

    Raises:
      UserError: the variant is unknown.
    """

    def __init__(self, variant: str, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        v = _find_variant(variant)
        self.variant, self.dtype = variant, dtype
        # RGB; each block determines the input channels of the next.
        channels = 3
        for name in BLOCKS:
            setattr(self, name, InceptionBlock(name, channels, variant, dtype=dtype, rngs=rngs))
            channels = _block_units(name, channels)[1]
        assert channels == FEATURES
        self.fc = Dense(FEATURES, v.classes, axes=(None, None), dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> InceptionOutput:
        """images float [N, 299, 299, 3] as `preprocess` makes them -> InceptionOutput"""
        if images.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"images {images.shape}: this network sees {SIZE} px")
        x = images.astype(jnp.float32)
        if VARIANTS[self.variant].imagenet:
            # Back to [-1, 1], which the weights expect (`transform_input`).
            x = x * (2 * STD) + (2 * MEAN - 1)
        x = x.astype(self.dtype)
        # A TPU multiplies float32 in bfloat16 by default, which shifts the Frechet distance.
        with jax.default_matmul_precision("highest"):
            for name in BLOCKS:
                x = getattr(self, name)(x)
            pool3 = x.astype(jnp.float32).mean((1, 2))
            return InceptionOutput(pool3, self.fc(pool3).astype(jnp.float32))


# ---------------------------------------------------------------- its input


def preprocess(images: jax.Array, variant: str, *, tf1: bool = False) -> jax.Array:
    """Images in the form that a variant was trained on; differentiable.

    "fid": bilinear as in pytorch-fid, with half-pixel centres and without antialiasing. Shrinking aliases, and
    published numbers depend on it. Values stay in [-1, 1]. With `tf1`, the input stage of the graph of 2015:
    TensorFlow 1's bilinear reads at `i * scale` without the half-pixel offset, and values u in 0..255 become (u -
    128) / 128. Distances of the two ways are not comparable; for images of 299 px only the range differs.

    "torchvision": bilinear with antialiasing, as in torchvision's transform, then normalised by MEAN and STD.

    Args:
      images: float [N, H, W, 3] in [-1, 1], of any size
      variant: name in VARIANTS
      tf1: with "fid" only

    Returns:
      float32 [N, 299, 299, 3]

    Raises:
      UserError: the variant is unknown.
    """
    x = images.astype(jnp.float32)
    if _find_variant(variant).imagenet:
        if tf1:
            raise ValueError("tf1 is a way to resize for the variant fid")
        x = jax.image.resize(x, (x.shape[0], SIZE, SIZE, x.shape[3]), "linear", antialias=True)
        # MEAN and STD are for 0..1, images are in [-1, 1].
        return (x - (2 * MEAN - 1)) / (2 * STD)
    if x.shape[1:3] != (SIZE, SIZE):
        vertical, horizontal = (_bilinear_matrix(n, tf1) for n in x.shape[1:3])
        # A TPU would multiply float32 in bfloat16, which is too coarse for a metric.
        exact = jax.lax.Precision.HIGHEST
        x = jnp.einsum("oh,nhwc->nowc", vertical, x, precision=exact)
        x = jnp.einsum("ow,nhwc->nhoc", horizontal, x, precision=exact)
    # 127.5 x + 127.5 is u; minus 128, over 128.
    return (x * 127.5 - 0.5) / 128 if tf1 else x


@functools.cache
def _bilinear_matrix(n: int, tf1: bool) -> np.ndarray:
    """[299, n] weights of a bilinear resize of n samples, two in a row."""
    # Positions are rounded to float32 where the references round them: TensorFlow after the product,
    # torch after product and sum, which it fuses. In large images the rounding changes results.
    f = np.float32
    rows = np.arange(SIZE)
    # The quotient is rounded to float32 first, as in both references.
    scale = float(f(n) / f(SIZE))
    at = (rows * scale if tf1 else np.maximum((rows + 0.5) * scale - 0.5, 0)).astype(f)
    low = np.minimum(at.astype(np.int64), n - 1)
    share = at - low.astype(f)
    m = np.zeros((SIZE, n), f)
    # Below the last sample both neighbours are the same one, hence the additions.
    m[rows, low] += f(1) - share
    m[rows, np.minimum(low + 1, n - 1)] += share
    return m


# ---------------------------------------------------------------- the key table

# Attribute of ConvNormRelu -> name of torch's BatchNorm2d.
_NORM_KEYS = {"gain": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def inception_rows() -> list[Row]:
    """Key table of the network, the same for both variants."""
    table = [Row("fc/weight", "fc.weight", transpose_linear), Row("fc/bias", "fc.bias")]
    for block in BLOCKS:
        # The convolutions of the stem are at the top level of the file.
        prefix = "" if block == "stem" else f"{block}."
        for unit, _ in _block_units(block, 0)[0]:
            path, key = f"{block}/{unit.name}", f"{prefix}{unit.name}"
            table.append(Row(f"{path}/weight", f"{key}.conv.weight", conv_to_hwio))
            table += [Row(f"{path}/{a}", f"{key}.bn.{b}") for a, b in _NORM_KEYS.items()]
    return table


def is_ignored(key: str) -> bool:
    """Whether inference does not use a tensor: those of the auxiliary classifier, and counters of batches."""
    return key.startswith("AuxLogits.") or key.endswith(".num_batches_tracked")
