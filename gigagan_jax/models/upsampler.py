"""The GAN upsampler: an asymmetric U-Net on the base model's own levels (sec. 3.4).

The small image passes residual blocks down to the bottleneck and comes up through synthesis levels to the large one. Features
of equal resolution are added (CoModGAN). The network is convolutional: an input of any size gives an output so many times as
large.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import GeneratorConfig, UpsamplerConfig
from gigagan_jax.models.conditioning import Condition, Conditioned, Conditioner, ConditionSettings, Mapping
from gigagan_jax.models.generator import SynthesisLevel, channels_at
from gigagan_jax.models.layers.equalized import Conv, call_with_remat, leaky_relu
from gigagan_jax.models.layers.residual import ResidualBlock
from gigagan_jax.parallel.sharding import constrain

# Sines and cosines of so many frequencies tell the mapping network of the noise in the input.
_FREQUENCIES = 4


def embed_noise_level(level: jax.Array) -> jax.Array:
    """float32 [N, 8] of unit second moment, from the level of noise augmentation, [N] in [0, 1]."""
    frequencies = jnp.asarray([0.5 * math.pi * 2.0**k for k in range(_FREQUENCIES)], jnp.float32)
    angles = level.astype(jnp.float32)[:, None] * frequencies
    return math.sqrt(2.0) * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class EncoderBlock(ResidualBlock):
    """The residual block on maps whose rows may be shared between devices."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] -> [N, H', W', out]"""
        return constrain(super().__call__(x), "batch", "height", None, "channels")


class Encoder(nnx.Module):
    """The way down: features of the small image at each resolution from the input's to the bottleneck.

    Args:
      u: resolutions and blocks.
      g: channels.
    """

    def __init__(self, u: UpsamplerConfig, g: GeneratorConfig, *, remat: bool, dtype: Any, rngs: nnx.Rngs):
        self.remat, self.dtype = remat, dtype
        resolution = u.input_resolution
        features = channels_at(g, resolution)
        self.stem = Conv(3, features, kernel=3, axes=("rgb", "conv_out"), dtype=dtype, rngs=rngs)
        stages = []
        while resolution > u.bottleneck:
            below = channels_at(g, resolution // 2)
            same = [
                EncoderBlock(features, features, down=False, dtype=dtype, rngs=rngs)
                for _ in range(u.encoder_blocks - 1)
            ]
            stages.append(nnx.List([*same, EncoderBlock(features, below, down=True, dtype=dtype, rngs=rngs)]))
            resolution, features = resolution // 2, below
        self.stages = nnx.List(stages)

    def __call__(self, low: jax.Array) -> list[jax.Array]:
        """low [N, H, W, 3] -> features from the bottleneck's resolution up to the input's, [N, h, w, C] each"""
        x = leaky_relu(self.stem(low.astype(self.dtype)))
        features = []
        for blocks in self.stages:
            for block in list(blocks)[:-1]:
                x = call_with_remat(block, self.remat, x)
            features.append(x)
            x = call_with_remat(blocks[-1], self.remat, x)
        return [x, *features[::-1]]


class Upsampler(Conditioned):
    """(z, small image, caption) -> pyramid of large images (sec. 3.4).

    Args:
      u: the upsampler's settings.
      g: settings of the synthesis levels; tuples run from the bottleneck up.
      resolution: side of the output at the training size.
      condition: what it is conditioned on besides the small image.
      remat: recompute each block in the backward pass.
      dtype: of the computation.
      rngs: stream "params" draws the initial values.
    """

    def __init__(
        self,
        u: UpsamplerConfig,
        g: GeneratorConfig,
        resolution: int,
        condition: ConditionSettings,
        *,
        remat: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.skip_gain, self.image_skip = dtype, u.skip_gain, u.image_skip
        self.conditioner = Conditioner(condition, g.text, remat=remat, dtype=dtype, rngs=rngs)
        width = self.conditioner.width
        self.mapping = Mapping(g, width if condition.kind != "none" else 0, extra_width=2 * _FREQUENCIES, rngs=rngs)
        context_width = width if g.cross_attention and condition.kind == "text" else 0
        self.encoder = Encoder(u, g, remat=remat, dtype=dtype, rngs=rngs)
        # Profiles are summed by the levels' names, whatever the size of the input is.
        self.resolutions = tuple(u.bottleneck << i for i in range(len(g.blocks)))
        features = channels_at(g, u.bottleneck)
        levels = []
        for i, r in enumerate(self.resolutions):
            # Levels up to the input's size only make features where the image starts as the input.
            rgb = not u.image_skip or r > u.input_resolution
            # What starts as a picture is enlarged as pictures are.
            kind: dict[str, Any] = {"rgb": rgb, "sharp": u.image_skip, "remat": remat, "dtype": dtype, "rngs": rngs}
            levels.append(SynthesisLevel(g, i, u.bottleneck, features, context_width, **kind))
            features = channels_at(g, r)
        self.levels = nnx.List(levels)

    def map(self, z: jax.Array, condition: Condition, noise_level: jax.Array) -> jax.Array:
        """z [N, z_dim], noise_level [N] in [0, 1] -> w [N, w_dim] (eq. 3b)"""
        with jax.named_scope("mapping"):
            return self.mapping(z, condition.global_, embed_noise_level(noise_level))

    def synthesize(self, w: jax.Array, condition: Condition, low: jax.Array) -> list[jax.Array]:
        """w [N, w_dim], low float32 [N, H, W, 3] in [-1, 1] -> float32 images [N, H', W', 3], low to high"""
        with jax.named_scope("encoder"):
            skips = self.encoder(low)
        x = skips[0]
        image: jax.Array | None = None
        images: list[jax.Array] = []
        for i, (r, level) in enumerate(zip(self.resolutions, self.levels, strict=True)):
            with jax.named_scope(f"{r}px"):
                skip = self.skip_gain * skips[i] if 0 < i < len(skips) else None
                if self.image_skip and image is None and level.to_rgb is not None:
                    image = low.astype(jnp.float32)
                x, image = level(x, image, w, condition, skip)
            if level.to_rgb is not None:
                assert image is not None
                images.append(image)
        return images

    def __call__(
        self,
        z: jax.Array,
        low: jax.Array,
        noise_level: jax.Array,
        tokens: jax.Array | None = None,
        labels: jax.Array | None = None,
        features: jax.Array | None = None,
    ) -> tuple[list[jax.Array], jax.Array]:
        """From a small image to large ones.

        Args:
          z: [N, z_dim].
          low: float32 [N, H, W, 3] in [-1, 1], with its noise.
          noise_level: [N] in [0, 1], of the noise in `low`.
          tokens, labels, features: as `condition` takes them.

        Returns:
          (images low to high, w [N, w_dim])
        """
        with jax.named_scope("upsampler"):
            condition = self.condition(tokens, labels, features)
            w = self.map(z, condition, noise_level)
            return self.synthesize(w, condition, low), w


def grid_of(u: UpsamplerConfig, g: GeneratorConfig) -> int:
    """Pixels of the small image that its sides are multiples of: strides of the encoder, and windows of attention."""
    sizes = [u.input_resolution // u.bottleneck]
    for i, depth in enumerate(g.attention_depth):
        if depth and g.attention.window:
            sizes.append(g.attention.window * u.input_resolution // (u.bottleneck << i))
    # Powers of two: the largest is a multiple of the others.
    return max(sizes)


def context_radius(u: UpsamplerConfig, g: GeneratorConfig) -> int:
    """Pixels of the small image beyond a grid cell that the cell's output depends on, where all attention is in windows.

    A sum over layers from the output back to the input: a 3x3 convolution reaches one token further, a filter of two
    resolutions two of the finer ones, and attention to the borders of its window.
    """
    reach = 0.0
    places = [(1 << i) * u.bottleneck / u.input_resolution for i in range(len(g.blocks))]
    for i in reversed(range(len(g.blocks))):
        token = 1 / places[i]  # side of a token in pixels of the small image
        depth = g.attention_depth[i] * (g.blocks[i] if g.attention_placement == "every" else 1)
        window = g.attention.window * token
        convs = 2 * g.blocks[i]
        for _ in range(max(depth, 1)):
            if depth and window:
                # Windows are not left, and the cell itself is whole windows.
                reach = math.ceil(reach / window) * window
            # The convolutions lie between the attention layers, or before all of them.
            reach += token * convs / max(depth, 1)
        if i > 0:
            reach += 2 * token
    stride = u.input_resolution // u.bottleneck
    while stride > 1:
        stride //= 2
        # On the way down: two convolutions a block, and the filter before a stride of two.
        reach += stride * (2 * u.encoder_blocks + 2)
    return math.ceil(reach + 1)
