"""Differentiable augmentation of what a discriminator sees (Zhao et al., 2020), drawn anew for each example."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

TRANSLATION = 0.125  # largest shift, of the side
CUTOUT = 0.5  # side of the square that is cut out, of the side


def augment(key: jax.Array, images: jax.Array, policies: Sequence[str]) -> jax.Array:
    """Images as seen through the named policies, in their order.

    Args:
      images: float32 [N, R, R, 3] in [-1, 1]
      policies: names in POLICIES

    Returns:
      float32 [N, R, R, 3]; differentiable by the images
    """
    for i, name in enumerate(policies):
        images = POLICIES[name](jax.random.fold_in(key, i), images)
    return images


def color(key: jax.Array, x: jax.Array) -> jax.Array:
    """Brightness +- 0.5, saturation times 0 to 2, contrast times 0.5 to 1.5."""
    brightness, saturation, contrast = jax.random.uniform(key, (3, x.shape[0], 1, 1, 1))
    x += brightness - 0.5
    grey = x.mean(-1, keepdims=True)
    x = grey + (x - grey) * (2.0 * saturation)
    mean = x.mean((1, 2, 3), keepdims=True)
    return mean + (x - mean) * (0.5 + contrast)


def translation(key: jax.Array, x: jax.Array) -> jax.Array:
    """Shifts by whole pixels up to an eighth of the side; zeros come in."""
    n, side = x.shape[:2]
    most = round(side * TRANSLATION)
    shift = jax.random.randint(key, (2, n), -most, most + 1)
    # As products with shifted identities: every example stays on its device, where a gather would be partitioned badly.
    place = jnp.arange(side)
    rows, columns = (
        (place[None, :, None] == place[None, None, :] + shift[i][:, None, None]).astype(x.dtype) for i in range(2)
    )
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("nab,ncd,nbdk->nack", rows, columns, x, precision=exact)


def cutout(key: jax.Array, x: jax.Array) -> jax.Array:
    """Zeroes a square of half the side around a place anywhere in the image."""
    n, side = x.shape[:2]
    size = round(side * CUTOUT)
    first = jax.random.randint(key, (2, n), -(size // 2), side - size // 2 + 1)
    place = jnp.arange(side)[None]
    inside = [(place >= first[i][:, None]) & (place < first[i][:, None] + size) for i in range(2)]
    return jnp.where((inside[0][:, :, None] & inside[1][:, None, :])[..., None], jnp.zeros_like(x), x)


POLICIES = {"color": color, "translation": translation, "cutout": cutout}
