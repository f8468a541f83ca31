"""The latent space: z by seed, and truncation of w (appendix C.1)."""

import jax
import jax.numpy as jnp

from gigagan_jax.models.conditioning import Condition

CENTRE_SAMPLES = 16  # z per prompt whose mean w is the prompt's centre


def z_of_seed(seed: jax.Array, z_dim: int) -> jax.Array:
    """uint32 [N] -> float32 [N, z_dim]; a seed is the same z in any batch."""
    return jax.vmap(lambda s: jax.random.normal(jax.random.key(s), (z_dim,)))(seed)


def lerp(a: jax.Array, b: jax.Array, t: jax.Array | float) -> jax.Array:
    """a + t (b - a)"""
    return a + t * (b - a)


def truncate(
    generator: object, w: jax.Array, condition: Condition, w_avg: jax.Array, psi: jax.Array, z_dim: int
) -> jax.Array:
    """w drawn towards the global mean, then towards the mean of its prompt; psi = 1 leaves it, 0 is the prompt's mean.

    Args:
      generator: bound Generator
      w: [N, w_dim]
      condition: of N prompts
      w_avg: [w_dim] running mean of training
      psi: scalar
      z_dim: size of z

    Returns:
      [N, w_dim]
    """
    z = z_of_seed(jnp.arange(CENTRE_SAMPLES, dtype=jnp.uint32) + jnp.uint32(0x80000000), z_dim)
    total = jnp.zeros_like(w)
    for i in range(CENTRE_SAMPLES):
        total += generator.map(jnp.broadcast_to(z[i], (w.shape[0], z_dim)), condition)  # type: ignore[attr-defined]
    return jnp.where(psi == 1.0, w, lerp(total / CENTRE_SAMPLES, lerp(w_avg, w, psi), psi))
