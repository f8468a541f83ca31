"""The latent space: z from a seed, and truncation of w (appendix C.1)."""

import jax
import jax.numpy as jnp

from gigagan_jax.models.conditioning import Condition

# Samples of z for a prompt; the mean of their w is the center of the prompt.
CENTER_SAMPLES = 16
# Truncations above 1 extrapolate away from the mean. Past 2 there is nothing that the generator was trained for.
MAX_TRUNCATION = 2.0


def z_of_seed(seed: jax.Array, z_dim: int) -> jax.Array:
    """Draws z, float32 [N, z_dim], from seeds, uint32 [N]."""
    # One key a seed: a seed gives the same z in any batch and on any mesh.
    return jax.vmap(lambda s: jax.random.normal(jax.random.key(s), (z_dim,)))(seed)


def center_z(z_dim: int) -> jax.Array:
    """float32 [K, z_dim], the z of every prompt's center."""
    # Fixed seeds, far from the small ones that users choose: the center of a prompt never changes.
    return z_of_seed(jnp.arange(CENTER_SAMPLES, dtype=jnp.uint32) + jnp.uint32(0x80000000), z_dim)


def lerp(a: jax.Array, b: jax.Array, t: jax.Array | float) -> jax.Array:
    """Interpolates linearly: a + t (b - a)."""
    return a + t * (b - a)


def truncate_w(
    generator: object,
    w: jax.Array,
    condition: Condition,
    w_avg: jax.Array,
    truncation: jax.Array,
    global_truncation: jax.Array,
    z_dim: int,
) -> jax.Array:
    """Truncates w towards the global mean, then towards the mean of its prompt.

    The paper takes one value for both (appendix C.1). Their factors multiply: 0.7 for both keeps half of the spread.

    Args:
      generator: bound Generator
      w: [N, w_dim]
      condition: of N prompts
      w_avg: [w_dim] running mean of training
      truncation: scalar, towards the mean of the prompt; 1 keeps w, 0 returns that mean, above 1 w moves away from it
      global_truncation: scalar, towards the mean of all prompts; 1 keeps w, 0 forgets the prompt in w, above 1 as before
      z_dim: size of z

    Returns:
      [N, w_dim]
    """
    z = center_z(z_dim)
    total = jnp.zeros_like(w)
    # One sample of all prompts at a time: the batch keeps its size and its sharding.
    for i in range(CENTER_SAMPLES):
        total += generator.map(jnp.broadcast_to(z[i], (w.shape[0], z_dim)), condition)  # type: ignore[attr-defined]
    # Exactly w at 1: the interpolation would round.
    near = jnp.where(global_truncation == 1.0, w, lerp(w_avg, w, global_truncation))
    return jnp.where(truncation == 1.0, near, lerp(total / CENTER_SAMPLES, near, truncation))
