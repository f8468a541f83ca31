"""AdamW as the paper has it: two rates of weight decay, lazy-regularisation correction, schedules in images."""

from typing import Any

import jax
import optax

from gigagan_jax.config import OptimizerConfig
from gigagan_jax.models.network import Spec, is_spec


def decay_rates(config: OptimizerConfig, specs: Any) -> Any:
    """Weight decay of each parameter. Biases and gains (one dimension, "layers" aside) have none.

    Args:
      specs: tree of `Spec`s, as a `Network` has it
    """

    def rate(spec: Spec) -> float:
        # Stacked layers add a dimension that is no part of the parameter itself.
        if len([name for name in spec.axes if name != "layers"]) < 2:
            return 0.0
        return config.attention_weight_decay if spec.attention else config.weight_decay

    return jax.tree.map(rate, specs, is_leaf=is_spec)


def make_optimizer(config: OptimizerConfig, specs: Any, *, lazy_interval: int = 0) -> optax.GradientTransformation:
    """AdamW (A2) without its learning rate, which the step multiplies in: it depends on images, not on steps.

    With beta1 = 0 the first moment is the gradient itself and is not stored, which saves four bytes a parameter.

    Args:
      specs: tree of `Spec`s, as a `Network` has it
      lazy_interval: steps between lazy penalties; betas become beta^(k / (k + 1)) (StyleGAN2, appendix B). 0 is none.
    """
    c = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    b1, b2 = (config.beta1**c if config.beta1 else 0.0), config.beta2**c
    if b1:
        adam = optax.scale_by_adam(b1=b1, b2=b2, eps=config.epsilon)
    else:
        # RMSprop with bias correction is Adam without a first moment.
        adam = optax.scale_by_rms(decay=b2, eps=config.epsilon, eps_in_sqrt=False, bias_correction=True)
    rates = decay_rates(config, specs)

    def add_decay(updates: Any, params: Any) -> Any:
        # Decoupled decay (AdamW): added after the moments, so that it is not divided by them.
        return jax.tree.map(lambda u, p, r: u + r * p if r else u, updates, params, rates)

    # Decay has no state: a checkpoint's optimizer state does not depend on the rates.
    return optax.chain(adam, optax.stateless(add_decay))


def learning_rate(
    config: OptimizerConfig, images: jax.Array, total_kimg: float, *, lazy_interval: int = 0
) -> jax.Array:
    """Learning rate after `images` images (float32 scalar): warm-up, constant, cosine to the end where configured."""
    c = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    # Float32 counts images exactly to 16 million; past that a schedule in thousands of images needs no more.
    kimg = images.astype("float32") / 1000.0
    rate = jax.numpy.asarray(config.learning_rate * c, "float32")
    if config.warmup_kimg:
        rate *= jax.numpy.minimum(1.0, kimg / config.warmup_kimg)
    if config.decay_kimg:
        progress = jax.numpy.clip((kimg - (total_kimg - config.decay_kimg)) / config.decay_kimg, 0.0, 1.0)
        rate *= config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + jax.numpy.cos(jax.numpy.pi * progress))
    return rate
