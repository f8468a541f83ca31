"""CLIP (Radford et al., 2021): text and vision towers, in the layout of transformers' CLIPModel.

One parameterised network for OpenAI's ViT-B/32, ViT-B/16, ViT-L/14 and OpenCLIP's ViT-H/14, ViT-g/14, ViT-bigG/14.
Equal to the torch classes of transformers, by tests/models/pretrained/test_clip.py.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.layers.equalized import choose_precision, declare_parameter, materialize
from gigagan_jax.models.pretrained import vit
from gigagan_jax.models.pretrained.hub import CONFIG, read_json
from gigagan_jax.models.pretrained.transformer import Block, Dense, Encoder, LayerNorm
from gigagan_jax.models.pretrained.vit import (
    Embedding,
    VisionConfig,
    block_rows,
    norm_rows,
    patch_matrix,
    read_sizes,
)
from gigagan_jax.models.pretrained.weights import Row, require_type, transpose_linear

# Mean and standard deviation of RGB values in 0..1; OpenAI's and OpenCLIP's models share them.
PIXEL_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of a text tower; the names and defaults of transformers."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """A CLIP: two towers, either of which may be absent, and the width of the space they share (0: no projection)."""

    text: TextConfig | None
    vision: VisionConfig | None
    projection_dim: int


# Width, feed-forward width, blocks, heads.
_Sizes = tuple[int, int, int, int]


def _known_config(projection: int, text: _Sizes, vision: _Sizes, patch: int, act: str) -> ClipConfig:
    return ClipConfig(TextConfig(*text, act), VisionConfig(*vision, act, patch_size=patch), projection)


# Architectures by hub id, so that a run can be planned without its weights.
# OpenAI's models use the sigmoid approximation "quick_gelu", OpenCLIP's the exact "gelu".
KNOWN = {
    "openai/clip-vit-base-patch32": _known_config(512, (512, 2048, 12, 8), (768, 3072, 12, 12), 32, "quick_gelu"),
    "openai/clip-vit-base-patch16": _known_config(512, (512, 2048, 12, 8), (768, 3072, 12, 12), 16, "quick_gelu"),
    "openai/clip-vit-large-patch14": _known_config(768, (768, 3072, 12, 12), (1024, 4096, 24, 16), 14, "quick_gelu"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _known_config(
        1024, (1024, 4096, 24, 16), (1280, 5120, 32, 16), 14, "gelu"
    ),
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": _known_config(
        1024, (1024, 4096, 24, 16), (1408, 6144, 40, 16), 14, "gelu"
    ),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": _known_config(
        1280, (1280, 5120, 32, 20), (1664, 8192, 48, 16), 14, "gelu"
    ),
}


def read_config(folder: Path) -> ClipConfig:
    """The architecture in a folder's config.json: CLIPModel, or one of its towers alone.

    Raises:
      UserError: the network is of another kind, or its sizes are invalid.
    """
    file = folder / CONFIG
    values = read_json(file)
    kind = values.get("model_type")
    if kind == "clip":
        # transformers lets the older *_config_dict win, and published weights rely on it.
        part = lambda name: require_type({name: {}} | values, name, dict, file) | (values.get(f"{name}_dict") or {})
        text = _read_text(part("text_config"), file)
        return ClipConfig(text, read_sizes(VisionConfig, part("vision_config"), file), _read_projection(values, file))
    # A tower alone has a projection only in the *WithProjection classes.
    projected = any("Projection" in str(a) for a in values.get("architectures") or ())
    projection = _read_projection(values, file) if projected else 0
    if kind == "clip_text_model":
        return ClipConfig(_read_text(values, file), None, projection)
    if kind == "clip_vision_model":
        return ClipConfig(None, read_sizes(VisionConfig, values, file), projection)
    if str(kind).startswith("siglip"):
        raise UserError(
            f"{file}: a SigLIP is no CLIP: its text tower sees no begin and no end of text, and its loss is another one; "
            "use a CLIP such as openai/clip-vit-large-patch14"
        )
    raise UserError(
        f"{file}: model_type={kind!r} is no CLIP (clip, clip_text_model or clip_vision_model); "
        "use one such as openai/clip-vit-large-patch14"
    )


def _read_projection(values: dict[str, Any], file: Path) -> int:
    width = require_type({"projection_dim": 512} | values, "projection_dim", int, file)
    # 0 would mean "no projection" further on.
    if width < 1:
        raise UserError(f"{file}: projection_dim={width} makes no network")
    return width


def _read_text(values: dict[str, Any], file: Path) -> TextConfig:
    config = read_sizes(TextConfig, values, file)
    # Old configs have eos_token_id=2 by mistake. transformers then pools at the highest id, the last of the vocabulary.
    return dataclasses.replace(config, eos_token_id=last_id(config.vocab_size)) if config.eos_token_id == 2 else config


def last_id(vocab_size: int) -> int:
    """The end-of-text token of a CLIP whose config does not tell: the last one, but for tokens that fine-tuning has added."""
    return min(vocab_size, TextConfig.vocab_size) - 1


class TextOutput(NamedTuple):
    """Outputs of the text tower.

    hidden: [N, C, D] after each number of blocks in `taps`; the penultimate layer is depth - 1
    last: [N, C, D] after all blocks and the final norm; None without `pool`
    pooled: [N, D] row of `last` at the end of text; None without `pool`
    projected: [N, P] `pooled` in the shared space, not normalised; None without `pool` or without a projection
    """

    hidden: list[jax.Array]
    last: jax.Array | None
    pooled: jax.Array | None
    projected: jax.Array | None


class ClipText(nnx.Module):
    """The text tower. Its attention is causal, so padding after the end of text does not change the features before it.

    Args:
      config: sizes.
      projection_dim: width of the shared space; 0 for none.
    """

    def __init__(
        self, config: TextConfig, projection_dim: int, *, dtype: Any = jnp.float32, remat: bool = False, rngs: nnx.Rngs
    ):
        c = config
        self.config, self.dtype = c, dtype
        self.token = declare_parameter(rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"))
        self.position = declare_parameter(rngs, (c.max_position_embeddings, c.hidden_size), (None, "embed"))
        sizes = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.hidden_act, c.layer_norm_eps)
        make = lambda: Block(*sizes, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(make, c.num_hidden_layers, remat=remat, rngs=rngs)
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype, rngs=rngs)
        project = lambda: Dense(c.hidden_size, projection_dim, axes=("embed", None), bias=False, dtype=dtype, rngs=rngs)
        self.projection = project() if projection_dim else None

    def __call__(self, tokens: jax.Array, *, taps: Sequence[int] = (), pool: bool = True) -> TextOutput:
        """tokens int32 [N, C] -> TextOutput; `taps` are numbers of blocks, `pool` runs them all."""
        c = self.config
        length = tokens.shape[1]
        # Tables are gathered in their stored precision, and the sum is cast once.
        table = lambda v: materialize(v, v[...].dtype)
        x = (table(self.token)[tokens] + table(self.position)[:length]).astype(self.dtype)
        # [C, C], True where a query may attend to a key: itself and earlier tokens.
        causal = jnp.tril(jnp.ones((length, length), bool))
        # Without `pool`, blocks after the last tap do not run.
        all_taps = (*taps, c.num_hidden_layers) if pool else tuple(taps)
        hidden = self.encoder(x, causal, taps=all_taps)
        if not pool:
            return TextOutput(hidden, None, None, None)
        last = self.norm(hidden.pop())
        # argmax finds the first end of text; rows may be padded with the same id.
        at = jax.nn.one_hot(jnp.argmax(tokens == c.eos_token_id, axis=1), length, dtype=last.dtype)
        pooled = jnp.einsum("nc,ncd->nd", at, last, precision=choose_precision(last.dtype))
        return TextOutput(hidden, last, pooled, None if self.projection is None else self.projection(pooled))


class VisionOutput(NamedTuple):
    """Outputs of the vision tower.

    hidden: [N, 1 + patches, D] after each number of blocks in `taps` (0: after the first norm);
      token 0 is the class token
    pooled: [N, D] class token after all blocks and the last norm; None without `pool`
    projected: [N, P] `pooled` in the shared space, not normalised; None without `pool` or without a projection
    """

    hidden: list[jax.Array]
    pooled: jax.Array | None
    projected: jax.Array | None


class ClipVision(nnx.Module):
    """The vision tower.

    Args:
      config: sizes.
      projection_dim: width of the shared space; 0 for none.
      scaled: whether the module holds CLIP's logit scale; the file of a vision tower alone has none.
    """

    def __init__(
        self,
        config: VisionConfig,
        projection_dim: int,
        *,
        scaled: bool = True,
        dtype: Any = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        c = config
        self.config, self.dtype = c, dtype
        self.embedding = Embedding(c, bias=False, dtype=dtype, rngs=rngs)
        self.norm_in = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype, rngs=rngs)
        sizes = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.hidden_act, c.layer_norm_eps)
        make = lambda: Block(*sizes, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(make, c.num_hidden_layers, remat=remat, rngs=rngs)
        self.norm_out = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype, rngs=rngs)
        project = lambda: Dense(c.hidden_size, projection_dim, axes=("embed", None), bias=False, dtype=dtype, rngs=rngs)
        # Projections are not sharded along the shared space, whose widths are small.
        self.projection = project() if projection_dim else None
        self.logit_scale = declare_parameter(rngs, (), ()) if scaled else None

    def __call__(self, images: jax.Array, *, taps: Sequence[int] = (), pool: bool = True) -> VisionOutput:
        """images [N, R, R, 3], normalised as `preprocess` does -> VisionOutput; `taps` are numbers of blocks"""
        c = self.config
        all_taps = (*taps, c.num_hidden_layers) if pool else tuple(taps)
        hidden = self.encoder(self.norm_in(self.embedding(images)), None, taps=all_taps)
        if not pool:
            return VisionOutput(hidden, None, None)
        # Only the class token is normalised: hidden states of patches leave the tower without the last norm.
        pooled = self.norm_out(hidden.pop()[:, 0])
        return VisionOutput(hidden, pooled, None if self.projection is None else self.projection(pooled))


def preprocess(images: jax.Array, size: int) -> jax.Array:
    """float [N, R, R, 3] in [-1, 1] -> float32 [N, size, size, 3], normalised as for CLIP; see vit.preprocess"""
    return vit.preprocess(images, size, PIXEL_MEAN_STD)


# ---------------------------------------------------------------- the key tables

# Path of a parameter in a block -> its name in the file.
_BLOCK_KEYS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def _encoder_rows(prefix: str) -> list[Row]:
    return block_rows("encoder/blocks/layer", f"{prefix}encoder.layers.{{}}", _BLOCK_KEYS)


def text_rows(prefix: str = "text_model.", *, projection: bool = True) -> list[Row]:
    """Key table of the text tower. transformers 5 writes a CLIPTextModel without the prefix."""
    return [
        Row("token", f"{prefix}embeddings.token_embedding.weight"),
        Row("position", f"{prefix}embeddings.position_embedding.weight"),
        *_encoder_rows(prefix),
        *norm_rows("norm", f"{prefix}final_layer_norm"),
        *[Row("projection/weight", "text_projection.weight", transpose_linear)] * projection,
    ]


def vision_rows(prefix: str = "vision_model.", *, projection: bool = True, scaled: bool = True) -> list[Row]:
    """Key table of the vision tower."""
    return [
        Row("embedding/class_token", f"{prefix}embeddings.class_embedding"),
        Row("embedding/patch/weight", f"{prefix}embeddings.patch_embedding.weight", patch_matrix),
        Row("embedding/position", f"{prefix}embeddings.position_embedding.weight"),
        # "layrnorm" is the spelling of transformers.
        *norm_rows("norm_in", f"{prefix}pre_layrnorm"),
        *_encoder_rows(prefix),
        *norm_rows("norm_out", f"{prefix}post_layernorm"),
        *[Row("projection/weight", "visual_projection.weight", transpose_linear)] * projection,
        # The logarithm of the scale, as stored; `FrozenNetworks.embed_images` exponentiates it.
        *[Row("logit_scale", "logit_scale")] * scaled,
    ]


def is_position_number(key: str) -> bool:
    """Whether a tensor is the buffer of position numbers that older files hold."""
    return key.endswith("embeddings.position_ids")
