"""What a global batch is to the train step: its entries, their shapes and their shardings."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gigagan_jax.config import Config
from gigagan_jax.models.pretrained.frozen import clip_length, clip_width, needs_own_clip_tokens
from gigagan_jax.models.pretrained.text_encoder import text_spec
from gigagan_jax.parallel import sharding

Batch = dict[str, jax.Array]


def batch_axes(name: str) -> tuple[str | None, ...]:
    """Logical axes of one entry of a batch.

    `image` uint8 [N, R, R, 3], `tokens` int32 [N, C], `label` int32 [N]; `clip_tokens` int32 [N, C'] where the contrastive
    loss has other tokens; `features` [N, C, D] and `clip_text` [N, P] where text embeddings are stored with the data (else
    the step makes them).
    """
    return ("batch", *(None,) * {"image": 3, "features": 2, "label": 0}.get(name, 1))


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """ShapeDtypeStructs of a global batch: the entries of the data's batch that the step takes."""
    # Shapes are global: each process holds its rows of them.
    n, r = config.batch_size, config.resolution
    entry = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((n, *shape), dtype)
    batch = {"image": entry(r, r, 3, dtype=jnp.uint8), "label": entry()}
    if config.condition != "text":
        return batch
    batch["tokens"] = entry(config.text.length)
    if config.data.embeddings:
        # Stored features take the place of the text encoder: they come in its precision.
        batch["features"] = entry(config.text.length, text_spec(config.text).width, dtype=jnp.dtype(config.dtype))
        if config.uses_clip_loss:
            batch["clip_text"] = entry(clip_width(config), dtype=jnp.float32)
    elif needs_own_clip_tokens(config):
        batch["clip_tokens"] = entry(clip_length(config))
    return batch


def batch_shardings(config: Config, mesh: Any) -> dict[str, NamedSharding]:
    """Shardings of a global batch."""
    abstract = abstract_batch(config)
    spec = lambda k: sharding.partition_spec(batch_axes(k), abstract[k].shape, mesh, config.rules, f"batch {k}")
    return {k: NamedSharding(mesh, spec(k)) for k in abstract}
