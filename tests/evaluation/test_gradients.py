"""Gradients of trained models: of D's exits, and in bfloat16 against float32."""

import dataclasses

import jax
import numpy as np
import pytest

from gigagan_jax.evaluation import gradients
from gigagan_jax.training.objectives import GanObjective
from gigagan_jax.training.state import Networks
from tests.fixtures.make_trained import load_trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    config, state = load_trained("digits")
    return config, state, gradients.read_batch(config, gradients.single_device_mesh())


def test_the_exits_of_a_trained_discriminator_do_not_pay_for_each_other(digits):
    """In 185 kimg under R1 of the plain sum, the cosine at 16 px became -0.97."""
    config, state, batch = digits
    objective = GanObjective(Networks(config))
    exits = gradients.measure_exits(objective, state.d.params, batch)
    assert [e.resolution for e in exits] == [16, 8, 4]
    assert min(e.cosine for e in exits) >= -0.3
    for e in exits:
        expected = e.last + e.others + 2 * e.cosine * np.sqrt(e.last * e.others)
        assert e.plain_sum == pytest.approx(expected, rel=1e-3)
    own = gradients.last_exit_penalty(objective, exits)
    paid = gradients.mean_penalty(objective, state.d.params, batch, jax.random.key(0), draws=2)
    assert 0.5 < paid / own < 2


def test_gradients_of_the_trained_digits_in_bfloat16(digits):
    config, state, batch = digits
    cosines = gradients.compare_precisions(config, state, batch, jax.random.key(0), with_r1=False)
    assert cosines.keys() == {"g", "d"}
    assert min(cosines.values()) >= 0.99


def test_gradients_of_a_trained_text_model_in_bfloat16():
    """All losses: a CLIP reads the captions and judges the images, V stands on its tower."""
    folder = "tests/fixtures/trained/clip"
    config, state = load_trained("laion", text__path=folder)
    mesh = gradients.single_device_mesh()
    batch = gradients.read_batch(config, mesh)
    frozen, _ = Networks(dataclasses.replace(config, dtype="float32")).frozen.load(mesh)
    cosines = gradients.compare_precisions(config, state, batch, jax.random.key(0), frozen, with_r1=False)
    assert cosines.keys() == {"g", "d", "v"}
    assert min(cosines.values()) >= 0.99
