"""Truncation of w: its two folds, alone and as the paper has them, on the generator of digits:tiny."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigagan_jax.config import MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.inference.latents import CENTER_SAMPLES, truncate_w, z_of_seed
from gigagan_jax.inference.sampler import Sampler
from gigagan_jax.parallel import sharding
from tests.runs import small

one_device = lambda: sharding.make_mesh(MeshConfig(), jax.devices()[:1])
PROMPTS = ("the digit 3", "the digit 3", "a handwritten seven")


@pytest.fixture(scope="module")
def mapped():
    """(truncate: (truncation, global_truncation) -> w, w, mean of each prompt, w_avg)"""
    config = small()
    sampler = Sampler(config, one_device())
    generator = sampler.module.bind(sampler.module.init(0, sampler.shardings))
    z_dim = config.generator.z_dim
    tokens = jnp.asarray(ByteTokenizer(config.text.length)(list(PROMPTS)))
    condition = generator.condition(tokens, jnp.full(3, -1), None)
    w = generator.map(z_of_seed(jnp.arange(3, dtype=jnp.uint32), z_dim), condition)
    w_avg = jnp.linspace(-1, 1, w.shape[1])
    centers = z_of_seed(jnp.arange(CENTER_SAMPLES, dtype=jnp.uint32) + jnp.uint32(2**31), z_dim)
    means = np.mean([generator.map(jnp.tile(z, (3, 1)), condition) for z in centers], axis=0)
    truncate = lambda a, b: np.asarray(
        truncate_w(generator, w, condition, w_avg, jnp.float32(a), jnp.float32(b), z_dim)
    )
    return truncate, np.asarray(w), means, np.asarray(w_avg)


def test_nothing_is_truncated_at_one(mapped):
    truncate, w, *_ = mapped
    assert (truncate(1.0, 1.0) == w).all()


def test_towards_the_mean_of_the_prompt(mapped):
    truncate, w, means, _ = mapped
    # At 0 the seeds of one prompt agree, and prompts differ.
    zero = truncate(0.0, 1.0)
    np.testing.assert_allclose(zero, means, atol=1e-5)
    assert np.abs(zero[0] - zero[1]).max() < 1e-6
    assert np.abs(zero[0] - zero[2]).max() > 1e-3
    np.testing.assert_allclose(truncate(0.3, 1.0), means + 0.3 * (w - means), atol=1e-5)


def test_towards_the_mean_of_all_prompts(mapped):
    truncate, w, _, w_avg = mapped
    np.testing.assert_allclose(truncate(1.0, 0.0), np.tile(w_avg, (3, 1)), atol=1e-6)
    np.testing.assert_allclose(truncate(1.0, 0.6), w_avg + 0.6 * (w - w_avg), atol=1e-5)


def test_both_are_the_paper(mapped):
    """Appendix C.1: an interpolation with the global mean, then one with the mean of the prompt, by one psi."""
    truncate, w, means, w_avg = mapped
    psi = 0.7
    wanted = means + psi * (w_avg + psi * (w - w_avg) - means)
    np.testing.assert_allclose(truncate(psi, psi), wanted, atol=1e-5)


def test_a_sampler_tells_the_two_apart():
    config = small()
    sampler = Sampler(config, one_device())
    params = sampler.module.init(1, sampler.shardings)
    w_avg = jnp.full((config.generator.w_dim,), 0.5)
    draw = lambda **kw: sampler(params, w_avg, ["the digit 3"] * 4, range(4), **kw)
    whole, prompt, everything = draw(), draw(truncation=0.0), draw(global_truncation=0.0)
    # One picture each, and not the same.
    assert (prompt == prompt[0]).all()
    assert (everything == everything[0]).all()
    assert (prompt != everything).any()
    assert (whole != whole[0]).any()
    for name in ("truncation", "global_truncation"):
        for value in (2.5, -0.1, float("nan")):
            with pytest.raises(UserError, match=f"^{name} {value:g}: must be 0"):
                draw(**{name: value})
    # Above 1 it extrapolates.
    assert (draw(truncation=1.5) != whole).any()
