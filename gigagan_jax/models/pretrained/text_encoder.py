"""The text encoder that a config names, as T and the tokenizer need it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gigagan_jax.config import TextConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained.architectures import REQUIREMENTS, WITHOUT_TEXT, read_architecture
from gigagan_jax.models.pretrained.network_files import find_network, find_tokenizer

# Ids of the byte and the word tokenizer in data/tokenizers.py: three special tokens, of which 2 ends a text; then 256 bytes.
BYTE_VOCABULARY, TRAINED_END = 259, 2


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

    @property
    def begins(self) -> bool:
        """Whether a row begins with a token of its own, before the text."""
        return self.encoder != "t5"

    def is_null(self, tokens: jax.Array) -> jax.Array:
        """bool [N], rows of the null caption in tokens int32 [N, C]: those that end before any text."""
        # The end token never stands in a text (data/tokenizers.py), so one place tells.
        return tokens[:, int(self.begins)] == self.end_id

    def end_position(self, tokens: jax.Array) -> jax.Array:
        """Index of the first end-of-text token, int32 [N], in tokens int32 [N, C]."""
        return jnp.argmax(tokens == self.end_id, axis=1).astype(jnp.int32)


def text_spec(config: TextConfig) -> TextSpec:
    """The encoder of a config.

    Raises:
      UserError: its files are missing or of another kind, or `text.length` exceeds its positions.
    """
    if config.is_trained:
        ids = BYTE_VOCABULARY if config.encoder == "bytes" else config.buckets**2
        return TextSpec(config.encoder, config.width, 0, ids, TRAINED_END)
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
    """Options of the encoder's tokenizer (data/tokenizers.py).

    Raises:
      UserError: the encoder's files are missing.
    """
    if config.encoder == "bytes":
        return {}
    spec = text_spec(config)
    if config.encoder == "words":
        return {"vocab_size": spec.vocab_size}
    files = find_network(config.path, REQUIREMENTS["text"], config.encoder)
    return {
        "folder": find_tokenizer(files, spec.vocab_size, config.encoder),
        "vocab_size": spec.vocab_size,
        "end_id": spec.end_id,
        "begins": spec.begins,
    }
