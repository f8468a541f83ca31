"""The text encoder that a config names, as T and the tokenizer see it; and the sizes of frozen networks by their path."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gigagan_jax.config import TextConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained import clip, dino, hub, t5
from gigagan_jax.models.pretrained.hub import Need

BYTE_VOCABULARY, BYTES_END = 259, 2  # ids of data/tokenizers.py
WITHOUT_TEXT = "config.text.encoder=bytes needs no files"
WITHOUT_CLIP = "config.loss.clip=(0,0) does without"
WITHOUT_VISION = "config.loss.vision_aided=0 does without"
NEEDS = {
    "text": Need("config.text.path", WITHOUT_TEXT),
    "clip_text": Need("config.clip.path", WITHOUT_CLIP),
    "clip_image": Need("config.clip.path", WITHOUT_CLIP),
    "vision_aided": Need("config.vision_aided.path", WITHOUT_VISION),
}
_KNOWN: dict[str, dict[str, Any]] = {"clip": clip.KNOWN, "t5": t5.KNOWN, "dino": dino.KNOWN}
_READ: dict[str, Any] = {"clip": clip.read_config, "t5": t5.read_config, "dino": dino.read_config}


def architecture(kind: str, path: str, need: Need) -> Any:
    """The sizes of a network: from its config.json, or from the table of known ones where its files are not here."""
    known = _KNOWN[kind].get(path.partition("@")[0])
    if known is not None and not Path(path).exists():
        folder = hub.cached(path)
        return known if folder is None else _READ[kind](folder)
    return _READ[kind](hub.find(path, need))


def check_architecture(kind: str, sizes: Any, folder: Path, need: Need) -> None:
    """Raises UserError where a folder's config.json is not what was planned with (a table that is out of date)."""
    if _READ[kind](folder) != sizes:
        raise UserError(
            f"{need.field}: {folder / hub.CONFIG} has other sizes than are known of this network: start again, it is read "
            "first now that it is here"
        )


# ---------------------------------------------------------------- the text encoder, as T sees it


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """What T must know of the encoder before it.

    width: features a token
    length: most tokens a row; 0 for any
    vocab_size: ids
    end_id: of the end-of-text token
    """

    encoder: str
    width: int
    length: int
    vocab_size: int
    end_id: int

    def end(self, tokens: jax.Array) -> jax.Array:
        """Place of the end of text, int32 [N], in tokens int32 [N, C]"""
        return jnp.argmax(tokens == self.end_id, axis=1).astype(jnp.int32)


def text_spec(config: TextConfig) -> TextSpec:
    """The encoder of a config.

    Raises:
      UserError: its files are missing or of another kind, or `text.length` is more than it takes.
    """
    if config.encoder == "bytes":
        return TextSpec("bytes", config.width, 0, BYTE_VOCABULARY, BYTES_END)
    sizes = architecture(config.encoder, config.path, NEEDS["text"])
    if config.encoder == "t5":
        return TextSpec("t5", sizes.d_model, 0, sizes.vocab_size, sizes.eos_token_id)
    t = sizes.text
    if t is None:
        raise UserError(f"config.text.path={config.path} is a CLIP without a text tower; {WITHOUT_TEXT}")
    if config.length > t.max_position_embeddings:
        raise UserError(
            f"config.text.length={config.length}: {config.path} takes at most {t.max_position_embeddings} tokens"
        )
    return TextSpec("clip", t.hidden_size, t.max_position_embeddings, t.vocab_size, t.eos_token_id)


def tokenizer_options(config: TextConfig) -> dict[str, Any]:
    """What the tokenizer of a frozen text encoder must know (data/tokenizers.py); nothing for the bytes encoder.

    Raises:
      UserError: the encoder's files are missing.
    """
    if config.encoder == "bytes":
        return {}
    spec = text_spec(config)
    folder = hub.find(config.path, NEEDS["text"])
    return {
        "folder": folder,
        "vocab_size": spec.vocab_size,
        "end_id": spec.end_id,
        "begins": spec.encoder == "clip",
    }
