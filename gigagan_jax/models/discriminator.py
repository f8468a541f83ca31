"""The discriminator: multi-scale input and output, one shared trunk, heads that read the caption (sec. 3.3, Fig. 5).

Pyramid level i enters the trunk at its own resolution and leaves through every later exit j, which gives L (L + 1) / 2
predictions. Levels that share a stage run as one batch. Arrays are [N, P, H, W, C]: N is the (sharded) batch and P counts
copies that belong to the same example (levels x sources), so that joining them moves nothing between devices.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import DiscriminatorConfig
from gigagan_jax.models.conditioning import Conditioner, ConditionSettings
from gigagan_jax.models.layers.adaptive_conv import modulated_head
from gigagan_jax.models.layers.attention import FeedForward, SelfAttention
from gigagan_jax.models.layers.equalized import (
    Conv,
    Linear,
    ScannedLayers,
    call_with_remat,
    choose_precision,
    leaky_relu,
    mark_as_attention,
    normalize,
)
from gigagan_jax.models.layers.residual import ResidualBlock
from gigagan_jax.parallel.sharding import constrain


def channels_at(d: DiscriminatorConfig, resolution: int) -> int:
    """Channels of the trunk at `resolution` (A2: min(base / resolution, max))."""
    return min(d.channel_base // resolution, d.channel_max)


class Pair(NamedTuple):
    """One prediction: entry `level` (0 is the output image), `exit` (the last is L - 1)."""

    level: int
    exit: int


def entry_levels(d: DiscriminatorConfig) -> tuple[int, ...]:
    """Pyramid levels that the discriminator sees, high to low; level 0 is the output image."""
    return tuple(range(d.input_levels or len(d.blocks))) if d.multi_scale_input else (0,)


def prediction_pairs(d: DiscriminatorConfig) -> tuple[Pair, ...]:
    """All predictions in the order in which the discriminator returns them; 15 for five levels (sec. 3.3)."""
    levels = len(d.blocks)
    first_exit = levels - (d.output_levels or levels) if d.multi_scale_output else levels - 1
    exits = range(first_exit, levels)
    return tuple(Pair(i, j) for j in exits for i in entry_levels(d) if i <= j)


class Logits(NamedTuple):
    """What D says about the images of one source: for each of `prediction_pairs` float32 [N, h * w].

    own: with the image's own caption, or without a condition
    wrong: with a wrong caption; empty where none was given
    """

    own: list[jax.Array]
    wrong: list[jax.Array]


def _merge_copies(x: jax.Array) -> jax.Array:
    """[N, P, ...] -> [N * P, ...]"""
    return x.reshape(-1, *x.shape[2:])


class TrunkBlock(ResidualBlock):
    """The residual block on copies of examples, which are a batch to it."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, H, W, in] -> [N, P, H', W', out]"""
        y = super().__call__(_merge_copies(x))
        return constrain(y.reshape(*x.shape[:2], *y.shape[1:]), "batch", None, None, None, "channels")


class AttentionLayer(nnx.Module):
    """Squared-distance self-attention and feed-forward, x + gain * f(x)."""

    def __init__(self, d: DiscriminatorConfig, features: int, *, dtype: Any, rngs: nnx.Rngs):
        self.gain = d.attention_gain
        self.attention = SelfAttention(features, d.attention, dtype=dtype, rngs=rngs)
        a = d.attention
        self.feed_forward = FeedForward(features, a.mlp_ratio, a.norm, dtype=dtype, rngs=rngs) if d.mlp else None
        mark_as_attention(self)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, H, W, C] -> the same shape"""
        n, p, h, w, c = x.shape
        # Copies are a batch to attention: no token sees another copy.
        y = x.reshape(n * p, h * w, c)
        y += self.gain * self.attention(y)
        if self.feed_forward is not None:
            y += self.gain * self.feed_forward(y)
        return constrain(y.reshape(x.shape), "batch", None, None, None, "channels")


class Epilogue(nnx.Module):
    """The last stage: 4 x 4 to one vector, with the deviation over groups of images where it is switched on."""

    def __init__(self, d: DiscriminatorConfig, features: int, *, dtype: Any, rngs: nnx.Rngs):
        self.group = d.minibatch_std
        self.conv = Conv(features, features, kernel=3, dtype=dtype, rngs=rngs)
        # A convolution of its own for the deviation channel: features + 1 would not divide over a mesh. Equalized, it has
        # the scale that one convolution of all channels would give it.
        fan_in = features + 1 if d.minibatch_std_equalized else 1
        stat = lambda: Conv(
            1, features, kernel=3, fan_in=fan_in, bias=False, axes=(None, "conv_out"), dtype=dtype, rngs=rngs
        )
        self.conv_std = stat() if self.group else None
        self.dense = Linear(16 * features, features, axes=("conv_in", "conv_out"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, 4, 4, C] -> [N, P, 1, 1, C]"""
        n, p = x.shape[:2]
        # Linear in the input: the deviation's part is added before the activation.
        y = self.conv(_merge_copies(x))
        if self.conv_std is not None:
            # Within a group of examples, for each copy: levels and sources never mix.
            deviation = minibatch_std(x, self.group).astype(x.dtype)
            y += self.conv_std(
                jnp.broadcast_to(deviation[..., None, None, None], (n, p, 4, 4, 1)).reshape(n * p, 4, 4, 1)
            )
        # 4 x 4 positions become one vector: the last prediction judges the whole image.
        y = leaky_relu(self.dense(leaky_relu(y).reshape(n * p, -1)))
        return y.reshape(n, p, 1, 1, -1)


def minibatch_std(x: jax.Array, group: int) -> jax.Array:
    """Mean deviation within groups of `group` consecutive examples, for each copy by itself (ProGAN, sec. 3).

    x [N, P, H, W, C] -> float32 [N, P]
    """
    n, p = x.shape[:2]
    y = x.astype(jnp.float32).reshape(n // group, group, p, -1)
    # The epsilon keeps the root's gradient finite where all images of a group are equal.
    deviation = jnp.sqrt(jnp.var(y, axis=1) + 1e-8).mean(-1)
    return jnp.repeat(deviation, group, axis=0)


class ModulatedHead(nnx.Module):
    """psi_j(phi, t_D) + Conv1x1(phi) (eq. 7): a conditional and an unconditional prediction, added.

    Args:
      d: width and depth of psi.
      features: channels of phi.
      condition_width: features of t_D; 0 without a condition.
    """

    def __init__(self, d: DiscriminatorConfig, features: int, condition_width: int, *, dtype: Any, rngs: nnx.Rngs):
        # Float32, as the last layer of psi: logits are never rounded to the computation's type.
        self.unconditional = Conv(features, 1, kernel=1, axes=("conv_in", None), rngs=rngs)
        depth = d.head_depth if condition_width else 0
        kind: dict[str, Any] = {"w_dim": condition_width, "kernel": 1, "dtype": dtype, "rngs": rngs}
        self.layers = modulated_head(features, d.head_width, depth, **kind)

    def __call__(self, x: jax.Array, t: jax.Array | None) -> jax.Array:
        """x [N, P, h, w, C], t [N, M, D] -> float32 logits [N, P, M, h * w]; M = 1 without a condition"""
        n, p, h, w, c = x.shape
        logits = self.unconditional(_merge_copies(x)).reshape(n, p, 1, h * w)
        if t is None:
            return logits
        m = t.shape[1]
        # One caption an example and copy-independent: rows (n, m), "pixels" (p, h, w).
        y = jnp.broadcast_to(x.reshape(n, 1, p * h * w, 1, c), (n, m, p * h * w, 1, c)).reshape(n * m, p * h * w, 1, c)
        for layer in self.layers:
            y = layer(y, t.reshape(n * m, -1))
        return logits + y.reshape(n, m, p, h * w).swapaxes(1, 2)


class ProjectionHead(nnx.Module):
    """Projection discriminator: <embedding(c), phi> / sqrt(C) + Conv1x1(phi) (Miyato and Koyama, 2018); in float32."""

    def __init__(self, d: DiscriminatorConfig, features: int, condition_width: int, *, dtype: Any, rngs: nnx.Rngs):
        # `dtype` is that of phi. Every product here gives logits, which are never rounded to it.
        self.unconditional = Conv(features, 1, kernel=1, axes=("conv_in", None), rngs=rngs)
        self.embed = Linear(condition_width, features, axes=("embed", None), bias=None, rngs=rngs)
        self.scale = 1.0 / math.sqrt(features)

    def __call__(self, x: jax.Array, t: jax.Array | None) -> jax.Array:
        """x [N, P, h, w, C], t [N, M, D] -> float32 logits [N, P, M, h * w]"""
        if t is None:
            raise ValueError("a projection head needs a condition")
        n, p, h, w, _ = x.shape
        x = x.astype(jnp.float32)
        logits = self.unconditional(_merge_copies(x)).reshape(n, p, 1, h * w)
        exact = choose_precision(x.dtype)
        by_class = jnp.einsum("nphwc,nmc->npmhw", x, self.embed(t) * self.scale, precision=exact)
        return logits + by_class.reshape(n, p, -1, h * w)


class DiscriminatorLevel(nnx.Module):
    """One resolution of the trunk: fromRGB, phi (blocks, attention, the way down), and the head (Fig. 5).

    Args:
      d: the discriminator's settings.
      index: of the level; 0 is the output image, the last is 4 px and ends in the epilogue.
      condition_width: features of t_D; 0 without a condition.
      remat: recompute each block in the backward pass.
      dtype: of the computation, float32 up to `d.float32_resolution`; fromRGB and logits are float32 in any.
    """

    def __init__(
        self, d: DiscriminatorConfig, index: int, condition_width: int, *, remat: bool, dtype: Any, rngs: nnx.Rngs
    ):
        last = len(d.blocks) - 1
        resolution = 4 << (last - index)
        features = channels_at(d, resolution)
        below = features if index == last else channels_at(d, resolution // 2)
        same, depth = d.blocks[index] - 1, d.attention_depth[index]
        if resolution <= d.float32_resolution:
            dtype = jnp.float32
        self.remat, self.dtype = remat, dtype
        # Float32: G learns from differences between images that are smaller than bfloat16's steps.
        entry = lambda: Conv(3, features, kernel=1, axes=("rgb", "conv_out"), rngs=rngs)
        self.entry = entry() if index in entry_levels(d) else None
        gain = d.residual_gain
        block = lambda: TrunkBlock(features, features, down=False, gain=gain, dtype=dtype, rngs=rngs)
        self.blocks = ScannedLayers(block, same, remat=remat, rngs=rngs) if same else None
        layer = lambda: AttentionLayer(d, features, dtype=dtype, rngs=rngs)
        self.attention = ScannedLayers(layer, depth, remat=remat, rngs=rngs) if depth else None
        self.down: nnx.Module
        if index == last:
            self.down = Epilogue(d, features, dtype=dtype, rngs=rngs)
        else:
            self.down = TrunkBlock(features, below, down=True, gain=gain, dtype=dtype, rngs=rngs)
        head = ModulatedHead if d.head == "modulated" else ProjectionHead
        is_exit = index in {pair.exit for pair in prediction_pairs(d)}
        self.head = head(d, below, condition_width, dtype=dtype, rngs=rngs) if is_exit else None

    def __call__(
        self, x: jax.Array | None, images: jax.Array | None, t: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """One step down the trunk.

        Args:
          x: [N, P, H, W, C] from the level above; None at the first.
          images: [N, S, H, W, 3] of this level of the pyramid; None where no image enters.
          t: [N, M, D] captions, or None.

        Returns:
          ([N, P + S, H / 2, W / 2, C'] for the level below, logits [N, P + S, M, h * w] or None); the last level ends
          at [N, P + S, 1, 1, C].
        """
        if x is not None:
            # The level above may compute in another type.
            x = x.astype(self.dtype)
        if self.entry is not None:
            assert images is not None
            y = leaky_relu(self.entry(_merge_copies(images))).astype(self.dtype)
            y = y.reshape(*images.shape[:2], *y.shape[1:])
            # Levels that share a stage run as one batch: joined along P, nothing moves between devices.
            x = y if x is None else jnp.concatenate([x, y], axis=1)
        assert x is not None  # an image enters at the first level
        for name, layers in (("blocks", self.blocks), ("attention", self.attention)):
            if layers is not None:
                with jax.named_scope(name):
                    x = layers(x)
        with jax.named_scope("down"):
            x = call_with_remat(self.down, self.remat, x)
        return x, None if self.head is None else self.head(x, t)


class Discriminator(nnx.Module):
    """(image pyramids, captions) -> logits of every pair (eq. 6 and 7).

    Args:
      d: the discriminator's settings.
      condition: what it is conditioned on.
      mapping_lr_mul: learning-rate multiplier of the layers after a class embedding, as in G's mapping network.
      remat: recompute each block in the backward pass.
      dtype: of the computation.
      rngs: stream "params" draws the initial values.
    """

    def __init__(
        self,
        d: DiscriminatorConfig,
        condition: ConditionSettings,
        *,
        mapping_lr_mul: float,
        remat: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.conditioner = Conditioner(condition, d.text, remat=remat, dtype=dtype, rngs=rngs)
        width = self.conditioner.width
        layer = lambda: Linear(width, width, axes=("style", None), lr_mul=mapping_lr_mul, rngs=rngs)
        self.class_mapping = nnx.List([layer() for _ in range(d.class_mapping_depth)])
        condition_width = width if condition.kind != "none" else 0
        self.levels = nnx.List(
            [
                DiscriminatorLevel(d, i, condition_width, remat=remat, dtype=dtype, rngs=rngs)
                for i in range(len(d.blocks))
            ]
        )

    def condition(
        self, tokens: jax.Array | None, labels: jax.Array | None = None, features: jax.Array | None = None
    ) -> jax.Array | None:
        """tokens int32 [N, C] (with features [N, C, D] of a frozen encoder) or labels int32 [N] -> t_D [N, D]

        The global descriptor only (sec. 3.3).
        """
        with jax.named_scope("discriminator/conditioner"):
            t = self.conditioner(tokens, labels, features).global_
            if t is not None and self.class_mapping:
                t = normalize(t)
                for layer in self.class_mapping:
                    t = leaky_relu(layer(t))
            return t

    def __call__(
        self, images: Mapping[str, list[jax.Array]], own: jax.Array | None, wrong: jax.Array | None = None
    ) -> dict[str, Logits]:
        """What D says about every source of images.

        Args:
          images: {source, such as "fake" or "real": pyramid, one array [N, r, r, 3] an entry level, high to low}.
          own: [N, D] the images' captions, one an example for all sources, or None.
          wrong: [N, D] or [N, M, D] captions that do not belong to them, or None.

        Returns:
          {source: Logits}
        """
        sources = list(images)
        pyramid = [jnp.stack(level, axis=1) for level in zip(*images.values(), strict=True)]  # [N, S, r, r, 3]
        captions = [t if t.ndim == 3 else t[:, None] for t in (own, wrong) if t is not None]
        t = jnp.concatenate(captions, axis=1) if captions else None
        logits = {source: Logits([], []) for source in sources}
        x: jax.Array | None = None
        for i, level in enumerate(self.levels):
            with jax.named_scope(f"{pyramid[0].shape[2] >> i}px"):  # profiles are summed by these names
                x, out = level(x, None if level.entry is None else pyramid[i], t)
            if out is None:
                continue
            # Copies come level by level, and within a level source by source.
            for copy in range(out.shape[1]):
                of_source = logits[sources[copy % len(sources)]]
                of_source.own.append(out[:, copy, 0])
                if wrong is not None:
                    of_source.wrong.append(out[:, copy, 1] if wrong.ndim == 2 else out[:, copy, 1:])
        return logits
