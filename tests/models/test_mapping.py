"""M against its formula; what it ignores; what its learning-rate multiplier changes and what not."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from gigagan_jax.models.conditioning import Mapping

TEXT = 24


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def mapping(tiny, build):
    """(f(params, z, t), params, z, t)"""
    module, params = build(lambda rngs: Mapping(tiny.generator, TEXT, rngs=rngs))
    f = jax.jit(lambda p, z, t: module.bind(p)(z, t))
    return f, params, normal(0, 256, tiny.generator.z_dim), normal(1, 256, TEXT)


def test_formula(mapping, tiny):
    f, params, z, t = mapping
    g = tiny.generator
    unit = lambda v: v / np.sqrt((v.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-8)
    x = np.concatenate([unit(z), unit(t)], -1)
    layers = [params["first"], *params["rest"].values()]
    assert len(layers) == g.mapping_depth
    for layer in layers:
        h = x @ np.asarray(layer["weight"], np.float64) * g.mapping_lr_mul / math.sqrt(x.shape[1])
        x = np.maximum(h, 0.2 * h) * math.sqrt(2)
    np.testing.assert_allclose(f(params, z, t), x, rtol=1e-3, atol=1e-4)


def test_scale_of_z_and_of_t_does_not_matter(mapping):
    f, params, z, t = mapping
    want = f(params, z, t)
    np.testing.assert_allclose(f(params, 30 * z, 0.1 * t), want, rtol=1e-3, atol=1e-4)
    assert np.abs(np.asarray(f(params, -z, t)) - want).max() > 0.1
    assert np.abs(np.asarray(f(params, z, -t)) - want).max() > 0.1


def test_w_starts_with_about_unit_second_moment(mapping):
    f, params, z, t = mapping
    assert float((np.asarray(f(params, z, t)) ** 2).mean()) == pytest.approx(1.0, abs=0.35)


def test_lr_mul_scales_the_gradient_and_not_the_function(mapping, tiny, build):
    f, params, z, t = mapping
    slow = tiny.generator.mapping_lr_mul
    full = dataclasses.replace(tiny, generator=dataclasses.replace(tiny.generator, mapping_lr_mul=1.0))
    module, _ = build(lambda rngs: Mapping(full.generator, TEXT, rngs=rngs))
    scaled = jax.tree.map(lambda v: v * slow, params)
    g = jax.jit(lambda p, z, t: module.bind(p)(z, t))
    np.testing.assert_allclose(g(scaled, z, t), f(params, z, t), rtol=1e-3, atol=1e-4)
    grad = lambda h, p: jax.jit(jax.grad(lambda p: (h(p, z, t) ** 2).mean()))(p)
    a, b = grad(f, params), grad(g, scaled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, slow * b, rtol=1e-3, atol=1e-7), a, b)


def test_without_a_condition_z_is_all_there_is(tiny, build):
    module, params = build(lambda rngs: Mapping(tiny.generator, 0, rngs=rngs))
    assert params["first"]["weight"].shape == (tiny.generator.z_dim, tiny.generator.w_dim)
    w = jax.jit(lambda p, z: module.bind(p)(z, None))(params, normal(0, 2, tiny.generator.z_dim))
    assert w.shape == (2, tiny.generator.w_dim)
    assert np.abs(w[0] - w[1]).max() > 0.1
