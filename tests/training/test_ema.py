"""The moving average of G: its half-life is counted in images, so the batch size does not change it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gigagan_jax.config import Config, EmaConfig
from gigagan_jax.training.step import ema_decay


def config_of(batch, half_life_kimg, rampup):
    return dataclasses.replace(Config(), batch_size=batch, ema=EmaConfig(half_life_kimg, rampup))


def decay(config, images):
    return float(ema_decay(config, jnp.asarray(images, jnp.uint32)))


def gap_after(config, images):
    """What is left, after `images` images, of the distance to weights that do not move; as the step averages."""
    ema, target = 1.0, 0.0
    for seen in range(0, images, config.batch_size):
        ema = target + (ema - target) * decay(config, seen)
    return ema


@pytest.mark.parametrize("batch", [32, 128])
def test_half_of_the_gap_closes_in_a_half_life_at_any_batch_size(batch):
    config = config_of(batch, half_life_kimg=6.4, rampup=0.0)
    assert gap_after(config, 6_400) == pytest.approx(0.5, rel=1e-5)
    assert gap_after(config, 12_800) == pytest.approx(0.25, rel=1e-5)


def test_default_half_life_is_the_papers_decay():
    """0.9999 a step at batch 1024."""
    config = config_of(1024, EmaConfig().half_life_kimg, rampup=0.0)
    assert decay(config, 10**8) == pytest.approx(0.9999, abs=2e-6)


def test_ramp_up_forgets_the_start():
    config = config_of(16, half_life_kimg=5.0, rampup=0.05)
    assert decay(config, 0) == 0  # the first step takes the weights as they are
    for images in (16, 1_600, 32_000, 99_984):
        assert decay(config, images) == pytest.approx(0.5 ** (16 / (0.05 * images)), rel=1e-5)
    # 5 kimg is a twentieth of 100: from there on the half-life is the configured one.
    for images in (100_000, 200_000, 4_000_000_000):
        assert decay(config, images) == pytest.approx(0.5 ** (16 / 5_000), rel=1e-6)


def test_ramp_up_closes_the_same_gap_at_any_batch_size():
    """From 3.2 kimg on, the half-life follows the images seen: what is left is a power of the ratio of both ends."""
    left = [
        np.prod([decay(config_of(batch, 1e3, rampup=0.05), seen) for seen in range(3_200, 6_400, batch)])
        for batch in (16, 64)
    ]
    # In the limit of small batches: 0.5 ^ (ln(2) / 0.05).
    assert left[0] == pytest.approx(0.5 ** (np.log(2) / 0.05), rel=0.05)
    assert left[1] == pytest.approx(left[0], rel=0.2)
