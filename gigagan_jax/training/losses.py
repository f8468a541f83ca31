"""The losses as pure functions of arrays (sec. 3.3). Everything is float32.

Logits of one (level, exit) pair are [N, h * w]: one prediction a position, of one source of images and one caption.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gigagan_jax.config import Config
from gigagan_jax.models.discriminator import entry_levels, prediction_pairs

softplus = jax.nn.softplus


def pair_weights(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Weights of the GAN and of the matching-aware loss, one for each of `prediction_pairs` (A2).

    A pair counts as its entry level does, times the intermediate weight unless it leaves by the last exit.
    """
    levels = entry_levels(config.discriminator)
    # The paper's weights: the output image counts twice as much as any other level, and all sum to one.
    level = config.loss.level_weights or tuple((2.0 if i == 0 else 1.0) / (len(levels) + 1) for i in range(len(levels)))
    last = len(config.resolutions) - 1
    weigh = lambda middle: tuple(
        level[p.level] * (1.0 if p.exit == last else middle) for p in prediction_pairs(config.discriminator)
    )
    return weigh(config.loss.intermediate_gan), weigh(config.loss.intermediate_match)


def over_pairs(
    loss: Callable[..., jax.Array],
    weights: Sequence[float],
    *logits: Sequence[jax.Array],
    valid: jax.Array | None = None,
) -> jax.Array:
    """sum over pairs of weight * mean of loss(logits) (eq. 6). The only loop over scales.

    Args:
      loss: function of one pair's arrays [N, h * w], one from each of `logits`
      weights: one a pair
      logits: lists of [N, h * w], one entry a pair
      valid: bool [N], examples that count; None for all
    """
    total = jnp.zeros((), jnp.float32)
    for weight, *values in zip(weights, *logits, strict=True):
        # First over positions, then over images: a prediction map of any size has the same weight.
        each = loss(*values).mean(-1)
        if valid is not None:
            # Zero and not left out: the mean stays over the whole batch, so that shards agree on it.
            each = jnp.where(valid, each, 0.0)
        total += weight * each.mean()
    return total


def gan_d(fake: jax.Array, real: jax.Array) -> jax.Array:
    """Non-saturating logistic loss of D: softplus(D(G)) + softplus(-D(x)), elementwise."""
    return softplus(fake) + softplus(-real)


def gan_g(fake: jax.Array) -> jax.Array:
    """Non-saturating logistic loss of G: softplus(-D(G)), elementwise."""
    return softplus(-fake)


def match_d(fake: jax.Array, real: jax.Array) -> jax.Array:
    """Matching-aware loss of D (eq. 8): a wrong caption makes real and generated images fake."""
    return softplus(real) + softplus(fake)


def match_g(fake: jax.Array) -> jax.Array:
    """Matching-aware loss of G: eq. 8 is a term of the min-max value, so G opposes it, in non-saturating form."""
    return softplus(-fake)


def clip_contrastive(image: jax.Array, own: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    """CLIP contrastive loss (eq. 9), image to text: -log softmax over the captions of the global batch, at the own one.

    Args:
      image: [N, P] normalised embeddings of generated images
      own: [N, P] normalised embeddings of their captions
      text: [M, P] those of all captions of the global batch, the own ones among them
      scale: CLIP's logit scale (100 in the published networks)
    """
    exact = jax.lax.Precision.HIGHEST  # the scale multiplies what rounding does to a cosine
    logits = scale * jnp.einsum("np,mp->nm", image, text, precision=exact)
    # logsumexp minus the own logit is -log softmax, without the exponentials' overflow.
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - scale * jnp.sum(image * own, axis=1))


def r1_penalty(logit: Callable[[list[jax.Array]], jax.Array], reals: list[jax.Array]) -> jax.Array:
    """Mean over images of the squared gradient norm of `logit` by the images (Mescheder et al., 2018).

    Args:
      logit: [N, r, r, 3] per level -> scalar, the sum over images of what D says of them
      reals: the images to differentiate by
    """
    # Of a sum over images: without minibatch deviation an image's gradient does not depend on the others.
    grads = jax.grad(logit)(reals)
    # Squares in float32: the sum runs over all pixels of an image.
    return jnp.asarray(sum(jnp.sum(jnp.square(g.astype(jnp.float32)), axis=(1, 2, 3)).mean() for g in grads))


def ramped_weight(ends: tuple[float, float], progress: jax.Array | float) -> jax.Array:
    """A weight on its way from its first to its last value; `progress` is the share of the run that is done.

    Where both are equal the run's length is no part of the program: a longer run compiles nothing anew.
    """
    first, last = ends
    return jnp.asarray(first if first == last else first + (last - first) * progress, jnp.float32)
