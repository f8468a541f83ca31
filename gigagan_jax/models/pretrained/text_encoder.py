"""The text encoder of a config, described for T and the tokenizer, and the sizes of frozen networks by their path."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gigagan_jax.config import TextConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained import clip, dino, hub, t5
from gigagan_jax.models.pretrained.hub import Requirement

# Ids of the byte tokenizer in data/tokenizers.py: 256 bytes and three special tokens, 2 ends a text.
BYTE_VOCABULARY, BYTES_END = 259, 2
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
_CONFIG_READERS: dict[str, Any] = {"clip": clip.read_config, "t5": t5.read_config, "dino": dino.read_config}


def read_architecture(kind: str, path: str, need: Requirement) -> Any:
    """The sizes of a network, from its config.json, or from the table of known ones if its files are absent."""
    known = _KNOWN_CONFIGS[kind].get(path.partition("@")[0])
    # A dry run plans known networks without a download; files in the cache win over the table.
    if known is not None and not Path(path).exists():
        folder = hub.find_cached(path)
        return known if folder is None else _CONFIG_READERS[kind](folder)
    return _CONFIG_READERS[kind](hub.find_folder(path, need))


def check_architecture(kind: str, sizes: Any, folder: Path, need: Requirement) -> None:
    """Raises UserError if a folder's config.json differs from the planned sizes, as by an outdated table."""
    if _CONFIG_READERS[kind](folder) != sizes:
        raise UserError(
            f"{need.field}: {folder / hub.CONFIG} has other sizes than are known of this network: "
            "start again, it is read first now that it is here"
        )


# ---------------------------------------------------------------- the text encoder, as T sees it


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """Properties of the text encoder that T needs.

    width: features of a token
    length: maximum number of tokens in a row; 0 for no maximum
    vocab_size: number of ids
    end_id: id of the end-of-text token
    """

    encoder: str
    width: int
    length: int
    vocab_size: int
    end_id: int

    def end_position(self, tokens: jax.Array) -> jax.Array:
        """Index of the first end-of-text token, int32 [N], in tokens int32 [N, C]."""
        return jnp.argmax(tokens == self.end_id, axis=1).astype(jnp.int32)


def text_spec(config: TextConfig) -> TextSpec:
    """The encoder of a config.

    Raises:
      UserError: its files are missing or of another kind, or `text.length` exceeds its positions.
    """
    if config.encoder == "bytes":
        return TextSpec("bytes", config.width, 0, BYTE_VOCABULARY, BYTES_END)
    sizes = read_architecture(config.encoder, config.path, REQUIREMENTS["text"])
    if config.encoder == "t5":
        # T5 has relative positions, so it takes rows of any length.
        return TextSpec("t5", sizes.d_model, 0, sizes.vocab_size, sizes.eos_token_id)
    # A CLIP may be a vision tower alone.
    t = sizes.text
    if t is None:
        raise UserError(f"config.text.path={config.path} is a CLIP without a text tower; {WITHOUT_TEXT}")
    if config.length > t.max_position_embeddings:
        raise UserError(
            f"config.text.length={config.length}: {config.path} takes at most {t.max_position_embeddings} tokens"
        )
    return TextSpec("clip", t.hidden_size, t.max_position_embeddings, t.vocab_size, t.eos_token_id)


def tokenizer_options(config: TextConfig) -> dict[str, Any]:
    """Options of the tokenizer of a frozen text encoder (data/tokenizers.py); empty for the byte encoder.

    Raises:
      UserError: the encoder's files are missing.
    """
    if config.encoder == "bytes":
        return {}
    spec = text_spec(config)
    folder = hub.find_folder(config.path, REQUIREMENTS["text"])
    return {
        "folder": folder,
        "vocab_size": spec.vocab_size,
        "end_id": spec.end_id,
        "begins": spec.encoder == "clip",
    }
