"""DINO (Caron et al., 2021): self-supervised vision transformers, in the layout of transformers' ViTModel.

StyleGAN-T (Sauer et al., 2023) puts its discriminator on the ViT-S/16. Proved equal to transformers' torch class in
tests/models/pretrained/test_dino.py.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained import vit
from gigagan_jax.models.pretrained.hub import CONFIG, read_json
from gigagan_jax.models.pretrained.transformer import Block, Encoder, LayerNorm
from gigagan_jax.models.pretrained.vit import (
    Embedding,
    VisionConfig,
    block_rows,
    norm_rows,
    patch_matrix,
    read_sizes,
)
from gigagan_jax.models.pretrained.weights import Row

# What a config.json leaves out.
_DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "patch_size": 16}


def _known(width: int, heads: int, patch: int) -> VisionConfig:
    return VisionConfig(width, 4 * width, 12, heads, **_DEFAULTS | {"patch_size": patch})  # type: ignore[arg-type]


# Architectures by hub id, so that a run can be planned where the weights are not.
KNOWN = {
    "facebook/dino-vits16": _known(384, 6, 16),
    "facebook/dino-vits8": _known(384, 6, 8),
    "facebook/dino-vitb16": _known(768, 12, 16),
    "facebook/dino-vitb8": _known(768, 12, 8),
}


def read_config(folder: Path) -> VisionConfig:
    """The architecture in a folder's config.json.

    Raises:
      UserError: another kind of network, or sizes that make none.
    """
    file = folder / CONFIG
    values = read_json(file)
    if values.get("model_type") != "vit":
        raise UserError(f"{file}: model_type={values.get('model_type')!r} is no DINO (vit); give the folder of one")
    for name, only in (("qkv_bias", True), ("num_channels", 3)):
        if values.get(name, only) != only:
            raise UserError(f"{file}: {name}={values[name]!r}: a DINO has {name}={only}; is it another network?")
    return read_sizes(VisionConfig, _DEFAULTS | values, file)


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

    def __init__(self, config: VisionConfig, *, dtype: Any = jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        c = config
        self.config, self.dtype = c, dtype
        self.embedding = Embedding(c, bias=True, dtype=dtype, rngs=rngs)
        sizes = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.hidden_act, c.layer_norm_eps)
        make = lambda: Block(*sizes, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(make, c.num_hidden_layers, remat=remat, rngs=rngs)
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, taps: Sequence[int] = (), pool: bool = True) -> DinoOutput:
        """images [N, R, R, 3], normalised as `preprocess` does -> DinoOutput; `taps` are numbers of blocks, `pool` runs all"""
        c = self.config
        asked = (*taps, c.num_hidden_layers) if pool else tuple(taps)
        hidden = self.encoder(self.embedding(images), None, taps=asked)
        return DinoOutput(hidden, self.norm(hidden.pop()) if pool else None)


def preprocess(images: jax.Array, size: int) -> jax.Array:
    """float [N, R, R, 3] in [-1, 1] -> float32 [N, size, size, 3], as a DINO expects them; see vit.preprocess"""
    return vit.preprocess(images, size, vit.IMAGENET)


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


def rows(keys: Collection[str], config: VisionConfig) -> list[Row]:
    """The tower's table.

    Args:
      keys: of all tensors in the file: names differ between writers, and models with a head put "vit." before them.
      config: sizes; the names do not depend on them.
    """
    prefix = _PREFIX if any(k.startswith(_PREFIX) for k in keys) else ""
    inside = any(k.startswith(f"{prefix}layers.") for k in keys)
    blocks, names = ("layers", _INSIDE) if inside else ("encoder.layer", _FILE)
    embeddings = f"{prefix}embeddings"
    return [
        Row("embedding/class_token", f"{embeddings}.cls_token", lambda x: x.reshape(-1)),
        Row("embedding/position", f"{embeddings}.position_embeddings", lambda x: x.reshape(x.shape[-2:])),
        Row("embedding/patch/weight", f"{embeddings}.patch_embeddings.projection.weight", patch_matrix),
        Row("embedding/patch/bias", f"{embeddings}.patch_embeddings.projection.bias"),
        *norm_rows("norm", f"{prefix}layernorm"),
        *block_rows("encoder/blocks/layer", f"{prefix}{blocks}.{{}}", names),
    ]


def ignored(key: str) -> bool:
    """The pooler, which DINO was not trained with: transformers adds it, drawn at random, where nobody asks it not to."""
    return key.removeprefix(_PREFIX).startswith("pooler.")
