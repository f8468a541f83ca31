"""The vision-aided discriminator: small heads on features of a frozen image tower (sec. 3.3; Kumari et al., 2022).

Features of chosen blocks pass a fixed random projection (Projected GAN, Sauer et al., 2021) and then 3x3 convolutions that
are modulated by the caption. Only the heads learn; the tower and the projections are frozen (models/pretrained/frozen.py).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import VisionAidedConfig
from gigagan_jax.models.conditioning import Conditioner, ConditionSettings
from gigagan_jax.models.layers.adaptive_conv import modulated_head
from gigagan_jax.models.layers.equalized import (
    Conv,
    Linear,
    choose_precision,
    declare_parameter,
    leaky_relu,
    materialize,
    normalize,
)


class RandomProjection(nnx.Module):
    """One fixed random 1x1 convolution a layer, C -> `out` channels, that keeps the second moment.

    Args:
      width: channels of the tower.
      out: channels after it.
      count: number of layers.
    """

    def __init__(self, width: int, out: int, count: int, *, rngs: nnx.Rngs):
        std = 1.0 / math.sqrt(width)
        # Declared as parameters to be placed and drawn like others; they are in the frozen state and never trained.
        self.weights = nnx.List(
            [declare_parameter(rngs, (width, out), ("conv_in", "conv_out"), std=std) for _ in range(count)]
        )

    def __call__(self, features: list[jax.Array]) -> list[jax.Array]:
        """[N, h, w, C] a layer -> [N, h, w, out] a layer, each position of unit second moment"""
        # A tower's channels differ in size by orders of magnitude; the heads start from inputs of one size.
        unit = lambda x: normalize(x).astype(x.dtype)
        project = lambda x, w: jnp.matmul(x, materialize(w, x.dtype), precision=choose_precision(x.dtype))
        return [unit(project(x, w)) for x, w in zip(features, self.weights, strict=True)]


class Head(nnx.Module):
    """3x3 convolutions, modulated by the caption, to a map of logits; and an unmodulated prediction, added (as eq. 7).

    Args:
      v: channels and depth.
      condition_width: features of the caption; 0 without a condition.
    """

    def __init__(self, v: VisionAidedConfig, condition_width: int, *, dtype: Any, rngs: nnx.Rngs):
        # 3x3 before the caption comes in: the heads first see their neighbourhood.
        self.entry = Conv(v.projection, v.head_width, kernel=3, dtype=dtype, rngs=rngs)
        # Float32, as the last modulated layer: logits are never rounded to the computation's type.
        self.unconditional = Conv(v.head_width, 1, kernel=1, axes=("conv_in", None), rngs=rngs)
        depth = v.head_depth if condition_width else 0
        kind: dict[str, Any] = {"w_dim": condition_width, "kernel": 3, "dtype": dtype, "rngs": rngs}
        self.layers = modulated_head(v.head_width, v.head_width, depth, **kind)

    def __call__(self, x: jax.Array, t: jax.Array | None) -> jax.Array:
        """x [N, h, w, C], t [N, D] -> float32 logits [N, h * w]"""
        x = leaky_relu(self.entry(x))
        logits = self.unconditional(x)
        if t is not None:
            for layer in self.layers:
                x = layer(x, t)
            # The two predictions are added as logits, as in the discriminator's heads (eq. 7).
            logits += x
        return logits.reshape(logits.shape[0], -1)


class VisionAided(nnx.Module):
    """(projected features, captions) -> logits a layer.

    Args:
      v: sizes of the heads, and the layers of the tower that they read.
      condition: what the heads are conditioned on.
      remat: recompute each block of the text transformer in the backward pass.
      dtype: of the computation.
      rngs: stream "params" draws the initial values.
    """

    def __init__(self, v: VisionAidedConfig, condition: ConditionSettings, *, remat: bool, dtype: Any, rngs: nnx.Rngs):
        self.conditioner = Conditioner(condition, v.text, remat=remat, dtype=dtype, rngs=rngs)
        conditional = condition.kind != "none"
        width = self.conditioner.width if conditional else 0
        # Features of the end of text differ between captions in a few directions only: one learned layer spreads them.
        mix = lambda: Linear(width, width, axes=("style", None), rngs=rngs)
        self.mix = mix() if conditional else None
        self.heads = nnx.List([Head(v, width, dtype=dtype, rngs=rngs) for _ in v.layers])

    def condition(
        self, tokens: jax.Array | None, labels: jax.Array | None, features: jax.Array | None = None
    ) -> jax.Array | None:
        """tokens int32 [N, C], labels int32 [N] or features [N, C, D] of a frozen encoder -> [N, D]"""
        # As D, V reads the caption's global descriptor only.
        t = self.conditioner(tokens, labels, features).global_
        return t if t is None or self.mix is None else leaky_relu(self.mix(normalize(t)))

    def __call__(self, features: list[jax.Array], t: jax.Array | None) -> list[jax.Array]:
        """[N, h, w, projection] a layer, t [N, D] -> float32 logits [N, h * w] a layer"""
        return [head(x, t) for head, x in zip(self.heads, features, strict=True)]
