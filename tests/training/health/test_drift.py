"""The level that a gradient norm is compared with: what lowers it, and what does not."""

import json
import math

import numpy as np
import pytest

from gigagan_jax.training.health.drift import DriftMeter

WINDOW, PATIENCE = 10, 50


def feed(meter, norms, **flags):
    for norm in norms:
        meter.add_norm(float(norm), **flags)
    return meter.factor


def test_the_first_level_is_the_highest_mean_of_the_first_steps():
    meter = DriftMeter(4, 3)
    norms = [1.0, 2.0, 4.0, 8.0, 5.0, 1.0, 3.0]
    # A plain mean of four logarithms, then an exponential one.
    means = [np.log(norms[:4]).mean()]
    for x in norms[4:]:
        means.append(means[-1] + (math.log(x) - means[-1]) / 4)
    assert math.isnan(feed(meter, norms[:5]))
    assert feed(meter, norms[5:6]) == pytest.approx(math.exp(means[2] - max(means[:3])))
    assert feed(meter, norms[6:]) == pytest.approx(math.exp(means[3] - max(means[:3])))


def test_a_level_that_lasts_is_the_new_reference_and_a_dip_is_not():
    meter = DriftMeter(WINDOW, PATIENCE)
    feed(meter, [1.0] * (WINDOW + PATIENCE))
    feed(meter, [1e-3] * WINDOW)
    assert feed(meter, [1.0] * 300) == pytest.approx(1, rel=0.1)
    feed(meter, [1e-3] * (PATIENCE * 6))
    assert feed(meter, [1.0] * 300) == pytest.approx(1e3, rel=1e-2)


def test_spikes_do_not_look_like_growth():
    meter, rng = DriftMeter(WINDOW, PATIENCE), np.random.default_rng(0)
    norms = np.where(rng.uniform(size=2000) < 0.02, 1e3, 1.0)
    factors = [feed(meter, [x]) for x in norms]
    # The arithmetic mean of the window is above 50 with each of them.
    assert np.nanmax(factors) < 5


def test_noise_does_not_wear_the_reference_down():
    """The lowest mean of a long run would be far below a usual one; the lowest that lasts is not."""
    meter, rng = DriftMeter(WINDOW, PATIENCE), np.random.default_rng(0)
    factors = [feed(meter, [x]) for x in np.exp(rng.normal(size=20_000))]
    assert 0.6 < np.nanmean(factors[-5000:]) < 1.5


def test_a_norm_without_a_logarithm_is_left_out():
    meter = DriftMeter(2, 1)
    feed(meter, [2.0, 2.0, 2.0])
    assert feed(meter, [0.0, math.inf, math.nan]) == pytest.approx(1)


def test_continues_from_its_state():
    rng = np.random.default_rng(1)
    norms = np.exp(rng.normal(size=400) + np.sin(np.arange(400) / 30))
    whole, cut = DriftMeter(WINDOW, PATIENCE), DriftMeter(WINDOW, PATIENCE)
    for i, norm in enumerate(norms):
        whole.add_norm(norm, is_saturated=i % 90 < 5)
        if i % 7 == 0:
            cut = DriftMeter(WINDOW, PATIENCE, json.loads(json.dumps(cut.state(), allow_nan=False)))
        cut.add_norm(norm, is_saturated=i % 90 < 5)
        assert cut.state() == whole.state()
    assert math.isfinite(whole.factor)
