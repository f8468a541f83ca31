"""The losses as pure functions of arrays (sec. 3.3). Everything is float32.

Logits of one (level, exit) pair are [N, h * w]: one prediction a position, of one source of images and one caption.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gigagan_jax.config import Config
from gigagan_jax.models.discriminator import Pair, entry_levels, prediction_pairs

softplus = jax.nn.softplus


def pair_weights(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Weights of the GAN and of the matching-aware loss, one for each of `prediction_pairs` (A2).

    A pair counts as its entry level does, times the intermediate weight unless it leaves by the last exit.
    """
    level = level_weights(config)
    weigh = lambda middle: tuple(
        level[p.level] * (1.0 if is_last_exit(config, p) else middle) for p in prediction_pairs(config.discriminator)
    )
    return weigh(config.loss.intermediate_gan), weigh(config.loss.intermediate_match)


def level_weights(config: Config) -> tuple[float, ...]:
    """Weight of each of `entry_levels` in the GAN loss, high to low (A2)."""
    count = len(entry_levels(config.discriminator))
    # The paper's weights: the output image counts twice as much as any other level, and all sum to one.
    return config.loss.level_weights or tuple((2.0 if i == 0 else 1.0) / (count + 1) for i in range(count))


def is_last_exit(config: Config, pair: Pair) -> bool:
    """Whether a prediction leaves D at its end, and not on the way."""
    return pair.exit == len(config.resolutions) - 1


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


def match_contrastive(own: jax.Array, others: jax.Array, valid: jax.Array) -> jax.Array:
    """-log softmax of an image's own caption among those of its group (ContraGAN; XMC-GAN: Zhang et al., 2021, eq. 8).

    Args:
      own: [N, h * w] logits with the own caption
      others: [N, M, h * w] with the captions of other examples
      valid: bool [N, M], those that say something else

    Returns:
      [N, h * w]; 0 where nothing is valid
    """
    # Finite: minus infinity in a whole row makes its gradient NaN.
    differences = jnp.where(valid[:, :, None], others - own[:, None], -1e30)
    return softplus(jax.nn.logsumexp(differences, axis=1))


# Forms of G's matching-aware loss, of D's logits for generated images with a wrong caption. The paper gives D's term
# (eq. 8) and says that G has one too.
MATCH_G: dict[str, Callable[[jax.Array], jax.Array]] = {
    # G opposes D's term as it stands: its pull vanishes where D is sure.
    "min_max": lambda fake: -softplus(fake),
    # The pull stays where D is sure, and then outweighs that of the image's own caption.
    "non_saturating": lambda fake: softplus(-fake),
    # G wants what D wants: that an image does not fit a wrong caption.
    "cooperating": softplus,
}


def relativistic_d(fake: jax.Array, real: jax.Array) -> jax.Array:
    """Relativistic pairing loss of D: softplus(D(G) - D(x)) (R3GAN: Huang et al., 2024, eq. 2). G's is `real`, `fake` swapped."""
    return softplus(fake - real)


def match_d_relativistic(fake: jax.Array, real: jax.Array, own: jax.Array) -> jax.Array:
    """`match_d` where a real image is compared with itself: softplus(D(x, wrong) - D(x, own)) + softplus(D(G, wrong))."""
    return softplus(real - own) + softplus(fake)


def centring(fake: jax.Array, real: jax.Array) -> jax.Array:
    """(D(x) + D(G))^2: holds the logits around zero, where a relativistic loss leaves their mean free."""
    return jnp.square(real + fake)


def smoothed_d(fake: jax.Array, real: jax.Array, smoothing: float) -> jax.Array:
    """`gan_d` with one-sided label smoothing: a real image is real by 1 - smoothing (Salimans et al., 2016, sec. 3.4)."""
    return softplus(fake) + (1.0 - smoothing) * softplus(-real) + smoothing * softplus(real)


def caption_weights(null: jax.Array) -> jax.Array:
    """Weights float32 [N, 1] by which a mean over the global batch is one over its captions that are not null.

    They are all 0 where every caption is. A micro-batch takes its rows of them: the mean over parts is that of the batch.

    Args:
      null: bool [N], rows of the global batch with the null caption
    """
    counted = ~null
    # One and not zero: a batch of null captions alone has a mean of 0.
    weight = null.shape[0] / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
    return jnp.where(counted, weight, 0.0)[:, None]


def clip_contrastive(
    image: jax.Array,
    own: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    weights: jax.Array | None = None,
    counted: jax.Array | None = None,
) -> jax.Array:
    """CLIP contrastive loss (eq. 9), image to text: -log softmax over the captions of the global batch, at the own one.

    Args:
      image: [N, P] normalised embeddings of generated images
      own: [N, P] normalised embeddings of their captions
      text: [M, P] those of all captions of the global batch, the own ones among them
      scale: CLIP's logit scale (100 in the published networks)
      weights: float32 [N, 1], `caption_weights` of the images; None for 1
      counted: bool [M], those of `text` that are not null; None for all
    """
    exact = jax.lax.Precision.HIGHEST  # the scale multiplies what rounding does to a cosine
    logits = scale * jnp.einsum("np,mp->nm", image, text, precision=exact)
    if counted is not None:
        # Finite: minus infinity in a whole row makes its gradient NaN, whatever its weight.
        logits = jnp.where(counted, logits, -1e30)
    # logsumexp minus the own logit is -log softmax, without the exponentials' overflow.
    each = jax.nn.logsumexp(logits, axis=1) - scale * jnp.sum(image * own, axis=1)
    return jnp.mean(each if weights is None else each * weights[:, 0])


def ramp_progress(config: Config, images: jax.Array) -> jax.Array:
    """How far the weights that change are on their way after so many real images, 0 to 1."""
    kimg = config.loss.ramp_kimg or config.total_kimg
    return jnp.minimum(1.0, images.astype(jnp.float32) / (kimg * 1000.0))


def ramped_weights(config: Config, images: int) -> dict[str, float]:
    """The weights that change, by their field in `loss`, after so many real images."""
    progress = ramp_progress(config, jnp.uint32(images))
    return {name: float(ramped_weight(getattr(config.loss, name), progress)) for name in ("r1_gamma", "clip")}


def ramped_weight(ends: tuple[float, float], progress: jax.Array | float) -> jax.Array:
    """A weight on its way from its first to its last value; `progress` is the share of the run that is done.

    Where both are equal the run's length is no part of the program: a longer run compiles nothing anew.
    """
    first, last = ends
    return jnp.asarray(first if first == last else first + (last - first) * progress, jnp.float32)
