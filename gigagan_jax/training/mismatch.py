"""Wrong captions for the matching-aware loss: never an image's own, nor one that reads the same (sec. 3.3, eq. 8)."""

import jax
import jax.numpy as jnp


def same_wish(tokens: jax.Array | None, labels: jax.Array | None) -> jax.Array:
    """bool [N, N]: examples with equal captions, or with equal labels where labels are known (not negative).

    Captions are compared by a 32-bit hash: a collision can only forbid a pair, never let an equal one pass.
    """
    parts = []
    if tokens is not None:
        powers = jnp.uint32(0x9E3779B1) ** jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.uint32)
        hashes = jnp.sum((tokens.astype(jnp.uint32) + 1) * powers, axis=1, dtype=jnp.uint32)
        parts.append(hashes[:, None] == hashes[None, :])
    if labels is not None:
        parts.append((labels[:, None] == labels[None, :]) & (labels >= 0)[:, None])
    if not parts:
        raise ValueError("neither tokens nor labels: there is nothing to mismatch")
    return parts[0] if len(parts) == 1 else parts[0] | parts[1]


def mismatch(key: jax.Array, tokens: jax.Array | None, labels: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """For each example, another one whose caption is not its own.

    A random cycle through the whole batch, which has no fixed point and uses each caption once. Where the cycle meets an
    equal caption, another is drawn evenly from those that differ.

    Args:
      tokens: int32 [N, C] or None
      labels: int32 [N], negative where unknown, or None

    Returns:
      (index int32 [N], valid bool [N]); not valid where every caption of the batch is the example's own.
    """
    same = same_wish(tokens, labels)
    n = same.shape[0]
    key_order, key_draw = jax.random.split(key)
    order = jax.random.permutation(key_order, n)
    index = jnp.zeros(n, jnp.int32).at[order].set(jnp.roll(order, -1).astype(jnp.int32))
    draw = jnp.argmax(jnp.where(same, -1.0, jax.random.uniform(key_draw, (n, n))), axis=1).astype(jnp.int32)
    clash = jnp.take_along_axis(same, index[:, None], axis=1)[:, 0]
    return jnp.where(clash, draw, index), ~jnp.all(same, axis=1)
