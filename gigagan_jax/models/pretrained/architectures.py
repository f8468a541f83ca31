"""Sizes of frozen networks by their path: from their config.json, or from tables of known ones."""

import os
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained import clip, clip_layouts, dino, hub, t5
from gigagan_jax.models.pretrained.hub import Requirement
from gigagan_jax.models.pretrained.network_files import NetworkFiles, find_network
from gigagan_jax.models.pretrained.weights import Weights

# What an error message offers to a user without the weights.
WITHOUT_TEXT = "config.text.encoder=bytes needs no files"
WITHOUT_CLIP = "config.loss.clip=(0,0) does without"
WITHOUT_VISION = "config.loss.vision_aided=0 does without"
REQUIREMENTS = {
    "text": Requirement("config.text.path", WITHOUT_TEXT),
    "clip_text": Requirement("config.clip.path", WITHOUT_CLIP),
    "clip_image": Requirement("config.clip.path", WITHOUT_CLIP),
    "vision_aided": Requirement("config.vision_aided.path", WITHOUT_VISION),
}
_KNOWN_CONFIGS: dict[str, dict[str, Any]] = {"clip": clip.KNOWN, "t5": t5.KNOWN, "dino": dino.KNOWN}
_CONFIG_READERS: dict[str, Any] = {
    "clip": clip_layouts.read_config,
    "t5": lambda files: t5.read_config(files.folder),
    "dino": lambda files: dino.read_config(files.folder),
}


def read_architecture(kind: str, path: str, need: Requirement) -> Any:
    """The sizes of a network, from its config.json, or from the table of known ones if its files are absent."""
    known = _KNOWN_CONFIGS[kind].get(path.partition("@")[0])
    # A dry run plans known networks without a download; files in the cache win over the table.
    if known is not None and not os.path.exists(path) and hub.find_cached(path) is None:
        return known
    return _CONFIG_READERS[kind](find_network(path, need, kind))


def check_architecture(kind: str, sizes: Any, files: NetworkFiles, need: Requirement) -> None:
    """Raises UserError if a network's config differs from the planned sizes, as by an outdated table."""
    if _CONFIG_READERS[kind](files) != sizes:
        raise UserError(
            f"{need.field}: {files.config or files.weights} has other sizes than are known of this network: "
            "start again, it is read first now that it is here"
        )


def open_network(kind: str, files: NetworkFiles) -> Weights:
    """The tensors of a network, by the names that its key table has."""
    return clip_layouts.open_weights(files) if kind == "clip" else Weights(files.folder, single=files.weights.name)
