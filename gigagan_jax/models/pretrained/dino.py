"""DINO (Caron et al., 2021): self-supervised vision transformers, in the layout of transformers' ViTModel.

StyleGAN-T (Sauer et al., 2023) puts its discriminator on the ViT-S/16. Equal to the torch class of transformers,
by tests/models/pretrained/test_dino.py.
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

# Defaults of transformers' ViTConfig, for fields that a config.json leaves out.
_DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "patch_size": 16}


def _known_config(width: int, heads: int, patch: int) -> VisionConfig:
    return VisionConfig(width, 4 * width, 12, heads, **_DEFAULTS | {"patch_size": patch})  # type: ignore[arg-type]


# Architectures by hub id, so that a run can be planned without its weights.
KNOWN = {
    "facebook/dino-vits16": _known_config(384, 6, 16),
    "facebook/dino-vits8": _known_config(384, 6, 8),
    "facebook/dino-vitb16": _known_config(768, 12, 16),
    "facebook/dino-vitb8": _known_config(768, 12, 8),
}


def read_config(folder: Path) -> VisionConfig:
    """The architecture in a folder's config.json.

    Raises:
      UserError: the network is of another kind, or its sizes are invalid.
    """
    file = folder / CONFIG
    values = read_json(file)
    if values.get("model_type") != "vit":
        raise UserError(f"{file}: model_type={values.get('model_type')!r} is no DINO (vit); give the folder of one")
    # These fields change the network without changing a size that the key table would notice.
    for name, only in (("qkv_bias", True), ("num_channels", 3)):
        if values.get(name, only) != only:
            raise UserError(f"{file}: {name}={values[name]!r}: a DINO has {name}={only}; give the folder of one")
    return read_sizes(VisionConfig, _DEFAULTS | values, file)


class DinoOutput(NamedTuple):
    """Outputs of the tower; token 0 is the class token.

    hidden: [N, 1 + patches, D] after each number of blocks in `taps` (0: the input of the first block)
    last: [N, 1 + patches, D] after all blocks and the final norm; None without `pool`
    """

    hidden: list[jax.Array]
    last: jax.Array | None


class Dino(nnx.Module):
    """The vision transformer.

    Args:
      config: sizes.
      dtype: precision of the computation.
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
        """images [N, R, R, 3] from `preprocess` -> DinoOutput; `taps` are numbers of blocks, `pool` runs all blocks"""
        c = self.config
        # Without `pool`, blocks after the last tap do not run.
        all_taps = (*taps, c.num_hidden_layers) if pool else tuple(taps)
        hidden = self.encoder(self.embedding(images), None, taps=all_taps)
        return DinoOutput(hidden, self.norm(hidden.pop()) if pool else None)


def preprocess(images: jax.Array, size: int) -> jax.Array:
    """float [N, R, R, 3] in [-1, 1] -> float32 [N, size, size, 3], normalised as for DINO; see vit.preprocess"""
    return vit.preprocess(images, size, vit.IMAGENET)


# ---------------------------------------------------------------- the key table

# Names of a block's parameters. Files use the first; transformers 5 uses the second in memory, and in files on request.
_FILE_KEYS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_MEMORY_KEYS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.o_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
# Models with a classification head put this before the names of the tower.
_PREFIX = "vit."


def dino_rows(keys: Collection[str], config: VisionConfig) -> list[Row]:
    """Key table of the tower.

    Args:
      keys: names of all tensors in the file; they differ between writers.
      config: sizes; the names do not depend on them.
    """
    # The names of the file decide, since nothing in config.json tells the writers apart.
    prefix = _PREFIX if any(k.startswith(_PREFIX) for k in keys) else ""
    # Only the names of transformers 5 begin with "layers.".
    inside = any(k.startswith(f"{prefix}layers.") for k in keys)
    blocks, names = ("layers", _MEMORY_KEYS) if inside else ("encoder.layer", _FILE_KEYS)
    embeddings = f"{prefix}embeddings"
    return [
        # Files hold the class token as [1, 1, C] and the positions as [1, 1 + patches, C].
        Row("embedding/class_token", f"{embeddings}.cls_token", lambda x: x.reshape(-1)),
        Row("embedding/position", f"{embeddings}.position_embeddings", lambda x: x.reshape(x.shape[-2:])),
        Row("embedding/patch/weight", f"{embeddings}.patch_embeddings.projection.weight", patch_matrix),
        Row("embedding/patch/bias", f"{embeddings}.patch_embeddings.projection.bias"),
        *norm_rows("norm", f"{prefix}layernorm"),
        *block_rows("encoder/blocks/layer", f"{prefix}{blocks}.{{}}", names),
    ]


def is_ignored(key: str) -> bool:
    """Whether a tensor is of the pooler: transformers adds it with random weights, and DINO was trained without it."""
    return key.removeprefix(_PREFIX).startswith("pooler.")
