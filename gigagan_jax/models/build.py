"""The networks of a run: from a whole `Config` to each network's own settings."""

import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import Config
from gigagan_jax.models.conditioning import ConditionSettings
from gigagan_jax.models.discriminator import Discriminator
from gigagan_jax.models.generator import Generator
from gigagan_jax.models.network import Network
from gigagan_jax.models.upsampler import Upsampler
from gigagan_jax.models.vision_aided import VisionAided


def make_generator(config: Config, rngs: nnx.Rngs) -> Generator | Upsampler:
    """G of a run, as a module with parameters."""
    condition, dtype = ConditionSettings.from_config(config), jnp.dtype(config.dtype)
    if config.is_upsampler:
        u, g = config.upsampler, config.generator
        return Upsampler(u, g, config.resolution, condition, remat=config.remat, dtype=dtype, rngs=rngs)
    return Generator(config.generator, condition, remat=config.remat, dtype=dtype, rngs=rngs)


def make_discriminator(config: Config, rngs: nnx.Rngs) -> Discriminator:
    """D of a run, as a module with parameters."""
    condition, dtype = ConditionSettings.from_config(config), jnp.dtype(config.dtype)
    return Discriminator(
        config.discriminator,
        condition,
        mapping_lr_mul=config.generator.mapping_lr_mul,
        remat=config.remat,
        dtype=dtype,
        rngs=rngs,
    )


def make_vision_aided(config: Config, rngs: nnx.Rngs) -> VisionAided:
    """V of a run: the trained heads of the vision-aided discriminator, as a module with parameters."""
    condition, dtype = ConditionSettings.from_config(config), jnp.dtype(config.dtype)
    return VisionAided(config.vision_aided, condition, remat=config.remat, dtype=dtype, rngs=rngs)


# The names are those of checkpoints and of the streams that initial values are drawn from.


def build_generator(config: Config) -> Network:
    """G without its parameters."""
    return Network("generator", lambda rngs: make_generator(config, rngs))


def build_discriminator(config: Config) -> Network:
    """D without its parameters."""
    return Network("discriminator", lambda rngs: make_discriminator(config, rngs))


def build_vision_aided(config: Config) -> Network:
    """V without its parameters."""
    return Network("vision_aided", lambda rngs: make_vision_aided(config, rngs))
