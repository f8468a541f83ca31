"""Penalties on D's gradient by its images: R1 and R2, exact or by finite differences, and what is measured of them.

D has several exits for one image. A penalty on the gradient of their plain sum is evaded: D learns intermediate exits, which
cost little in the loss, whose gradient cancels that of the last one. With a random sign for each image and exit all products
of two exits vanish in the mean,

    E_s |sum_j s_j w_j grad D_j|^2 = sum_j w_j^2 |grad D_j|^2,

in one backward pass, and no exit can pay for another. w_j is the weight of the exit in the loss.

Images are trees of [N, ...] arrays, such as {source: pyramid}; squares are [N] for each of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gigagan_jax.config import Config
from gigagan_jax.models.discriminator import prediction_pairs
from gigagan_jax.parallel import sharding
from gigagan_jax.training import losses


def draw_signs(key: jax.Array, n: int, exits: int) -> jax.Array:
    """Random signs [N, exits], float32. Drawn for the whole batch: the same on any mesh."""
    return sharding.constrain(jax.random.rademacher(key, (n, exits), jnp.float32), "batch", None)


def sum_exits(config: Config, logits: Sequence[jax.Array], signs: jax.Array | None) -> list[jax.Array]:
    """What D says of each image, all exits in one number.

    Args:
      logits: [N, h * w] for each of `prediction_pairs`.
      signs: [N, pairs]; each exit then counts by its sign and its weight in the loss. None: the plain sum.

    Returns:
      [N] for each of `entry_levels`
    """
    pairs = prediction_pairs(config.discriminator)
    sums = dict.fromkeys(sorted({p.level for p in pairs}), jnp.zeros((), jnp.float32))
    for k, (pair, x) in enumerate(zip(pairs, logits, strict=True)):
        weight = 1.0 if losses.is_last_exit(config, pair) else config.loss.intermediate_gan
        # First over positions, as in the losses.
        mean = x.mean(-1)
        sums[pair.level] += mean if signs is None else weight * signs[:, k] * mean
    return list(sums.values())


def split_exits(config: Config, logits: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """(the last exit, the plain sum of the others), each [N] for each of `entry_levels`; zero where there is no other."""
    last: dict[int, jax.Array] = {}
    others: dict[int, jax.Array] = {}
    for pair, x in zip(prediction_pairs(config.discriminator), logits, strict=True):
        found = last if losses.is_last_exit(config, pair) else others
        mean = x.mean(-1)
        found[pair.level] = found[pair.level] + mean if pair.level in found else mean
    return [last[i] for i in sorted(last)], [others.get(i, jnp.zeros_like(last[i])) for i in sorted(last)]


def gradients(total: Callable[[Any], jax.Array], images: Any) -> Any:
    """Gradient of a sum over images by each of them, float32, in the shape of `images`."""
    # Squares in float32: their sum runs over all pixels of an image.
    return jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(total)(images))


def squared_gradients(total: Callable[[Any], jax.Array], images: Any) -> Any:
    """Squared norm of the gradient by each image (Mescheder et al., 2018).

    Args:
      total: images -> scalar, the sum over images of what D says of them. Without minibatch deviation an image's
        gradient does not depend on the others.
    """
    return jax.tree.map(lambda g: jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))), gradients(total, images))


def squared_differences(clean: Any, noisy: Any, sigma: float) -> Any:
    """((D(x + sigma e) - D(x)) / sigma)^2 for noise e of unit variance (APT: Lin et al., 2025).

    Its mean over e is the squared norm of the gradient, up to terms in sigma^2. It needs no second derivative.

    Args:
      clean, noisy: trees of [N], what D says of the images and of the noisy ones
    """
    return jax.tree.map(lambda a, b: jnp.square((b - a) / sigma), clean, noisy)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine between two arrays of gradients, over all images together; 0 where one is zero."""
    dot = lambda x, y: jnp.sum(x * y)
    return dot(a, b) * jax.lax.rsqrt(jnp.maximum(dot(a, a) * dot(b, b), 1e-30))
