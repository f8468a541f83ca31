"""What the vision transformers here share (Dosovitskiy et al., 2021): sizes, the way in, images as they expect them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.layers.equalized import param, value
from gigagan_jax.models.pretrained.transformer import ACTIVATIONS, Dense
from gigagan_jax.models.pretrained.weights import Row, hwio, require, transposed

# ImageNet's, of the RGB values in 0..1.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower; the names of transformers, and the defaults of its CLIP."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32


def read_sizes(kind: type[T], values: Mapping[str, Any], file: Path) -> T:
    """A config dataclass of a transformer from the values in `file`, with its defaults for what is not there.

    Raises:
      UserError: a value of another type, an unknown activation, sizes that make no network.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    values = {f.name: f.default for f in fields} | dict(values)
    config: Any = kind(**{f.name: require(values, f.name, type(f.default), file) for f in fields})
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"{file}: hidden_act={config.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
    counts = ("size", "layers", "heads", "embeddings")
    sizes = {f.name: getattr(config, f.name) for f in fields if f.name.endswith(counts)}
    if min(sizes.values()) < 1 or config.hidden_size % config.num_attention_heads:
        raise UserError(f"{file}: sizes that make no network: {', '.join(f'{k}={v}' for k, v in sizes.items())}")
    if "patch_size" in sizes and config.image_size % config.patch_size:
        raise UserError(f"{file}: image_size={config.image_size} is no multiple of patch_size={config.patch_size}")
    return config


class Embedding(nnx.Module):
    """Images to tokens: patches by a matrix, a class token in front, positions added.

    Args:
      config: sizes.
      bias: has the matrix one?
    """

    def __init__(self, config: VisionConfig, *, bias: bool, dtype: Any, rngs: nnx.Rngs):
        c = config
        self.image_size, self.patch_size, self.dtype = c.image_size, c.patch_size, dtype
        axes = (None, "embed")
        self.patch = Dense(3 * c.patch_size**2, c.hidden_size, axes=axes, bias=bias, dtype=dtype, rngs=rngs)
        self.class_token = param(rngs, (c.hidden_size,), ("embed",))
        self.position = param(rngs, (1 + (c.image_size // c.patch_size) ** 2, c.hidden_size), axes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[N, R, R, 3] -> [N, 1 + patches, C]; ValueError for another R than the config's"""
        r, p = self.image_size, self.patch_size
        if images.shape[1:] != (r, r, 3):
            raise ValueError(f"images {images.shape}: this tower sees {r} px")
        n = images.shape[0]
        x = images.reshape(n, r // p, p, r // p, p, 3).swapaxes(2, 3)
        x = self.patch(x.reshape(n, (r // p) ** 2, p * p * 3))
        first = jnp.broadcast_to(value(self.class_token, self.dtype), (n, 1, x.shape[2]))
        return jnp.concatenate([first, x], axis=1) + value(self.position, self.dtype)


def preprocess(images: jax.Array, size: int, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> jax.Array:
    """Images of ours as a tower expects them, differentiably: bicubic to `size` (with antialiasing when smaller), normalised.

    Catmull-Rom, as Pillow's (without its rounding to 8 bits).

    Args:
      images: float [N, R, R, 3] in [-1, 1]
      size: side in pixels
      mean_std: of the RGB values in 0..1

    Returns:
      float32 [N, size, size, 3]
    """
    x = images.astype(jnp.float32)
    if x.shape[1] != size:
        x = jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "cubic", antialias=True)
    mean, std = (np.asarray(v, np.float32) for v in mean_std)
    return (x - (2 * mean - 1)) / (2 * std)


# ---------------------------------------------------------------- rows of key tables


def patch_matrix(x: np.ndarray) -> np.ndarray:
    """Weights of the convolution that cuts patches, [out, in, h, w] -> [h * w * in, out]."""
    return hwio(x).reshape(-1, x.shape[0])


def norm_rows(path: str, key: str) -> list[Row]:
    """Of a layer norm."""
    return [Row(f"{path}/gain", f"{key}.weight"), Row(f"{path}/bias", f"{key}.bias")]


def dense_rows(path: str, key: str) -> list[Row]:
    """Of a linear layer with a bias."""
    return [Row(f"{path}/weight", f"{key}.weight", transposed), Row(f"{path}/bias", f"{key}.bias")]


def block_rows(path: str, key: str, names: Mapping[str, str]) -> list[Row]:
    """Of the stacked blocks at `path`; `key` has the "{}" of their number.

    names: part of `layers.Block` -> its name in the file
    """
    rows = lambda part: norm_rows if part.startswith("norm") else dense_rows
    return [row for part, name in names.items() for row in rows(part)(f"{path}/{part}", f"{key}.{name}")]
