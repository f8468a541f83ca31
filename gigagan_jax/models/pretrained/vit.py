"""Shared parts of the vision transformers (Dosovitskiy et al., 2021): sizes, patch embedding, preprocessing."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.layers.equalized import declare_parameter, materialize
from gigagan_jax.models.pretrained.transformer import ACTIVATIONS, Dense
from gigagan_jax.models.pretrained.weights import Row, conv_to_hwio, require_type, transpose_linear

# Mean and standard deviation of ImageNet, for RGB values in 0..1.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# A config dataclass: of a vision tower, or of CLIP's text tower.
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower, with the names of transformers and the defaults of its CLIP."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32


def read_sizes(kind: type[T], values: Mapping[str, Any], file: Path) -> T:
    """A config dataclass of a transformer from the values in `file`, with defaults for absent fields.

    Raises:
      UserError: a value has another type, the activation is unknown, or the sizes are invalid.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    values = {f.name: f.default for f in fields} | dict(values)
    config: Any = kind(**{f.name: require_type(values, f.name, type(f.default), file) for f in fields})
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"{file}: hidden_act={config.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
    # Fields with these endings are positive integers: sizes, and numbers of layers, heads and positions.
    counts = ("size", "layers", "heads", "embeddings")
    sizes = {f.name: getattr(config, f.name) for f in fields if f.name.endswith(counts)}
    if min(sizes.values()) < 1 or config.hidden_size % config.num_attention_heads:
        raise UserError(f"{file}: sizes that make no network: {', '.join(f'{k}={v}' for k, v in sizes.items())}")
    # Text towers have no patches.
    if "patch_size" in sizes and config.image_size % config.patch_size:
        raise UserError(f"{file}: image_size={config.image_size} is no multiple of patch_size={config.patch_size}")
    return config


class Embedding(nnx.Module):
    """Images to tokens: a linear map of patches, a class token in front, and positions.

    Args:
      config: sizes.
      bias: whether the linear map has a bias.
    """

    def __init__(self, config: VisionConfig, *, bias: bool, dtype: Any, rngs: nnx.Rngs):
        c = config
        self.image_size, self.patch_size, self.dtype = c.image_size, c.patch_size, dtype
        axes = (None, "embed")
        self.patch = Dense(3 * c.patch_size**2, c.hidden_size, axes=axes, bias=bias, dtype=dtype, rngs=rngs)
        self.class_token = declare_parameter(rngs, (c.hidden_size,), ("embed",))
        self.position = declare_parameter(rngs, (1 + (c.image_size // c.patch_size) ** 2, c.hidden_size), axes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[N, R, R, 3] -> [N, 1 + patches, C]; ValueError for another R than the config's"""
        r, p = self.image_size, self.patch_size
        if images.shape[1:] != (r, r, 3):
            raise ValueError(f"images {images.shape}: this tower sees {r} px")
        n = images.shape[0]
        # Cutting patches by reshape turns the strided convolution of the file into one matrix product.
        x = images.reshape(n, r // p, p, r // p, p, 3).swapaxes(2, 3)
        x = self.patch(x.reshape(n, (r // p) ** 2, p * p * 3))
        first = jnp.broadcast_to(materialize(self.class_token, self.dtype), (n, 1, x.shape[2]))
        return jnp.concatenate([first, x], axis=1) + materialize(self.position, self.dtype)


def preprocess(images: jax.Array, size: int, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> jax.Array:
    """Images for a tower: bicubic to `size`, antialiased when shrinking, normalised; differentiable.

    The filter is Catmull-Rom, as in Pillow, without the rounding to 8 bits.

    Args:
      images: float [N, R, R, 3] in [-1, 1]
      size: side in pixels
      mean_std: mean and standard deviation of RGB values in 0..1

    Returns:
      float32 [N, size, size, 3]
    """
    # float32 in every precision: the resize is part of the input, not of the tower.
    x = images.astype(jnp.float32)
    if x.shape[1] != size:
        x = jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "cubic", antialias=True)
    # Images are in [-1, 1]: the constants for 0..1 are mapped to that range.
    mean, std = (np.asarray(v, np.float32) for v in mean_std)
    return (x - (2 * mean - 1)) / (2 * std)


# ---------------------------------------------------------------- rows of key tables


def patch_matrix(x: np.ndarray) -> np.ndarray:
    """Weights of the patch convolution, [out, in, h, w] -> [h * w * in, out]."""
    return conv_to_hwio(x).reshape(-1, x.shape[0])


def norm_rows(path: str, key: str) -> list[Row]:
    """Rows of a layer norm."""
    return [Row(f"{path}/gain", f"{key}.weight"), Row(f"{path}/bias", f"{key}.bias")]


def dense_rows(path: str, key: str) -> list[Row]:
    """Rows of a linear layer with a bias."""
    return [Row(f"{path}/weight", f"{key}.weight", transpose_linear), Row(f"{path}/bias", f"{key}.bias")]


def block_rows(path: str, key: str, names: Mapping[str, str]) -> list[Row]:
    """Rows of the stacked blocks at `path`; "{}" in `key` stands for the number of a block.

    names: {part of `transformer.Block`: its name in the file}
    """
    rows = lambda part: norm_rows if part.startswith("norm") else dense_rows
    return [row for part, name in names.items() for row in rows(part)(f"{path}/{part}", f"{key}.{name}")]
