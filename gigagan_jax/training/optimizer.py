"""AdamW as the paper has it: two rates of weight decay, lazy-regularisation correction, schedules in images."""

from typing import Any

import jax
import optax

from gigagan_jax.config import OptimizerConfig


def is_attention(path: tuple) -> bool:
    """Does a parameter belong to an attention layer (its projections, feed-forward or norm)?"""
    return any(getattr(k, "key", None) in ("attention", "cross") for k in path)


def decay_rates(config: OptimizerConfig, axes: Any) -> Any:
    """Weight decay of each parameter. Biases and gains (one dimension, "layers" aside) have none.

    Args:
      axes: tree of tuples of logical axis names
    """

    def rate(path: tuple, names: tuple) -> float:
        if len([n for n in names if n != "layers"]) < 2:
            return 0.0
        return config.attention_weight_decay if is_attention(path) else config.weight_decay

    return jax.tree_util.tree_map_with_path(rate, axes, is_leaf=lambda x: isinstance(x, tuple))


def make_optimizer(config: OptimizerConfig, axes: Any, *, lazy_interval: int = 0) -> optax.GradientTransformation:
    """AdamW (A2) without its learning rate, which the step multiplies in: it depends on images, not on steps.

    With beta1 = 0 the first moment is the gradient itself and is not stored, which saves four bytes a parameter.

    Args:
      axes: logical axis names of each parameter
      lazy_interval: steps between lazy penalties; betas become beta^(k / (k + 1)) (StyleGAN2, appendix B). 0 is none.
    """
    c = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    b1, b2 = (config.beta1**c if config.beta1 else 0.0), config.beta2**c
    if b1:
        adam = optax.scale_by_adam(b1=b1, b2=b2, eps=config.epsilon)
    else:
        adam = optax.scale_by_rms(decay=b2, eps=config.epsilon, eps_in_sqrt=False, bias_correction=True)
    rates = decay_rates(config, axes)

    def add_decay(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p, r: u + r * p if r else u, updates, params, rates)

    return optax.chain(adam, optax.stateless(add_decay))


def learning_rate(
    config: OptimizerConfig, images: jax.Array, total_kimg: float, *, lazy_interval: int = 0
) -> jax.Array:
    """Learning rate after `images` images (float32 scalar): warm-up, constant, cosine to the end where configured."""
    c = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    kimg = images.astype("float32") / 1000.0
    rate = jax.numpy.asarray(config.learning_rate * c, "float32")
    if config.warmup_kimg:
        rate *= jax.numpy.minimum(1.0, kimg / config.warmup_kimg)
    if config.decay_kimg:
        progress = jax.numpy.clip((kimg - (total_kimg - config.decay_kimg)) / config.decay_kimg, 0.0, 1.0)
        rate *= config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + jax.numpy.cos(jax.numpy.pi * progress))
    return rate
