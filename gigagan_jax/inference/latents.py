"""The latent space: z from a seed, and truncation of w (appendix C.1)."""

import jax
import jax.numpy as jnp

from gigagan_jax.models.conditioning import Condition

# Samples of z for a prompt; the mean of their w is the center of the prompt.
CENTER_SAMPLES = 16


def z_of_seed(seed: jax.Array, z_dim: int) -> jax.Array:
    """Draws z, float32 [N, z_dim], from seeds, uint32 [N]."""
    # One key a seed: a seed gives the same z in any batch and on any mesh.
    return jax.vmap(lambda s: jax.random.normal(jax.random.key(s), (z_dim,)))(seed)


def lerp(a: jax.Array, b: jax.Array, t: jax.Array | float) -> jax.Array:
    """Interpolates linearly: a + t (b - a)."""
    return a + t * (b - a)


def truncate_w(
    generator: object, w: jax.Array, condition: Condition, w_avg: jax.Array, psi: jax.Array, z_dim: int
) -> jax.Array:
    """Truncates w towards the global mean, then towards the mean of its prompt.

    Args:
      generator: bound Generator
      w: [N, w_dim]
      condition: of N prompts
      w_avg: [w_dim] running mean of training
      psi: scalar; 1 keeps w, 0 returns the mean of the prompt
      z_dim: size of z

    Returns:
      [N, w_dim]
    """
    # Fixed seeds, far from the small ones that users choose: the center of a prompt never changes.
    z = z_of_seed(jnp.arange(CENTER_SAMPLES, dtype=jnp.uint32) + jnp.uint32(0x80000000), z_dim)
    total = jnp.zeros_like(w)
    # One sample of all prompts at a time: the batch keeps its size and its sharding.
    for i in range(CENTER_SAMPLES):
        total += generator.map(jnp.broadcast_to(z[i], (w.shape[0], z_dim)), condition)  # type: ignore[attr-defined]
    # Exactly w at psi = 1: the interpolation would round.
    return jnp.where(psi == 1.0, w, lerp(total / CENTER_SAMPLES, lerp(w_avg, w, psi), psi))
