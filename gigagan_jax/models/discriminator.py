"""The discriminator: multi-scale input and output, one shared trunk, heads that read the caption (sec. 3.3, Fig. 5).

Pyramid level i enters the trunk at its own resolution and leaves through every later exit j, which gives L (L + 1) / 2
predictions. Levels that share a stage run as one batch. Arrays are [N, P, H, W, C]: N is the (sharded) batch and P counts
copies that belong to the same example (levels x sources), so that joining them moves nothing between devices.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import Config, entry_levels
from gigagan_jax.models.conditioning import Conditioner
from gigagan_jax.models.layers.adaptive_conv import modulated_head
from gigagan_jax.models.layers.attention import FeedForward, SelfAttention
from gigagan_jax.models.layers.equalized import SQRT2, Conv, Linear, Stack, leaky_relu, normalize, run
from gigagan_jax.parallel.sharding import constrain


def channels(config: Config, resolution: int) -> int:
    """Channels of the trunk at `resolution` (A2: min(base / resolution, max))."""
    return min(config.discriminator.channel_base // resolution, config.discriminator.channel_max)


class Pair(NamedTuple):
    """One prediction: entry `level` (0 is the output image), `exit` (the last is L - 1)."""

    level: int
    exit: int


def pairs(config: Config) -> tuple[Pair, ...]:
    """All predictions in the order in which the discriminator returns them; 15 for five levels (sec. 3.3)."""
    stages = len(config.resolutions)
    exits = range(stages) if config.discriminator.multi_scale_output else (stages - 1,)
    return tuple(Pair(i, j) for j in exits for i in entry_levels(config) if i <= j)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


class ResidualBlock(nnx.Module):
    """StyleGAN2's residual block: (skip + conv1(conv0(x))) / sqrt(2), at half the resolution when `down`."""

    def __init__(self, in_channels: int, out_channels: int, *, down: bool, dtype: Any, rngs: nnx.Rngs):
        self.conv0 = Conv(in_channels, in_channels, kernel=3, dtype=dtype, rngs=rngs)
        self.conv1 = Conv(in_channels, out_channels, kernel=3, down=down, dtype=dtype, rngs=rngs)
        self.skip = (
            Conv(in_channels, out_channels, kernel=1, down=True, bias=False, dtype=dtype, rngs=rngs) if down else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, H, W, in] -> [N, P, H', W', out]"""
        h = _flat(x)
        y = leaky_relu(self.conv1(leaky_relu(self.conv0(h))))
        h = h if self.skip is None else self.skip(h)
        y = (h + y) / SQRT2
        return constrain(y.reshape(*x.shape[:2], *y.shape[1:]), "batch", None, None, None, "channels")


class AttentionLayer(nnx.Module):
    """Squared-distance self-attention and feed-forward, x + gain * f(x)."""

    def __init__(self, config: Config, features: int, *, dtype: Any, rngs: nnx.Rngs):
        d = config.discriminator
        self.gain = d.attention_gain
        self.attention = SelfAttention(features, d.attention, dtype=dtype, rngs=rngs)
        a = d.attention
        self.feed_forward = FeedForward(features, a.mlp_ratio, a.norm, dtype=dtype, rngs=rngs) if d.mlp else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, H, W, C] -> the same shape"""
        n, p, h, w, c = x.shape
        y = x.reshape(n * p, h * w, c)
        y += self.gain * self.attention(y)
        if self.feed_forward is not None:
            y += self.gain * self.feed_forward(y)
        return constrain(y.reshape(x.shape), "batch", None, None, None, "channels")


class Epilogue(nnx.Module):
    """The last stage: 4 x 4 to one vector, with the deviation over groups of images where it is switched on."""

    def __init__(self, config: Config, features: int, *, dtype: Any, rngs: nnx.Rngs):
        self.group = config.discriminator.minibatch_std
        self.conv = Conv(features, features, kernel=3, dtype=dtype, rngs=rngs)
        # A convolution of its own for the deviation channel: features + 1 would not divide over a mesh.
        stat = lambda: Conv(1, features, kernel=3, bias=False, axes=(None, "conv_out"), dtype=dtype, rngs=rngs)
        self.conv_std = stat() if self.group else None
        self.dense = Linear(16 * features, features, axes=("conv_in", "conv_out"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, 4, 4, C] -> [N, P, 1, 1, C]"""
        n, p = x.shape[:2]
        y = self.conv(_flat(x))
        if self.conv_std is not None:
            deviation = minibatch_std(x, self.group).astype(x.dtype)
            y += self.conv_std(
                jnp.broadcast_to(deviation[..., None, None, None], (n, p, 4, 4, 1)).reshape(n * p, 4, 4, 1)
            )
        y = leaky_relu(self.dense(leaky_relu(y).reshape(n * p, -1)))
        return y.reshape(n, p, 1, 1, -1)


def minibatch_std(x: jax.Array, group: int) -> jax.Array:
    """Mean deviation within groups of `group` consecutive examples, for each copy by itself (ProGAN, sec. 3).

    x [N, P, H, W, C] -> float32 [N, P]
    """
    n, p = x.shape[:2]
    y = x.astype(jnp.float32).reshape(n // group, group, p, -1)
    deviation = jnp.sqrt(jnp.var(y, axis=1) + 1e-8).mean(-1)
    return jnp.repeat(deviation, group, axis=0)


class ModulatedHead(nnx.Module):
    """psi_j(phi, t_D) + Conv1x1(phi) (eq. 7): a conditional and an unconditional prediction, added."""

    def __init__(self, config: Config, features: int, condition_width: int, *, dtype: Any, rngs: nnx.Rngs):
        d = config.discriminator
        self.unconditional = Conv(features, 1, kernel=1, axes=("conv_in", None), dtype=dtype, rngs=rngs)
        depth = d.head_depth if config.condition != "none" else 0
        kind: dict[str, Any] = {"w_dim": condition_width, "kernel": 1, "dtype": dtype, "rngs": rngs}
        self.layers = modulated_head(features, d.head_width, depth, **kind)

    def __call__(self, x: jax.Array, t: jax.Array | None) -> jax.Array:
        """x [N, P, h, w, C], t [N, M, D] -> float32 logits [N, P, M, h * w]; M = 1 without a condition"""
        n, p, h, w, c = x.shape
        logits = self.unconditional(_flat(x)).reshape(n, p, 1, h * w).astype(jnp.float32)
        if t is None:
            return logits
        m = t.shape[1]
        # One caption an example and copy-independent: rows (n, m), "pixels" (p, h, w).
        y = jnp.broadcast_to(x.reshape(n, 1, p * h * w, 1, c), (n, m, p * h * w, 1, c)).reshape(n * m, p * h * w, 1, c)
        for layer in self.layers:
            y = layer(y, t.reshape(n * m, -1))
        return logits + y.reshape(n, m, p, h * w).swapaxes(1, 2).astype(jnp.float32)


class ProjectionHead(nnx.Module):
    """Projection discriminator: <embedding(c), phi> / sqrt(C) + Conv1x1(phi) (Miyato and Koyama, 2018)."""

    def __init__(self, config: Config, features: int, condition_width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.unconditional = Conv(features, 1, kernel=1, axes=("conv_in", None), dtype=dtype, rngs=rngs)
        self.embed = Linear(condition_width, features, axes=("embed", None), bias=None, dtype=dtype, rngs=rngs)
        self.scale = 1.0 / math.sqrt(features)

    def __call__(self, x: jax.Array, t: jax.Array | None) -> jax.Array:
        """x [N, P, h, w, C], t [N, M, D] -> float32 logits [N, P, M, h * w]"""
        if t is None:
            raise ValueError("a projection head needs a condition")
        n, p, h, w, _ = x.shape
        logits = self.unconditional(_flat(x)).reshape(n, p, 1, h * w).astype(jnp.float32)
        by_class = jnp.einsum("nphwc,nmc->npmhw", x, self.embed(t) * self.scale, preferred_element_type=jnp.float32)
        return logits + by_class.reshape(n, p, -1, h * w)


class Stage(nnx.Module):
    """phi at one resolution: blocks, attention, and the way down (the epilogue at 4 px)."""

    def __init__(self, config: Config, index: int, *, dtype: Any, rngs: nnx.Rngs):
        d = config.discriminator
        resolutions = config.resolutions[::-1]
        c = channels(config, resolutions[index])
        same, depth = d.blocks[index] - 1, d.attention_depth[index]
        block = lambda: ResidualBlock(c, c, down=False, dtype=dtype, rngs=rngs)
        self.blocks = Stack(block, same, remat=config.remat, rngs=rngs) if same else None
        layer = lambda: AttentionLayer(config, c, dtype=dtype, rngs=rngs)
        self.attention = Stack(layer, depth, remat=config.remat, rngs=rngs) if depth else None
        self.remat = config.remat
        if index + 1 < len(resolutions):
            below = channels(config, resolutions[index + 1])
            self.down: nnx.Module = ResidualBlock(c, below, down=True, dtype=dtype, rngs=rngs)
        else:
            self.down = Epilogue(config, c, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P, H, W, C] -> [N, P, H / 2, W / 2, C']; the last stage gives [N, P, 1, 1, C]"""
        for name, layers in (("blocks", self.blocks), ("attention", self.attention)):
            if layers is not None:
                with jax.named_scope(name):
                    x = layers(x)
        with jax.named_scope("down"):
            return run(self.down, self.remat, x)


class Discriminator(nnx.Module):
    """(image pyramids, captions) -> logits of every pair (eq. 6 and 7).

    Args:
      config: the run's config; `config.discriminator` and what it conditions on.
      rngs: stream "params" draws the initial values.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        d = config.discriminator
        dtype = jnp.dtype(config.dtype)
        self.dtype = dtype
        self.conditioner = Conditioner(config, d.text, dtype=dtype, rngs=rngs)
        width = self.conditioner.width
        layer = lambda: Linear(width, width, axes=("style", None), lr_mul=config.generator.mapping_lr_mul, rngs=rngs)
        self.class_mapping = nnx.List([layer() for _ in range(d.class_mapping_depth)])
        resolutions = config.resolutions[::-1]
        head = ModulatedHead if d.head == "modulated" else ProjectionHead
        exits = {pair.exit for pair in pairs(config)}
        entries, stages, heads = [], [], []
        for i, resolution in enumerate(resolutions):
            c = channels(config, resolution)
            enters = i in entry_levels(config)
            entry = lambda c=c: Conv(3, c, kernel=1, axes=("rgb", "conv_out"), dtype=dtype, rngs=rngs)
            entries.append(entry() if enters else None)
            stages.append(Stage(config, i, dtype=dtype, rngs=rngs))
            out = channels(config, resolutions[min(i + 1, len(resolutions) - 1)])
            heads.append(head(config, out, width, dtype=dtype, rngs=rngs) if i in exits else None)
        self.entries, self.stages, self.heads = nnx.List(entries), nnx.List(stages), nnx.List(heads)

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

    def __call__(self, pyramid: list[jax.Array], t: jax.Array | None) -> list[jax.Array]:
        """Logits of all sources and captions.

        Args:
          pyramid: one array [N, S, r, r, 3] per entry level, high to low; S sources (e.g. fake and real) an example.
          t: [N, M, D] M captions an example, or None.

        Returns:
          float32 [N, S, M, h * w] for each of `pairs(config)`, in that order.
        """
        x: jax.Array | None = None
        logits: list[jax.Array] = []
        n, sources = pyramid[0].shape[:2]
        for i, (entry, stage, head) in enumerate(zip(self.entries, self.stages, self.heads, strict=True)):
            with jax.named_scope(f"{pyramid[0].shape[2] >> i}px"):  # for profiles
                if entry is not None:
                    y = leaky_relu(entry(_flat(pyramid[i])))
                    y = y.reshape(n, sources, *y.shape[1:])
                    x = y if x is None else jnp.concatenate([x, y], axis=1)
                assert x is not None  # the first level always enters
                x = stage(x)
                if head is not None:
                    out = head(x, t)
                    logits += [out[:, k : k + sources] for k in range(0, x.shape[1], sources)]
        return logits
