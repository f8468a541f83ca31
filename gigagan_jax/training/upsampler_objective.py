"""What is trained of an upsampler: the base model's losses on images that were made from small ones, and what compares the two
(sec. 3.4)."""

import jax
import jax.numpy as jnp

from gigagan_jax.models.network import Params
from gigagan_jax.parallel import sharding
from gigagan_jax.training import losses
from gigagan_jax.training.batch import Batch
from gigagan_jax.training.degradations import add_noise, degrade, downsample_image
from gigagan_jax.training.objectives import GanObjective, real_levels
from gigagan_jax.training.state import Networks


class UpsamplerObjective(GanObjective):
    """The losses of an upsampler, its critic and nothing else that is trained."""

    def make_low(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The small images of a batch: reduced, some of them degraded first, and noisy.

        Returns:
          (float32 [N, r, r, 3] in about [-1, 1], level of their noise [N])
        """
        u = self.config.upsampler
        real = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        n, size = real.shape[0], u.input_resolution
        key_kind, key_degrade, key_level, key_noise, key_strength = jax.random.split(key, 5)
        # Sharp filters overshoot, and files do not hold that.
        low = jnp.clip(downsample_image(real, (size, size), u.downsample), -1.0, 1.0)
        if u.degradation:
            # All are degraded and some of them taken: on a device both cost what one does.
            strength = u.degradation_strength * jax.random.uniform(key_strength, (n,))
            worse = degrade(key_degrade, real, size, strength)
            chosen = jax.random.bernoulli(key_kind, u.degradation, (n,))
            low = jnp.where(chosen[:, None, None, None], worse, low)
        # Half of the images have none: that is what most images are enlarged with.
        level = u.noise * jnp.maximum(0.0, 2.0 * jax.random.uniform(key_level, (n,)) - 1.0)
        if u.noise:
            # Variance-preserving, as the forward process of a diffusion model.
            low = add_noise(low, level, jax.random.normal(key_noise, low.shape))
        return sharding.constrain(low, "batch", None, None, None), sharding.constrain(level, "batch")

    def generate(self, params: Params, batch: Batch, key: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Large images from the batch's own, made small -> (images low to high, w [N, w_dim])"""
        key_z, key_low = jax.random.split(key)
        z = jax.random.normal(key_z, (batch["image"].shape[0], self.config.generator.z_dim))
        z = sharding.constrain(z, "batch", None)
        low, level = self.make_low(batch, key_low)
        return self.networks.g.bind(params)(z, low, level, batch.get("tokens"), batch["label"], batch.get("features"))

    def reconstruction_losses(
        self, images: list[jax.Array], batch: Batch, frozen: Params
    ) -> list[tuple[str, float, jax.Array]]:
        """The pixel loss on the levels that D sees, and the perceptual loss on the largest image."""
        c, out = self.config, []
        reals = real_levels(batch, c)
        if c.loss.pixel:
            pairs = zip(images[::-1], reals, strict=False)
            weights = losses.level_weights(c)
            value = sum(w * jnp.abs(a - b).mean() for w, (a, b) in zip(weights, pairs, strict=False))
            out.append(("pixel", c.loss.pixel, jnp.asarray(value) / sum(weights)))
        if c.loss.perceptual:
            with jax.named_scope("perceptual"):
                distance = self.frozen.perceptual_distance(frozen, images[-1], reals[0])
            out.append(("perceptual", c.loss.perceptual, distance.mean()))
        return out


def make_objective(networks: Networks) -> GanObjective:
    """What a config trains."""
    return (UpsamplerObjective if networks.config.is_upsampler else GanObjective)(networks)
