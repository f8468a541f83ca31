"""StyleGAN2's residual block, of the discriminator's trunk and of the upsampler's encoder."""

import math
from typing import Any

import jax
from flax import nnx

from gigagan_jax.models.layers.equalized import Conv, leaky_relu


class ResidualBlock(nnx.Module):
    """(skip + gain * conv1(conv0(x))) / sqrt(1 + gain^2).

    Args:
      in_channels, out_channels: channels before and after; they may differ only where `down`.
      down: give half the resolution.
      gain: of the branch; 1 is StyleGAN2's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, down: bool, gain: float = 1.0, dtype: Any, rngs: nnx.Rngs
    ):
        self.gain = gain
        self.conv0 = Conv(in_channels, in_channels, kernel=3, dtype=dtype, rngs=rngs)
        self.conv1 = Conv(in_channels, out_channels, kernel=3, down=down, dtype=dtype, rngs=rngs)
        self.skip = (
            Conv(in_channels, out_channels, kernel=1, down=True, bias=False, dtype=dtype, rngs=rngs) if down else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] -> [N, H', W', out]"""
        # Main branch at full resolution, downsampled in its second convolution.
        y = leaky_relu(self.conv1(leaky_relu(self.conv0(x))))
        x = x if self.skip is None else self.skip(x)
        # Branches of variance 1 and gain^2 add up to 1 + gain^2: the division keeps 1 (StyleGAN2).
        return (x + self.gain * y) / math.sqrt(1.0 + self.gain**2)
