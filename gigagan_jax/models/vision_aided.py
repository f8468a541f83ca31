"""The vision-aided discriminator: small heads on features of a frozen image tower (sec. 3.3; Kumari et al., 2022).

Features of chosen blocks pass a fixed random projection (Projected GAN, Sauer et al., 2021) and then 3x3 convolutions that
are modulated by the caption. Only the heads learn; the tower and the projections are frozen (models/pretrained/frozen.py).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import Config
from gigagan_jax.models.conditioning import Conditioner
from gigagan_jax.models.layers.adaptive_conv import modulated_head
from gigagan_jax.models.layers.equalized import Conv, Linear, leaky_relu, normalize, param, value


class RandomProjection(nnx.Module):
    """One fixed random 1x1 convolution a layer, C -> `out` channels, that keeps the second moment.

    Args:
      width: channels of the tower.
      out: channels after it.
      count: number of layers.
    """

    def __init__(self, width: int, out: int, count: int, *, rngs: nnx.Rngs):
        std = 1.0 / math.sqrt(width)
        self.weights = nnx.List([param(rngs, (width, out), ("conv_in", "conv_out"), std=std) for _ in range(count)])

    def __call__(self, features: list[jax.Array]) -> list[jax.Array]:
        """[N, h, w, C] a layer -> [N, h, w, out] a layer, each position of unit second moment"""
        # A tower's channels differ in size by orders of magnitude; the heads start from inputs of one size.
        unit = lambda x: normalize(x).astype(x.dtype)
        return [unit(x @ value(w, x.dtype)) for x, w in zip(features, self.weights, strict=True)]


class Head(nnx.Module):
    """3x3 convolutions, modulated by the caption, to a map of logits; and an unmodulated prediction, added (as eq. 7)."""

    def __init__(self, config: Config, condition_width: int, *, dtype: Any, rngs: nnx.Rngs):
        v = config.vision_aided
        self.entry = Conv(v.projection, v.head_width, kernel=3, dtype=dtype, rngs=rngs)
        self.unconditional = Conv(v.head_width, 1, kernel=1, axes=("conv_in", None), dtype=dtype, rngs=rngs)
        depth = v.head_depth if config.condition != "none" else 0
        kind: dict[str, Any] = {"w_dim": condition_width, "kernel": 3, "dtype": dtype, "rngs": rngs}
        self.layers = modulated_head(v.head_width, v.head_width, depth, **kind)

    def __call__(self, x: jax.Array, t: jax.Array | None) -> jax.Array:
        """x [N, h, w, C], t [N, D] -> float32 logits [N, h * w]"""
        x = leaky_relu(self.entry(x))
        logits = self.unconditional(x).astype(jnp.float32)
        if t is not None:
            for layer in self.layers:
                x = layer(x, t)
            logits += x.astype(jnp.float32)
        return logits.reshape(logits.shape[0], -1)


class VisionAided(nnx.Module):
    """(projected features, captions) -> logits a layer.

    Args:
      config: the run's config; `config.vision_aided` and what it conditions on.
      rngs: stream "params" draws the initial values.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.conditioner = Conditioner(config, config.vision_aided.text, dtype=dtype, rngs=rngs)
        width = self.conditioner.width
        # Features of the end of text differ between captions in a few directions only: one learned layer spreads them.
        mix = lambda: Linear(width, width, axes=("style", None), rngs=rngs)
        self.mix = mix() if config.condition != "none" else None
        self.heads = nnx.List([Head(config, width, dtype=dtype, rngs=rngs) for _ in config.vision_aided.layers])

    def condition(
        self, tokens: jax.Array | None, labels: jax.Array | None, features: jax.Array | None = None
    ) -> jax.Array | None:
        """tokens int32 [N, C], labels int32 [N] or features [N, C, D] of a frozen encoder -> [N, D]"""
        t = self.conditioner(tokens, labels, features).global_
        return t if t is None or self.mix is None else leaky_relu(self.mix(normalize(t)))

    def __call__(self, features: list[jax.Array], t: jax.Array | None) -> list[jax.Array]:
        """[N, h, w, projection] a layer, t [N, D] -> float32 logits [N, h * w] a layer"""
        return [head(x, t) for head, x in zip(self.heads, features, strict=True)]
