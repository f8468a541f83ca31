"""The 64 px text-to-image generator: T, M and the synthesis network (sec. 3.1 and 3.2, Fig. 4)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import Config
from gigagan_jax.models.conditioning import Condition, Conditioner, Mapping
from gigagan_jax.models.layers.adaptive_conv import AdaptiveConv
from gigagan_jax.models.layers.attention import CrossAttention, FeedForward, SelfAttention
from gigagan_jax.models.layers.equalized import Conv, Stack, param, run
from gigagan_jax.models.layers.resample import upsample
from gigagan_jax.parallel.sharding import constrain


def channels(config: Config, resolution: int) -> int:
    """Channels of the generator's features at `resolution` (A2: min(base / resolution, max))."""
    return min(config.generator.channel_base // resolution, config.generator.channel_max)


class AttentionLayer(nnx.Module):
    """g_attn then g_xa of eq. 5, each with its feed-forward; every branch is x + gain * f(x)."""

    def __init__(self, config: Config, features: int, text_width: int, *, dtype: Any, rngs: nnx.Rngs):
        g = config.generator
        a = g.attention
        self.gain = g.attention_gain
        extra = g.w_dim if g.w_token else 0
        feed_forward = lambda: FeedForward(features, a.mlp_ratio, a.norm, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(features, a, extra_features=extra, dtype=dtype, rngs=rngs)
        self.self_mlp = feed_forward() if g.mlp_after_self else None
        cross = g.cross_attention and config.condition == "text"
        self.cross = CrossAttention(features, text_width, a, dtype=dtype, rngs=rngs) if cross else None
        self.cross_mlp = feed_forward() if cross and g.mlp_after_cross else None

    def __call__(self, x: jax.Array, w: jax.Array, local: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """x [N, H, W, C], w [N, w_dim], local [N, S, D], mask [N, S] -> [N, H, W, C]"""
        shape = x.shape
        x = x.reshape(shape[0], -1, shape[-1])
        x += self.gain * self.attention(x, w if self.attention.to_extra is not None else None)
        if self.self_mlp is not None:
            x += self.gain * self.self_mlp(x)
        if self.cross is not None:
            assert local is not None
            x += self.gain * self.cross(x, local, mask)
        if self.cross_mlp is not None:
            x += self.gain * self.cross_mlp(x)
        return constrain(x.reshape(shape), "batch", None, None, "channels")


def attention_stack(
    config: Config, features: int, text_width: int, depth: int, *, dtype: Any, rngs: nnx.Rngs
) -> Stack | None:
    """`depth` attention layers of one shape, compiled once; None for none."""
    layer = lambda: AttentionLayer(config, features, text_width, dtype=dtype, rngs=rngs)
    return Stack(layer, depth, remat=config.remat, rngs=rngs) if depth else None


class SynthesisBlock(nnx.Module):
    """Residual block of two adaptive 3x3 convolutions, followed by attention layers (eq. 5).

    Args:
      up: double the resolution on entry.
      single: one convolution only, as the first block has after the constant.
      depth: attention layers.
    """

    def __init__(
        self,
        config: Config,
        in_channels: int,
        out_channels: int,
        *,
        bank: int,
        up: bool,
        single: bool = False,
        depth: int,
        text_width: int,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        g = config.generator
        self.gain, self.up = g.residual_gain, up
        conv = lambda i, up: AdaptiveConv(
            i, out_channels, w_dim=g.w_dim, bank=bank, up=up, form=g.adaptive_form, dtype=dtype, rngs=rngs
        )
        self.conv0 = conv(in_channels, up)
        self.conv1 = None if single else conv(out_channels, False)
        changes = in_channels != out_channels
        self.skip = Conv(in_channels, out_channels, kernel=1, bias=False, dtype=dtype, rngs=rngs) if changes else None
        self.attention = attention_stack(config, out_channels, text_width, depth, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, w: jax.Array, local: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """x [N, H, W, in] -> [N, H', W', out]"""
        with jax.named_scope("conv0"):
            h = self.conv0(x, w)
        if self.conv1 is not None:
            with jax.named_scope("conv1"):
                h = self.conv1(h, w)
        with jax.named_scope("skip"):
            x = x if self.skip is None else self.skip(x)  # 1 x 1 before upsampling: the same, at a quarter of the cost
        x = (upsample(x) if self.up else x) + self.gain * h
        if self.attention is not None:
            x = self.attention(x, w, local, mask)
        return constrain(x, "batch", None, None, "channels")


class Generator(nnx.Module):
    """(z, caption) -> image pyramid; eq. 3 and 4.

    Args:
      config: the run's config; `config.generator` and what it conditions on.
      rngs: stream "params" draws the initial values.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        g = config.generator
        dtype = jnp.dtype(config.dtype)
        self.remat, self.dtype = config.remat, dtype
        self.conditioner = Conditioner(config, g.text, dtype=dtype, rngs=rngs)
        text_width = self.conditioner.width
        self.mapping = Mapping(config, text_width, rngs=rngs)
        first = channels(config, 4)
        self.constant = param(rngs, (4, 4, first), (None, None, None), std=1.0)
        entry, rest, attention, to_rgb = [], [], [], []
        previous = first
        for i, resolution in enumerate(config.resolutions):
            c, depth = channels(config, resolution), g.attention_depth[i]

            def block(c_in: int, c: int = c, i: int = i, depth: int = depth, **kind: bool) -> SynthesisBlock:
                inside = depth if g.attention_every_block else 0
                return SynthesisBlock(
                    config, c_in, c, bank=g.bank[i], depth=inside, text_width=text_width, dtype=dtype, rngs=rngs, **kind
                )

            entry.append(block(previous, up=i > 0, single=i == 0))
            same = g.blocks[i] - 1
            make = lambda block=block, c=c: block(c, up=False)
            rest.append(Stack(make, same, remat=config.remat, rngs=rngs) if same else None)
            after = 0 if g.attention_every_block else depth
            attention.append(attention_stack(config, c, text_width, after, dtype=dtype, rngs=rngs))
            rgb: dict[str, Any] = {
                "w_dim": g.w_dim,
                "kernel": 1,
                "demodulate": False,
                "gain": g.rgb_gain,
                "activation": False,
                "out_axis": "rgb",
            }
            to_rgb.append(AdaptiveConv(c, 3, **rgb, dtype=dtype, rngs=rngs))
            previous = c
        self.entry, self.rest = nnx.List(entry), nnx.List(rest)
        self.attention, self.to_rgb = nnx.List(attention), nnx.List(to_rgb)

    def condition(
        self, tokens: jax.Array | None, labels: jax.Array | None = None, features: jax.Array | None = None
    ) -> Condition:
        """tokens int32 [N, C] (with features [N, C, D] of a frozen encoder) or labels int32 [N] -> Condition (eq. 3a)"""
        with jax.named_scope("conditioner"):
            return self.conditioner(tokens, labels, features)

    def map(self, z: jax.Array, condition: Condition) -> jax.Array:
        """z [N, z_dim] -> w [N, w_dim] (eq. 3b)"""
        with jax.named_scope("mapping"):
            return self.mapping(z, condition.global_)

    def synthesize(self, w: jax.Array, condition: Condition) -> list[jax.Array]:
        """w [N, w_dim] -> float32 images [N, r, r, 3] in about [-1, 1], for r in config.resolutions (eq. 4 and 5)"""
        n = w.shape[0]
        x = jnp.broadcast_to(self.constant[...].astype(self.dtype), (n, *self.constant.shape))
        x = constrain(x, "batch", None, None, "channels")
        image: jax.Array | None = None
        images = []
        levels = zip(self.entry, self.rest, self.attention, self.to_rgb, strict=True)
        for i, (entry, rest, attention, to_rgb) in enumerate(levels):
            with jax.named_scope(f"{4 << i}px"):  # for profiles
                x = run(entry, self.remat, x, w, condition.local, condition.mask)
                for layers in (rest, attention):
                    if layers is not None:
                        x = layers(x, w, condition.local, condition.mask)
                rgb = to_rgb(x, w).astype(jnp.float32)
                image = rgb if image is None else upsample(image) + rgb
                images.append(constrain(image, "batch", None, None, None))
        return images

    def __call__(
        self,
        z: jax.Array,
        tokens: jax.Array | None = None,
        labels: jax.Array | None = None,
        features: jax.Array | None = None,
    ) -> tuple[list[jax.Array], jax.Array]:
        """z [N, z_dim], and what `condition` takes -> (images low to high, w [N, w_dim])"""
        with jax.named_scope("generator"):
            condition = self.condition(tokens, labels, features)
            w = self.map(z, condition)
            return self.synthesize(w, condition), w
