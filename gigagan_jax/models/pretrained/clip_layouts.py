"""Opens a CLIP in any of its layouts: the names of its tensors become those of transformers, and so does its config.

The names decide and not the config: open_clip's config may lie beside transformers' weights. A single file without a config
gets its sizes from the shapes of its tensors.
"""

import functools
import logging
from collections.abc import Collection
from pathlib import Path

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained import clip, open_clip
from gigagan_jax.models.pretrained.clip import ClipConfig, TextConfig
from gigagan_jax.models.pretrained.hub import CONFIG, OPEN_CLIP_CONFIG
from gigagan_jax.models.pretrained.network_files import NetworkFiles
from gigagan_jax.models.pretrained.vit import VisionConfig
from gigagan_jax.models.pretrained.weights import RenamedWeights, Weights

_log = logging.getLogger(__name__)
# Every CLIP has one of these tensors; with the name of its tower, or, of a tower alone, without.
_ANCHORS = ("text_model.embeddings.token_embedding.weight", "vision_model.embeddings.class_embedding")
_BARE_ANCHORS = ("embeddings.token_embedding.weight", "embeddings.class_embedding")
_OPEN_CLIP_ANCHORS = ("token_embedding.weight", "visual.class_embedding")


def read_config(files: NetworkFiles) -> ClipConfig:
    """The architecture of a CLIP.

    Raises:
      UserError: it is no CLIP, its sizes are invalid, or they follow from neither a config nor the weights.
    """
    if files.config is None:
        return _config_from_shapes(files.weights, files.weights.stat().st_mtime_ns)
    if files.config.name == OPEN_CLIP_CONFIG:
        return open_clip.read_config(files.config)
    return clip.read_config(files.folder)


def open_weights(files: NetworkFiles) -> Weights:
    """The tensors of a CLIP under the names of transformers.

    Raises:
      UserError: a file is damaged, or holds two CLIPs.
    """
    weights = Weights(files.folder, single=files.weights.name)
    keys = weights.keys()
    found = (_find_prefix(keys, anchors, files) for anchors in (_ANCHORS, _BARE_ANCHORS, _OPEN_CLIP_ANCHORS))
    prefix = next((p for p in found if p is not None), "")
    # Other tensors belong to the larger model around the CLIP.
    short = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}
    if open_clip.is_open_clip(short):
        try:
            table = open_clip.name_table(short, whole=not prefix)
        except ValueError as e:
            raise UserError(
                f"{files.weights}: {e} is no tensor of a CLIP in open_clip's layout; "
                "use one such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
            ) from None
        return RenamedWeights(weights, {name: (short[key], change) for name, (key, change) in table.items()})
    return (
        RenamedWeights(weights, {name: (key, open_clip.as_stored) for name, key in short.items()})
        if prefix
        else weights
    )


def _find_prefix(keys: Collection[str], anchors: tuple[str, ...], files: NetworkFiles) -> str | None:
    """What precedes a CLIP's names in a file, as "clip."; None where it has none of the anchors."""
    # `custom_text` of open_clip puts a name before the text tower, which name_table knows.
    found = {k.removesuffix(a).removesuffix("text.") for a in anchors for k in keys if k.endswith(a)}
    found = {p for p in found if not p or p.endswith(".")}
    # The names as they are win over a copy of them inside, such as an average.
    if "" in found or not found:
        return "" if found else None
    if len(found) > 1:
        raise UserError(
            f"{files.weights} holds {len(found)} CLIPs ({', '.join(sorted(found))}): give a file with one of them"
        )
    return found.pop()


# ---------------------------------------------------------------- sizes without a config


@functools.lru_cache(maxsize=16)
def _config_from_shapes(file: Path, modified: int) -> ClipConfig:
    """Sizes of the CLIP in a file; the numbers of heads and the activation are those of the published CLIP of these sizes."""
    weights = open_weights(NetworkFiles(file.parent, file, None))
    keys = weights.keys()
    text = _text_from_shapes(weights, keys)
    vision = _vision_from_shapes(weights, keys)
    # The width of the shared space is that of either projection.
    ends = [weights.shape_of(k)[0] for k in ("text_projection.weight", "visual_projection.weight") if k in keys]
    if text is None and vision is None:
        raise UserError(
            f"{file} holds no CLIP, or one without {CONFIG}: "
            f"put the {CONFIG} of the network and its tokenizer's files beside it"
        )
    where = f"put the {CONFIG} of the network beside it"
    for tower in (text, vision):
        # Attention of another number of heads would run on the same tensors, and give other features.
        if tower is not None and tower.num_attention_heads == 0:
            raise UserError(
                f"{file} has no {CONFIG} beside it, and a tower {tower.hidden_size} wide of {tower.num_hidden_layers} "
                f"blocks is no published CLIP, whose numbers of heads are known: {where}"
            )
    first = text or vision
    assert first is not None
    _log.warning(
        "%s has no %s beside it: read with the heads and the activation (%s) of the published CLIP of its sizes; "
        "for another network, %s",
        *(file, CONFIG, first.hidden_act, where),
    )
    return ClipConfig(text, vision, ends[0] if ends else 0)


def _text_from_shapes(weights: Weights, keys: Collection[str]) -> TextConfig | None:
    prefix = "" if "embeddings.token_embedding.weight" in keys else "text_model."
    if f"{prefix}embeddings.token_embedding.weight" not in keys:
        return None
    ids, width = weights.shape_of(f"{prefix}embeddings.token_embedding.weight")
    positions = weights.shape_of(f"{prefix}embeddings.position_embedding.weight")[0]
    depth, hidden = _depth_and_hidden(weights, keys, prefix)
    # Published CLIPs of one text tower agree on its heads and its activation.
    known = [c.text for c in clip.KNOWN.values() if c.text is not None]
    same = [t for t in known if (t.hidden_size, t.intermediate_size, t.num_hidden_layers) == (width, hidden, depth)]
    heads, act = (same[0].num_attention_heads, same[0].hidden_act) if same else (0, "")
    return TextConfig(
        width,
        hidden,
        depth,
        heads,
        act,
        vocab_size=ids,
        max_position_embeddings=positions,
        eos_token_id=clip.last_id(ids),
    )


def _vision_from_shapes(weights: Weights, keys: Collection[str]) -> VisionConfig | None:
    prefix = "" if "embeddings.class_embedding" in keys else "vision_model."
    if f"{prefix}embeddings.class_embedding" not in keys:
        return None
    width, _, patch, _ = weights.shape_of(f"{prefix}embeddings.patch_embedding.weight")
    positions = weights.shape_of(f"{prefix}embeddings.position_embedding.weight")[0]
    depth, hidden = _depth_and_hidden(weights, keys, prefix)
    known = [c.vision for c in clip.KNOWN.values() if c.vision is not None]
    same = [v for v in known if (v.hidden_size, v.intermediate_size, v.num_hidden_layers) == (width, hidden, depth)]
    heads, act = (same[0].num_attention_heads, same[0].hidden_act) if same else (0, "")
    # One position is of the class token.
    side = round((positions - 1) ** 0.5) * patch
    return VisionConfig(width, hidden, depth, heads, act, image_size=side, patch_size=patch)


def _depth_and_hidden(weights: Weights, keys: Collection[str], prefix: str) -> tuple[int, int]:
    first = f"{prefix}encoder.layers."
    blocks = {k.removeprefix(first).split(".")[0] for k in keys if k.startswith(first)}
    return len(blocks), weights.shape_of(f"{first}0.mlp.fc1.weight")[0]
