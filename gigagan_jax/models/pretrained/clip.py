"""CLIP (Radford et al., 2021): text and vision towers, in the layout of transformers' CLIPModel.

One parameterised network for OpenAI's ViT-B/32, ViT-B/16, ViT-L/14 and OpenCLIP's ViT-H/14, ViT-g/14, ViT-bigG/14.
Proved equal to transformers' torch classes in tests/models/pretrained/test_clip.py.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gigagan_jax.errors import UserError
from gigagan_jax.models.layers.equalized import param
from gigagan_jax.models.pretrained.files import Row, read_json, transposed
from gigagan_jax.models.pretrained.layers import ACTIVATIONS, Block, Dense, Encoder, LayerNorm

# Of the RGB values in 0..1, for every CLIP here.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LEGACY_EOS = 2  # in old configs: the end of text is then the highest id of a row


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
    bos_token_id: int = 49406
    eos_token_id: int = 49407

    @property
    def end_id(self) -> int:
        """The token that ends a text, in old configs too."""
        return self.vocab_size - 1 if self.eos_token_id == LEGACY_EOS else self.eos_token_id


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower; the names and defaults of transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """A CLIP: two towers, either of which may be absent, and the width of the space they share (0: no projection)."""

    text: TextConfig | None
    vision: VisionConfig | None
    projection_dim: int


_Sizes = tuple[int, int, int, int]  # width, feed-forward, blocks, heads


def _known(projection: int, text: _Sizes, vision: _Sizes, patch: int, act: str) -> ClipConfig:
    return ClipConfig(TextConfig(*text, act), VisionConfig(*vision, act, patch_size=patch), projection)


# Architectures by hub id, so that a run can be planned where the weights are not.
KNOWN = {
    "openai/clip-vit-base-patch32": _known(512, (512, 2048, 12, 8), (768, 3072, 12, 12), 32, "quick_gelu"),
    "openai/clip-vit-base-patch16": _known(512, (512, 2048, 12, 8), (768, 3072, 12, 12), 16, "quick_gelu"),
    "openai/clip-vit-large-patch14": _known(768, (768, 3072, 12, 12), (1024, 4096, 24, 16), 14, "quick_gelu"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _known(1024, (1024, 4096, 24, 16), (1280, 5120, 32, 16), 14, "gelu"),
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": _known(1024, (1024, 4096, 24, 16), (1408, 6144, 40, 16), 14, "gelu"),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": _known(1280, (1280, 5120, 32, 20), (1664, 8192, 48, 16), 14, "gelu"),
}


def read_config(folder: Path) -> ClipConfig:
    """The architecture in a folder's config.json: CLIPModel, or one of its towers alone.

    Raises:
      UserError: another kind of network, or sizes that make none.
    """
    file = folder / "config.json"
    values = read_json(file)
    kind = values.get("model_type")
    if kind == "clip":
        # As transformers does: the older *_config_dict wins.
        part = lambda name: (values.get(name) or {}) | (values.get(f"{name}_dict") or {})
        text, vision = part("text_config"), part("vision_config")
        projection = values.get("projection_dim", 512)
        return ClipConfig(_read(TextConfig, text, file), _read(VisionConfig, vision, file), projection)
    projected = any("Projection" in str(a) for a in values.get("architectures") or ())
    projection = values.get("projection_dim", 512) if projected else 0
    if kind == "clip_text_model":
        return ClipConfig(_read(TextConfig, values, file), None, projection)
    if kind == "clip_vision_model":
        return ClipConfig(None, _read(VisionConfig, values, file), projection)
    raise UserError(f"{file}: model_type={kind!r} is no CLIP (clip, clip_text_model or clip_vision_model)")


def _read(kind: Any, values: dict[str, Any], file: Path) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    taken = {k: v for k, v in values.items() if k in fields}
    for name, value in taken.items():
        expected = type(fields[name].default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if expected is float else expected):
            raise UserError(f"{file}: {name}={value!r} is not {expected.__name__}; is it the config of a CLIP?")
    config = kind(**taken)
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"{file}: hidden_act={config.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
    sizes = {n: getattr(config, n) for n in fields if n.endswith(("size", "layers", "heads", "embeddings"))}
    if min(sizes.values()) < 1 or config.hidden_size % config.num_attention_heads:
        raise UserError(f"{file}: sizes that make no network: {', '.join(f'{k}={v}' for k, v in sizes.items())}")
    if kind is VisionConfig and config.image_size % config.patch_size:
        raise UserError(f"{file}: image_size={config.image_size} is no multiple of patch_size={config.patch_size}")
    return config


class TextOutput(NamedTuple):
    """What the text tower says.

    hidden: [N, C, D] after each asked-for number of blocks; the penultimate is depth - 1
    last: [N, C, D] after all blocks and the final norm; None unless asked for
    pooled: [N, D] of it at the end of text; None likewise
    projected: [N, P] its embedding in the shared space, not normalised; None likewise, and where there is no projection
    """

    hidden: list[jax.Array]
    last: jax.Array | None
    pooled: jax.Array | None
    projected: jax.Array | None


class ClipText(nnx.Module):
    """The text tower: causal, so that what follows the end of text does not matter before it.

    Args:
      config: sizes.
      projection_dim: width of the shared space; 0 for none.
    """

    def __init__(
        self, config: TextConfig, projection_dim: int, *, dtype: Any = jnp.float32, remat: bool = False, rngs: nnx.Rngs
    ):
        c = config
        self.config, self.dtype = c, dtype
        self.token = param(rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"))
        self.position = param(rngs, (c.max_position_embeddings, c.hidden_size), (None, "embed"))
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
        x = (self.token[...][tokens] + self.position[...][:length]).astype(self.dtype)
        causal = jnp.tril(jnp.ones((length, length), bool))
        asked = (*taps, c.num_hidden_layers) if pool else tuple(taps)
        hidden = self.encoder(x, causal, taps=asked)
        if not pool:
            return TextOutput(hidden, None, None, None)
        last = self.norm(hidden.pop())
        at = jax.nn.one_hot(end_of_text(tokens, c.eos_token_id), length, dtype=last.dtype)
        pooled = jnp.einsum("nc,ncd->nd", at, last)
        return TextOutput(hidden, last, pooled, None if self.projection is None else self.projection(pooled))


def end_of_text(tokens: jax.Array, eos_token_id: int) -> jax.Array:
    """Place of the end-of-text token in each row, int32 [N]: the first of that id; by an old config, of the highest id."""
    if eos_token_id == LEGACY_EOS:
        return jnp.argmax(tokens, axis=1).astype(jnp.int32)
    return jnp.argmax(tokens == eos_token_id, axis=1).astype(jnp.int32)


class VisionOutput(NamedTuple):
    """What the vision tower says.

    hidden: [N, 1 + patches, D] after each asked-for number of blocks (0: after the first norm); token 0 is the class token
    pooled: [N, D] class token after all blocks and the last norm; None unless asked for
    projected: [N, P] its embedding in the shared space, not normalised; None likewise, and where there is no projection
    """

    hidden: list[jax.Array]
    pooled: jax.Array | None
    projected: jax.Array | None


class ClipVision(nnx.Module):
    """The vision tower.

    Args:
      config: sizes.
      projection_dim: width of the shared space; 0 for none.
      scaled: does CLIP's logit scale come with it (a vision tower alone has none)?
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
        self.grid = c.image_size // c.patch_size
        self.patch = Dense(3 * c.patch_size**2, c.hidden_size, axes=(None, "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.class_token = param(rngs, (c.hidden_size,), ("embed",))
        self.position = param(rngs, (1 + self.grid**2, c.hidden_size), (None, "embed"))
        self.norm_in = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype, rngs=rngs)
        sizes = (c.hidden_size, c.intermediate_size, c.num_attention_heads, c.hidden_act, c.layer_norm_eps)
        make = lambda: Block(*sizes, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(make, c.num_hidden_layers, remat=remat, rngs=rngs)
        self.norm_out = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype, rngs=rngs)
        project = lambda: Dense(c.hidden_size, projection_dim, axes=("embed", None), bias=False, dtype=dtype, rngs=rngs)
        self.projection = project() if projection_dim else None
        self.logit_scale = param(rngs, (), ()) if scaled else None

    def __call__(self, images: jax.Array, *, taps: Sequence[int] = (), pool: bool = True) -> VisionOutput:
        """images [N, R, R, 3], normalised as `preprocess` does -> VisionOutput; `taps` are numbers of blocks"""
        c = self.config
        if images.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"images {images.shape}: this tower sees {c.image_size} px")
        x = self.patch(patches(images, c.patch_size))
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + self.position[...].astype(self.dtype)
        asked = (*taps, c.num_hidden_layers) if pool else tuple(taps)
        hidden = self.encoder(self.norm_in(x), None, taps=asked)
        if not pool:
            return VisionOutput(hidden, None, None)
        pooled = self.norm_out(hidden.pop()[:, 0])
        return VisionOutput(hidden, pooled, None if self.projection is None else self.projection(pooled))


def patches(images: jax.Array, size: int) -> jax.Array:
    """[N, R, R, C] -> [N, (R / size)^2, size * size * C]"""
    n, r, _, c = images.shape
    x = images.reshape(n, r // size, size, r // size, size, c).swapaxes(2, 3)
    return x.reshape(n, (r // size) ** 2, size * size * c)


def preprocess(images: jax.Array, size: int) -> jax.Array:
    """Images of ours as a CLIP expects them, differentiably: bicubic to `size` (with antialiasing when smaller), normalised.

    images float [N, R, R, 3] in [-1, 1] -> float32 [N, size, size, 3]
    """
    x = resize(images.astype(jnp.float32), size)
    mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
    return (x - (2 * mean - 1)) / (2 * std)


def resize(images: jax.Array, size: int) -> jax.Array:
    """[N, R, R, C] -> [N, size, size, C], Catmull-Rom bicubic as in Pillow (without its rounding to 8 bits)."""
    if images.shape[1] == size:
        return images
    return jax.image.resize(images, (images.shape[0], size, size, images.shape[3]), "cubic", antialias=True)


# ---------------------------------------------------------------- the key tables


def _patch(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _norm(path: str, key: str) -> list[Row]:
    return [Row(f"{path}/gain", f"{key}.weight"), Row(f"{path}/bias", f"{key}.bias")]


def _dense(path: str, key: str) -> list[Row]:
    return [Row(f"{path}/weight", f"{key}.weight", transposed), Row(f"{path}/bias", f"{key}.bias")]


def _blocks(prefix: str) -> list[Row]:
    ours, theirs = "encoder/blocks/layer", f"{prefix}encoder.layers.{{}}"
    return [
        *_norm(f"{ours}/norm1", f"{theirs}.layer_norm1"),
        *_norm(f"{ours}/norm2", f"{theirs}.layer_norm2"),
        *_dense(f"{ours}/attention/query", f"{theirs}.self_attn.q_proj"),
        *_dense(f"{ours}/attention/key", f"{theirs}.self_attn.k_proj"),
        *_dense(f"{ours}/attention/value", f"{theirs}.self_attn.v_proj"),
        *_dense(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj"),
        *_dense(f"{ours}/up", f"{theirs}.mlp.fc1"),
        *_dense(f"{ours}/down", f"{theirs}.mlp.fc2"),
    ]


def text_rows(prefix: str = "text_model.", *, projection: bool = True) -> list[Row]:
    """The text tower's table. transformers 5 writes a CLIPTextModel without the prefix."""
    return [
        Row("token", f"{prefix}embeddings.token_embedding.weight"),
        Row("position", f"{prefix}embeddings.position_embedding.weight"),
        *_blocks(prefix),
        *_norm("norm", f"{prefix}final_layer_norm"),
        *[Row("projection/weight", "text_projection.weight", transposed)] * projection,
    ]


def vision_rows(prefix: str = "vision_model.", *, projection: bool = True, scaled: bool = True) -> list[Row]:
    """The vision tower's table."""
    return [
        Row("class_token", f"{prefix}embeddings.class_embedding"),
        Row("patch/weight", f"{prefix}embeddings.patch_embedding.weight", _patch),
        Row("position", f"{prefix}embeddings.position_embedding.weight"),
        *_norm("norm_in", f"{prefix}pre_layrnorm"),
        *_blocks(prefix),
        *_norm("norm_out", f"{prefix}post_layernorm"),
        *[Row("projection/weight", "visual_projection.weight", transposed)] * projection,
        *[Row("logit_scale", "logit_scale")] * scaled,
    ]


def is_position_number(key: str) -> bool:
    """Buffers of older files that only count."""
    return key.endswith("embeddings.position_ids")
