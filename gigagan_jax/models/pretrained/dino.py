"""DINO (Caron et al., 2021): self-supervised vision transformers, in the layout of transformers' ViTModel.

StyleGAN-T (Sauer et al., 2023) puts its discriminator on the ViT-S/16. Proved equal to transformers' torch class in
tests/models/pretrained/test_dino.py.
"""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gigagan_jax.errors import UserError
from gigagan_jax.models.layers.equalized import param
from gigagan_jax.models.pretrained.clip import patches, resize
from gigagan_jax.models.pretrained.files import CONFIG, Row, hwio, read_json, require, transposed
from gigagan_jax.models.pretrained.layers import ACTIVATIONS, Block, Dense, Encoder, LayerNorm

# ImageNet's, of the RGB values in 0..1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    """Sizes of a tower; the names and defaults of transformers' ViTConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16


# Architectures by hub id, so that a run can be planned where the weights are not.
KNOWN = {
    "facebook/dino-vits16": DinoConfig(384, 1536, 12, 6, patch_size=16),
    "facebook/dino-vits8": DinoConfig(384, 1536, 12, 6, patch_size=8),
    "facebook/dino-vitb16": DinoConfig(768, 3072, 12, 12, patch_size=16),
    "facebook/dino-vitb8": DinoConfig(768, 3072, 12, 12, patch_size=8),
}


def read_config(folder: Path) -> DinoConfig:
    """The architecture in a folder's config.json.

    Raises:
      UserError: another kind of network, or sizes that make none.
    """
    file = folder / CONFIG
    values = read_json(file)
    if values.get("model_type") != "vit":
        raise UserError(f"{file}: model_type={values.get('model_type')!r} is no DINO (vit); give the folder of one")
    fields = dataclasses.fields(DinoConfig)
    values = {f.name: f.default for f in fields} | values
    config = DinoConfig(**{f.name: require(values, f.name, type(f.default), file) for f in fields})
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"{file}: hidden_act={config.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
    for name, only in (("qkv_bias", True), ("num_channels", 3)):
        if values.get(name, only) != only:
            raise UserError(f"{file}: {name}={values[name]!r}: a DINO has {name}={only}; is it another network?")
    sizes = {f.name: getattr(config, f.name) for f in fields if f.name.endswith(("size", "layers", "heads"))}
    if min(sizes.values()) < 1 or config.hidden_size % config.num_attention_heads:
        raise UserError(f"{file}: sizes that make no network: {', '.join(f'{k}={v}' for k, v in sizes.items())}")
    if config.image_size % config.patch_size:
        raise UserError(f"{file}: image_size={config.image_size} is no multiple of patch_size={config.patch_size}")
    return config


class DinoOutput(NamedTuple):
    """What the tower says; token 0 is the class token.

    hidden: [N, 1 + patches, D] after each asked-for number of blocks (0: what the first block sees)
    last: [N, 1 + patches, D] after all blocks and the final norm; None unless asked for
    """

    hidden: list[jax.Array]
    last: jax.Array | None


class Dino(nnx.Module):
    """The tower.

    Args:
      config: sizes.
      dtype: of the computation.
      remat: recompute each block in the backward pass.
    """

    def __init__(self, config: DinoConfig, *, dtype: Any = jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        c = config
        self.config, self.dtype = c, dtype
        self.patch = Dense(3 * c.patch_size**2, c.hidden_size, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.class_token = param(rngs, (c.hidden_size,), ("embed",))
        self.position = param(rngs, (1 + (c.image_size // c.patch_size) ** 2, c.hidden_size), (None, "embed"))
        sizes = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.hidden_act, c.layer_norm_eps)
        make = lambda: Block(*sizes, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(make, c.num_hidden_layers, remat=remat, rngs=rngs)
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, taps: Sequence[int] = (), pool: bool = True) -> DinoOutput:
        """images [N, R, R, 3], normalised as `preprocess` does -> DinoOutput; `taps` are numbers of blocks, `pool` runs all"""
        c = self.config
        if images.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"images {images.shape}: this tower sees {c.image_size} px")
        x = self.patch(patches(images, c.patch_size))
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + self.position[...].astype(self.dtype)
        asked = (*taps, c.num_hidden_layers) if pool else tuple(taps)
        hidden = self.encoder(x, None, taps=asked)
        return DinoOutput(hidden, self.norm(hidden.pop()) if pool else None)


def preprocess(images: jax.Array, size: int) -> jax.Array:
    """Images of ours as a DINO expects them, differentiably: bicubic to `size` (with antialiasing when smaller), normalised.

    images float [N, R, R, 3] in [-1, 1] -> float32 [N, size, size, 3]
    """
    x = resize(images.astype(jnp.float32), size)
    mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
    return (x - (2 * mean - 1)) / (2 * std)


# ---------------------------------------------------------------- the key table

# Parameters of a block as files name them, and as transformers 5 does in memory (and in files where it is told to).
_FILE = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_INSIDE = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.o_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_PREFIX = "vit."


def _pair(path: str, key: str) -> list[Row]:
    weight = Row(f"{path}/weight", f"{key}.weight", transposed)
    if "norm" in path:
        weight = Row(f"{path}/gain", f"{key}.weight")
    return [weight, Row(f"{path}/bias", f"{key}.bias")]


def rows(keys: Collection[str], config: DinoConfig) -> list[Row]:
    """The tower's table.

    Args:
      keys: of all tensors in the file: names differ between writers, and models with a head put "vit." before them.
      config: sizes; the names do not depend on them.
    """
    prefix = _PREFIX if any(k.startswith(_PREFIX) for k in keys) else ""
    inside = any(k.startswith(f"{prefix}layers.") for k in keys)
    blocks, names = ("layers", _INSIDE) if inside else ("encoder.layer", _FILE)
    table = [
        Row("class_token", f"{prefix}embeddings.cls_token", lambda x: x.reshape(-1)),
        Row("position", f"{prefix}embeddings.position_embeddings", lambda x: x.reshape(x.shape[-2:])),
        Row(
            "patch/weight",
            f"{prefix}embeddings.patch_embeddings.projection.weight",
            lambda x: hwio(x).reshape(-1, x.shape[0]),
        ),
        Row("patch/bias", f"{prefix}embeddings.patch_embeddings.projection.bias"),
        *_pair("norm", f"{prefix}layernorm"),
    ]
    for path, key in names.items():
        table += _pair(f"encoder/blocks/layer/{path}", f"{prefix}{blocks}.{{}}.{key}")
    return table


def ignored(key: str) -> bool:
    """The pooler, which DINO was not trained with: transformers adds it, drawn at random, where nobody asks it not to."""
    return key.removeprefix(_PREFIX).startswith("pooler.")
