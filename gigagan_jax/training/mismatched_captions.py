"""Wrong captions for the matching-aware loss: never an image's own, nor one that reads the same (sec. 3.3, eq. 8)."""

import jax
import jax.numpy as jnp

from gigagan_jax.config import Config


def same_caption(tokens: jax.Array | None, labels: jax.Array | None) -> jax.Array:
    """bool [N, N]: examples with equal captions, or with equal labels where labels are known (not negative).

    Captions are compared by a 32-bit hash: a collision can only forbid a pair, never let an equal one pass.
    """
    parts = []
    if tokens is not None:
        # A polynomial hash in wrap-around arithmetic: comparing hashes costs N^2 numbers, comparing tokens N^2 x C.
        powers = jnp.uint32(0x9E3779B1) ** jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.uint32)
        hashes = jnp.sum((tokens.astype(jnp.uint32) + 1) * powers, axis=1, dtype=jnp.uint32)
        parts.append(hashes[:, None] == hashes[None, :])
    if labels is not None:
        # Where labels say what captions say (loss.mask_same_labels), two captions of one class are no mismatch.
        parts.append((labels[:, None] == labels[None, :]) & (labels >= 0)[:, None])
    if not parts:
        raise ValueError("neither tokens nor labels: there is nothing to mismatch")
    return parts[0] if len(parts) == 1 else parts[0] | parts[1]


def masks_null_captions(config: Config) -> bool:
    """Whether a batch may hold null captions.

    They are then no wrong captions, and are left out of the contrastive loss and of the mean w.
    """
    may_have = config.data.caption_dropout > 0 or config.data.captions == "optional"
    return config.condition == "text" and may_have and config.loss.mask_null_captions


def draw_mismatch(
    key: jax.Array, tokens: jax.Array | None, labels: jax.Array | None, null: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """For each example, another one whose caption is not its own.

    A random cycle through the whole batch, which has no fixed point and uses each caption once. Where the cycle meets an
    equal caption or the null caption, another is drawn evenly from those that differ.

    Args:
      tokens: int32 [N, C] or None
      labels: int32 [N], negative where unknown, or None
      null: bool [N], where the caption is the null caption, or None where there is none

    Returns:
      (index int32 [N], valid bool [N]); not valid where every caption of the batch is the example's own, or null.
    """
    same = same_caption(tokens, labels)
    if null is not None:
        # The null caption says nothing that an image could contradict: it fits all of them. An image with the null
        # caption still gets a wrong one: that pair is as false as any, but for the rare caption that the image has lost.
        same = same | null[None, :]
    n = same.shape[0]
    key_order, key_draw = jax.random.split(key)
    # Each example takes the caption of the next in a random cycle: none meets its own, all are used.
    order = jax.random.permutation(key_order, n)
    index = jnp.zeros(n, jnp.int32).at[order].set(jnp.roll(order, -1).astype(jnp.int32))
    # The argmax of uniform noise is an even draw among the captions that differ.
    draw = jnp.argmax(jnp.where(same, -1.0, jax.random.uniform(key_draw, (n, n))), axis=1).astype(jnp.int32)
    # The cycle may pair two examples whose captions read the same.
    clash = jnp.take_along_axis(same, index[:, None], axis=1)[:, 0]
    return jnp.where(clash, draw, index), ~jnp.all(same, axis=1)


def group_size(n: int, most: int) -> int:
    """Size of the groups of a batch of n within which wrong captions are drawn: the largest divisor of n up to `most`.

    The whole batch where `most` is 0, or where only divisors below half of `most` are left.
    """
    # Groups divide the batch: every shard and micro-batch has whole ones.
    size = max((d for d in range(1, min(n, most) + 1) if n % d == 0), default=n)
    return size if 2 * size > most else n


def all_wrong_captions(
    t: jax.Array, tokens: jax.Array | None, labels: jax.Array | None, most: int, null: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The captions of all other examples of a group, for the contrastive form of the matching-aware loss.

    Args:
      t: [N, D] encoded captions
      tokens, labels, null: as `draw_mismatch` takes them
      most: examples a group, see `group_size`

    Returns:
      (t of the others [N, S - 1, D], valid bool [N, S - 1]: those that are neither the example's own nor null), for groups of S
    """
    n = t.shape[0]
    size = group_size(n, most)
    split = lambda x: x.reshape(n // size, size, *x.shape[1:])
    same = jax.vmap(same_caption)(*(None if x is None else split(x) for x in (tokens, labels)))
    if null is not None:
        same = same | split(null)[:, None, :]
    # Rolled within a group: nothing moves between devices.
    rolls = range(1, size)
    others = jnp.stack([jnp.roll(split(t), -k, axis=1) for k in rolls], axis=2)
    valid = jnp.stack([~jnp.diagonal(jnp.roll(same, -k, axis=2), axis1=1, axis2=2) for k in rolls], axis=2)
    return others.reshape(n, size - 1, -1), valid.reshape(n, size - 1)


def draw_wrong_captions(
    key: jax.Array,
    t: jax.Array,
    tokens: jax.Array | None,
    labels: jax.Array | None,
    most: int,
    null: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What each example's wrong caption is encoded as; see `draw_mismatch`.

    Drawn among neighbours in the batch, since an N x N comparison over a pod's batch does not scale and captions from
    other devices would have to be fetched: what a device sends does not grow with the number of devices.

    Args:
      t: [N, D] encoded captions
      tokens, labels, null: as `draw_mismatch` takes them
      most: examples a group, see `group_size`

    Returns:
      (t of the wrong captions [N, D], valid bool [N])
    """
    n = t.shape[0]
    size = group_size(n, most)
    groups = n // size
    # With one group the draws are those of `draw_mismatch` itself, which the tests compare.
    keys = key[None] if groups == 1 else jax.random.split(key, groups)
    split = lambda x: None if x is None else x.reshape(groups, size, *x.shape[1:])
    index, valid = jax.vmap(draw_mismatch)(keys, split(tokens), split(labels), split(null))
    # A product with a permutation matrix stays within its group, where a gather would be partitioned as a global one.
    pick = jax.nn.one_hot(index, size, dtype=t.dtype)
    wrong = jnp.einsum("gij,gjd->gid", pick, split(t), precision=jax.lax.Precision.HIGHEST)
    return wrong.reshape(t.shape), valid.reshape(n)
