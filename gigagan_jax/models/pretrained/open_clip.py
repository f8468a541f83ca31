"""CLIPs in open_clip's layout: its config, and its names as those of transformers.

OpenAI's own files have the same names. Models with parts that transformers' CLIP lacks are refused.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained.clip import PIXEL_MEAN_STD, ClipConfig, TextConfig
from gigagan_jax.models.pretrained.hub import read_json
from gigagan_jax.models.pretrained.vit import VisionConfig, read_sizes
from gigagan_jax.models.pretrained.weights import require_type

# Defaults of open_clip 2 and 3.
_TEXT = {"width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408}
_VISION = {"width": 768, "head_width": 64, "layers": 12, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
# Fields that leave the network as it is: with this value, or (...) with any.
_TEXT_ALLOWED: dict[str, Any] = {"pool_type": "argmax", "no_causal_mask": False, "proj_bias": False, "embed_cls": False}
_VISION_ALLOWED: dict[str, Any] = {
    "pool_type": "tok",
    "patch_dropout": ...,
    "attentional_pool": False,
    "global_average_pool": False,
    "no_ln_pre": False,
    "input_patchnorm": False,
    "final_ln_after_pool": False,
    "pos_embed_type": "learnable",
    "output_tokens": ...,
}
_MODEL_ALLOWED: dict[str, Any] = {
    "embed_dim": ...,
    "text_cfg": ...,
    "vision_cfg": ...,
    "quick_gelu": ...,
    "custom_text": ...,
    "init_logit_scale": ...,
    "cast_dtype": ...,
}


def read_config(file: Path) -> ClipConfig:
    """The architecture in an open_clip_config.json.

    Raises:
      UserError: the network has parts that transformers' CLIP lacks, or its sizes are invalid.
    """
    model = require_type(read_json(file), "model_cfg", dict, file)
    _check_fields(file, "model_cfg", model, _MODEL_ALLOWED)
    text = require_type(model, "text_cfg", dict, file)
    vision = require_type(model, "vision_cfg", dict, file)
    _check_fields(file, "text_cfg", text, _TEXT_ALLOWED | dict.fromkeys(_TEXT, ...))
    _check_fields(file, "vision_cfg", vision, _VISION_ALLOWED | dict.fromkeys(_VISION, ...))
    _check_pixels(file)
    # OpenAI's models have the sigmoid approximation.
    act = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    t, v = _TEXT | text, _VISION | vision
    for part in (t, v):
        for name in part.keys() & {"width", "heads", "layers", "head_width"}:
            require_type(part, name, int, file)
    widths = lambda part: {
        "hidden_size": part["width"],
        "intermediate_size": int(part["width"] * part["mlp_ratio"]),
        "num_hidden_layers": part["layers"],
    }
    positions = {"max_position_embeddings": t["context_length"], "vocab_size": t["vocab_size"]}
    # open_clip pools at the highest id, which is the last of the vocabulary.
    ends = {"num_attention_heads": t["heads"], "eos_token_id": t["vocab_size"] - 1}
    patches = {"image_size": v["image_size"], "patch_size": v["patch_size"]}
    heads = {"num_attention_heads": max(1, v["width"] // max(1, v["head_width"]))}
    return ClipConfig(
        read_sizes(TextConfig, widths(t) | act | positions | ends, file),
        read_sizes(VisionConfig, widths(v) | act | patches | heads, file),
        require_type(model, "embed_dim", int, file),
    )


def _check_fields(file: Path, part: str, values: Mapping[str, Any], allowed: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is None or (name in allowed and allowed[name] in (..., value)):
            continue
        raise UserError(
            f"{file}: {part}.{name}={value!r} makes a network that is no CLIP of transformers; "
            "use a CLIP such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        )


def _check_pixels(file: Path) -> None:
    values = read_json(file).get("preprocess_cfg") or {}
    for name, ours in zip(("mean", "std"), PIXEL_MEAN_STD, strict=True):
        # Transformers keeps these in a file of the image processor, which is not read: all of its CLIPs share them.
        theirs = values.get(name)
        if theirs is not None and not np.allclose(theirs, ours, atol=1e-4):
            raise UserError(
                f"{file}: preprocess_cfg.{name}={theirs}: only CLIP's own {name} is built; use another CLIP"
            )


# ---------------------------------------------------------------- names

# (name in the file, name of transformers) in a block
_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_PARTS = ("q_proj", "k_proj", "v_proj")
# (name in the file, name of transformers); {}: weight and bias
_TEXT_NAMES = (
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.{}", "text_model.final_layer_norm.{}"),
)
_VISION_NAMES = (
    ("class_embedding", "vision_model.embeddings.class_embedding"),
    ("conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("ln_pre.{}", "vision_model.pre_layrnorm.{}"),
    ("ln_post.{}", "vision_model.post_layernorm.{}"),
)
Table = dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]


def is_open_clip(keys: Collection[str]) -> bool:
    """Whether tensors have open_clip's names."""
    return any(k in keys for k in ("token_embedding.weight", "text.token_embedding.weight", "visual.class_embedding"))


def name_table(keys: Collection[str], *, whole: bool) -> Table:
    """{name of transformers: (name in the file, transform)} of the tensors of a CLIP.

    Args:
      keys: names of all tensors in the file.
      whole: every tensor must be known: nothing but a CLIP is in the file.

    Raises:
      ValueError: a tensor has no counterpart; its name.
    """
    # Models with `custom_text` keep the text tower under a name of its own.
    text = "text." if "text.token_embedding.weight" in keys else ""
    table: Table = {"logit_scale": ("logit_scale", as_stored)}
    for prefix, names in ((text, _TEXT_NAMES), ("visual.", _VISION_NAMES)):
        for theirs, name in names:
            for kind in ("weight", "bias") if "{}" in theirs else ("",):
                table[name.format(kind)] = (prefix + theirs.format(kind), as_stored)
    # Projections are matrices to multiply by from the right, and linear layers of transformers.
    table["text_projection.weight"] = (f"{text}text_projection", np.transpose)
    table["visual_projection.weight"] = ("visual.proj", np.transpose)
    for prefix, tower in ((text, "text_model"), ("visual.", "vision_model")):
        pattern = re.compile(re.escape(f"{prefix}transformer.resblocks.") + r"(\d+)\.ln_1\.weight")
        for match in filter(None, map(pattern.fullmatch, keys)):
            block = f"{prefix}transformer.resblocks.{match[1]}."
            table |= _block_table(block, f"{tower}.encoder.layers.{match[1]}.")
    # A file may hold one tower.
    table = {name: row for name, row in table.items() if row[0] in keys}
    # attn_mask: a buffer of OpenAI's files. Three numbers of OpenAI's archives describe the sizes.
    known = {row[0] for row in table.values()} | {
        f"{text}attn_mask",
        "input_resolution",
        "context_length",
        "vocab_size",
    }
    unknown = sorted(set(keys) - known)
    if unknown and whole:
        raise ValueError(unknown[0])
    return table


def _block_table(block: str, ours: str) -> Table:
    kinds = ("weight", "bias")
    table: Table = {
        f"{ours}{name}.{kind}": (f"{block}{theirs}.{kind}", as_stored) for theirs, name in _BLOCK for kind in kinds
    }
    for i, part in enumerate(_PARTS):
        for kind in kinds:
            # Query, key and value lie in one tensor, one below the other.
            table[f"{ours}self_attn.{part}.{kind}"] = (f"{block}attn.in_proj_{kind}", functools.partial(_third, i=i))
    return table


def _third(x: np.ndarray, i: int) -> np.ndarray:
    return np.split(x, 3)[i]


def as_stored(x: np.ndarray) -> np.ndarray:
    """The tensor itself."""
    return x
