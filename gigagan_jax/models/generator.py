"""The 64 px text-to-image generator: T, M and the synthesis network (sec. 3.1 and 3.2, Fig. 4)."""

import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import GeneratorConfig
from gigagan_jax.models.conditioning import Condition, Conditioned, Conditioner, ConditionSettings, Mapping
from gigagan_jax.models.layers.adaptive_conv import AdaptiveConv
from gigagan_jax.models.layers.attention import CrossAttention, FeedForward, SelfAttention
from gigagan_jax.models.layers.equalized import (
    Conv,
    RmsNorm,
    ScannedLayers,
    Segment,
    call_with_remat,
    declare_parameter,
    mark_as_attention,
    materialize,
)
from gigagan_jax.models.layers.resample import enlarge, upsample
from gigagan_jax.parallel.sharding import constrain


def channels_at(g: GeneratorConfig, resolution: int) -> int:
    """Channels of the generator's features at `resolution` (A2: min(base / resolution, max))."""
    return min(g.channel_base // resolution, g.channel_max)


def spread_attention(blocks: int, depth: int) -> tuple[int, ...]:
    """Blocks, counted from 1, behind which a resolution's attention layers are: the k-th of d behind ceil(k B / d)."""
    return tuple(-(-k * blocks // depth) for k in range(1, depth + 1))


def group_segments(places: tuple[int, ...]) -> tuple[Segment, ...]:
    """The layers of a resolution behind its first block, for stacks of (blocks, attention layers).

    Args:
      places: of the attention layers, in rising order; the last is the number of blocks.

    Returns:
      as few segments as equal distances next to each other allow: each is a program of its own.
    """
    depths = Counter(places)
    # The first block is no part of the stack.
    units = [(end - start, depths[end]) for start, end in itertools.pairwise([1, *sorted(depths)])]
    return tuple(Segment(len(list(group)), counts) for counts, group in itertools.groupby(units))


class AttentionLayer(nnx.Module):
    """g_attn then g_xa of eq. 5, each with its feed-forward; every branch is x + gain * f(x).

    Args:
      g: sizes and gains.
      features: channels of the feature map.
      context_width: features of t_local; 0 without cross-attention.
    """

    def __init__(self, g: GeneratorConfig, features: int, context_width: int, *, dtype: Any, rngs: nnx.Rngs):
        a = g.attention
        self.gain, self.window = g.attention_gain, a.window
        # Sec. 3.1: w as one more token tells attention of the style.
        extra = g.w_dim if g.w_token else 0
        kind: dict[str, Any] = {"zero_init": g.attention_zero_init, "dtype": dtype, "rngs": rngs}
        feed_forward = lambda: FeedForward(features, a.mlp_ratio, a.norm, **kind)
        self.attention = SelfAttention(features, a, extra_features=extra, **kind)
        self.self_mlp = feed_forward() if g.mlp_after_self else None
        cross = lambda: CrossAttention(features, context_width, a, **kind)
        self.cross = cross() if context_width else None
        self.cross_mlp = feed_forward() if context_width and g.mlp_after_cross else None
        mark_as_attention(self)

    def __call__(self, x: jax.Array, w: jax.Array, local: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """x [N, H, W, C], w [N, w_dim], local [N, S, D], mask [N, S] -> [N, H, W, C]"""
        shape = x.shape
        # Equalized weights give branches of unit variance: the gain bounds how fast the residual stream grows.
        x += self.gain * self.attend(x, w)
        x = x.reshape(shape[0], -1, shape[-1])
        if self.self_mlp is not None:
            x += self.gain * self.self_mlp(x)
        if self.cross is not None:
            assert local is not None
            x += self.gain * self.cross(x, local, mask)
        if self.cross_mlp is not None:
            x += self.gain * self.cross_mlp(x)
        return constrain(x.reshape(shape), "batch", "height", None, "channels")

    def attend(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Self-attention over the whole map, or within each window: x [N, H, W, C], w [N, w_dim] -> [N, H, W, C]"""
        n, h, width, c = x.shape
        size = self.window
        if not size or (h, width) == (size, size):
            tokens = x.reshape(n, h * width, c)
        else:
            if h % size or width % size:
                raise ValueError(f"a map of {h} x {width} does not divide into windows of {size} x {size}")
            # Windows lie on a fixed grid from the map's corner: a token sees the same others in any larger map.
            tokens = x.reshape(n, h // size, size, width // size, size, c).swapaxes(2, 3).reshape(-1, size * size, c)
        style = w
        if w.shape[0] != tokens.shape[0]:
            # Windows of an example follow each other, and one w may be that of all.
            style = jnp.repeat(w, tokens.shape[0] // w.shape[0], axis=0)
        y = self.attention(tokens, style if self.attention.to_extra is not None else None)
        if y.shape[0] == n:
            return y.reshape(x.shape)
        return y.reshape(n, h // size, width // size, size, size, c).swapaxes(2, 3).reshape(x.shape)


class SynthesisBlock(nnx.Module):
    """Residual block of two adaptive 3x3 convolutions, followed by attention layers (eq. 5).

    x + gain * f(x), or with `g.layer_scale` x + scale * f(norm(x)): a scale a channel is learned (StyleGAN-T).

    Args:
      g: sizes and gains.
      bank: filters N of each adaptive convolution.
      up: double the resolution on entry.
      single: one convolution only, as the first block has after the constant.
      attention: the attention layers at the end; None for none.
    """

    def __init__(
        self,
        g: GeneratorConfig,
        in_channels: int,
        out_channels: int,
        *,
        bank: int,
        up: bool,
        single: bool = False,
        attention: ScannedLayers | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.gain, self.up = g.residual_gain, up
        conv = lambda i, up: AdaptiveConv(
            i, out_channels, w_dim=g.w_dim, bank=bank, up=up, form=g.adaptive_form, dtype=dtype, rngs=rngs
        )
        # The first convolution takes the change of channels and resolution; the second keeps both.
        self.conv0 = conv(in_channels, up)
        self.conv1 = None if single else conv(out_channels, False)
        # The branch sees inputs of one size however far the stream has grown; the stream itself is left as it is.
        self.norm = RmsNorm(in_channels, dtype=dtype, rngs=rngs) if g.layer_scale else None
        scale = lambda: declare_parameter(rngs, (out_channels,), ("channels",), mean=g.layer_scale)
        self.layer_scale = scale() if g.layer_scale else None
        # A skip without a convolution where shapes allow it: the identity needs no parameters.
        changes = in_channels != out_channels
        self.skip = Conv(in_channels, out_channels, kernel=1, bias=False, dtype=dtype, rngs=rngs) if changes else None
        self.attention = attention

    def __call__(self, x: jax.Array, w: jax.Array, local: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """x [N, H, W, in] -> [N, H', W', out]"""
        h = x if self.norm is None else self.norm(x)
        with jax.named_scope("conv0"):
            h = self.conv0(h, w)
        if self.conv1 is not None:
            with jax.named_scope("conv1"):
                h = self.conv1(h, w)
        with jax.named_scope("skip"):
            # A 1x1 convolution commutes with upsampling: before it, the same costs a quarter.
            x = x if self.skip is None else self.skip(x)
        gain = self.gain if self.layer_scale is None else materialize(self.layer_scale, h.dtype)
        x = (upsample(x) if self.up else x) + gain * h
        if self.attention is not None:
            x = self.attention(x, w, local, mask)
        return constrain(x, "batch", "height", None, "channels")


class SynthesisLevel(nnx.Module):
    """One resolution of the synthesis network: blocks, attention, and the image that is added to the pyramid (Fig. 4).

    Args:
      g: the generator's settings.
      index: of the level, from the lowest, which is the only one that does not start with upsampling.
      lowest: resolution of level 0, in pixels.
      in_channels: of the level below.
      context_width: features of t_local; 0 without cross-attention.
      single: the first block has one convolution only.
      rgb: the level adds to the image.
      sharp: the image of the level below is enlarged by Lanczos interpolation, and not by [1, 3, 3, 1].
      remat: recompute each block in the backward pass.
    """

    def __init__(
        self,
        g: GeneratorConfig,
        index: int,
        lowest: int,
        in_channels: int,
        context_width: int,
        *,
        single: bool = False,
        rgb: bool = True,
        sharp: bool = False,
        remat: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        features = channels_at(g, lowest << index)
        self.remat, self.sharp = remat, sharp

        def attention_layers(depth: int) -> ScannedLayers | None:
            layer = lambda: AttentionLayer(g, features, context_width, dtype=dtype, rngs=rngs)
            return ScannedLayers(layer, depth, remat=remat, rngs=rngs) if depth else None

        def block(c_in: int, **kind: bool) -> SynthesisBlock:
            attention = attention_layers(g.attention_depth[index] if g.attention_placement == "every" else 0)
            return SynthesisBlock(
                g, c_in, features, bank=g.bank[index], attention=attention, dtype=dtype, rngs=rngs, **kind
            )

        # A level's first block differs in shape from the others, which are scanned.
        self.entry = block(in_channels, up=index > 0, single=single)
        same = g.blocks[index] - 1
        more = lambda: ScannedLayers(lambda: block(features, up=False), same, remat=remat, rngs=rngs)
        self.blocks = more() if same else None
        # One stack wherever its layers are: a placement changes no parameter, only the order of application.
        depth = 0 if g.attention_placement == "every" else g.attention_depth[index]
        self.attention = attention_layers(depth)
        places = spread_attention(g.blocks[index], depth) if g.attention_placement == "spread" else ()
        # Where all attention is behind the last block there is nothing to interleave.
        self.segments = group_segments(places) if len(set(places)) > 1 else ()
        # ToRGB of StyleGAN2: modulated, but not demodulated, so that the style sets the size of what is added. In float32:
        # the image is a sum over levels, and bfloat16 would round the small ones away.
        to_rgb = lambda: AdaptiveConv(
            features,
            3,
            w_dim=g.w_dim,
            kernel=1,
            demodulate=False,
            gain=g.rgb_gain,
            activation=False,
            out_axis="rgb",
            dtype=jnp.float32,
            rngs=rngs,
        )
        self.to_rgb = to_rgb() if rgb else None

    def __call__(
        self,
        x: jax.Array,
        image: jax.Array | None,
        w: jax.Array,
        condition: Condition,
        skip: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """One level up.

        Args:
          x: [N, H, W, C] of the level below.
          image: float32 [N, H, W, 3] of the level below; None where there is none yet.
          w: [N, w_dim].
          condition: of the images.
          skip: features of an encoder at this level's resolution, which are added behind the first block.

        Returns:
          (features [N, H', W', C'], image [N, H', W', 3] or None)
        """
        x = call_with_remat(self.entry, self.remat, x, w, condition.local, condition.mask)
        if skip is not None:
            x += skip
        context = (w, condition.local, condition.mask)
        if self.segments:
            assert self.blocks is not None
            assert self.attention is not None
            x = ScannedLayers.interleave((self.blocks, self.attention), self.segments, x, *context)
        else:
            for layers in (self.blocks, self.attention):
                if layers is not None:
                    x = layers(x, *context)
        if self.to_rgb is None:
            return x, image
        rgb = self.to_rgb(x, w)
        if image is not None:
            rgb += enlarge(image) if self.sharp else upsample(image)
        return x, constrain(rgb, "batch", "height", None, None)


class Generator(Conditioned):
    """(z, caption) -> image pyramid; eq. 3 and 4.

    Args:
      g: the generator's settings.
      condition: what it is conditioned on.
      remat: recompute each block in the backward pass.
      dtype: of the computation.
      rngs: stream "params" draws the initial values.
    """

    def __init__(self, g: GeneratorConfig, condition: ConditionSettings, *, remat: bool, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        self.conditioner = Conditioner(condition, g.text, remat=remat, dtype=dtype, rngs=rngs)
        width = self.conditioner.width
        self.mapping = Mapping(g, width if condition.kind != "none" else 0, rngs=rngs)
        context_width = width if g.cross_attention and condition.kind == "text" else 0
        features = channels_at(g, 4)
        # StyleGAN's learned 4x4 start; z enters through w only.
        self.constant = declare_parameter(rngs, (4, 4, features), (None, None, None), std=1.0)
        levels = []
        for i in range(len(g.blocks)):
            # One convolution behind the constant (StyleGAN2).
            kind: dict[str, Any] = {"single": i == 0, "remat": remat, "dtype": dtype, "rngs": rngs}
            levels.append(SynthesisLevel(g, i, 4, features, context_width, **kind))
            features = channels_at(g, 4 << i)
        self.levels = nnx.List(levels)

    def map(self, z: jax.Array, condition: Condition) -> jax.Array:
        """z [N, z_dim] -> w [N, w_dim] (eq. 3b)"""
        with jax.named_scope("mapping"):
            return self.mapping(z, condition.global_)

    def synthesize(self, w: jax.Array, condition: Condition) -> list[jax.Array]:
        """w [N, w_dim] -> float32 images [N, r, r, 3] in about [-1, 1], for r in 4, 8, ... (eq. 4 and 5)"""
        # The same start for every example: a broadcast, which the first convolution consumes.
        x = jnp.broadcast_to(self.constant[...].astype(self.dtype), (w.shape[0], *self.constant.shape))
        x = constrain(x, "batch", "height", None, "channels")
        image: jax.Array | None = None
        images: list[jax.Array] = []
        for i, level in enumerate(self.levels):
            with jax.named_scope(f"{4 << i}px"):  # profiles are summed by these names
                x, image = level(x, image, w, condition)
            assert image is not None
            images.append(image)
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
            # Once: all levels share one w, as styles are not mixed in the paper.
            w = self.map(z, condition)
            return self.synthesize(w, condition), w
