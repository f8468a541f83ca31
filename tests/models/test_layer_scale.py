"""Options of G's branches: LayerScale with normalisation on those of convolutions, zero-initialised ones of attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigagan_jax.models.build import build_generator
from gigagan_jax.models.generator import AttentionLayer, SynthesisBlock
from gigagan_jax.models.layers.resample import upsample
from gigagan_jax.models.network import is_spec, path_name

N, IN, OUT = 2, 6, 5


def change(config, **generator):
    return dataclasses.replace(config, generator=dataclasses.replace(config.generator, **generator))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def specs(config):
    """{name: Spec} of G."""
    tree = build_generator(config).specs
    return {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec)}


@pytest.fixture(scope="module")
def block(build, tiny):
    """(Network, parameters, x, w) of a block that upsamples and changes channels, with a gain of its own a channel."""
    g = change(tiny, layer_scale=0.01).generator
    module, params = build(lambda rngs: SynthesisBlock(g, IN, OUT, bank=2, up=True, dtype=jnp.float32, rngs=rngs))
    np.testing.assert_array_equal(params["layer_scale"], np.full(OUT, 0.01, np.float32))
    params["layer_scale"], params["norm"]["gain"] = jnp.asarray(normal(0, OUT)), jnp.asarray(normal(1, IN))
    return module, params, normal(2, N, 4, 4, IN), normal(3, N, g.w_dim)


def test_block_is_the_stream_and_a_scaled_branch_of_its_norm(block):
    module, params, x, w = block
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(params["norm"]["gain"])

    def both(p, x, normed):
        b = module.bind(p)
        skip = upsample(b.skip(x))
        return b(x, w, None, None), skip, skip + p["layer_scale"] * b.conv1(b.conv0(normed, w), w)

    got, skip, want = jax.jit(both)(params, x, normed)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - skip).mean() > 0.1


def test_branch_does_not_grow_with_the_stream(block):
    module, params, x, w = block
    branch = jax.jit(lambda p, x: module.bind(p)(x, w, None, None) - upsample(module.bind(p).skip(x)))
    np.testing.assert_allclose(branch(params, 100 * x), branch(params, x), rtol=1e-2, atol=1e-3)


def test_layer_scale_adds_a_norm_and_a_gain_to_every_block_and_changes_no_other_parameter(tiny):
    off, on = specs(tiny), specs(change(tiny, layer_scale=1e-5))
    assert {k: on[k] for k in off} == off
    blocks = {k.removesuffix("/conv0/filters") for k in off if k.endswith("/conv0/filters")}
    assert len(blocks) == 6  # the first and the stacked ones of three levels
    assert on.keys() - off.keys() == {f"{b}/{name}" for b in blocks for name in ("norm/gain", "layer_scale")}
    for b in blocks:
        assert (on[f"{b}/layer_scale"].mean, on[f"{b}/layer_scale"].std) == (1e-5, 0)


def test_zero_init_is_of_the_last_projection_of_each_attention_branch(tiny):
    drawn, zero = specs(tiny), specs(change(tiny, attention_zero_init=True))
    assert drawn.keys() == zero.keys()
    changed = {k for k in drawn if drawn[k] != zero[k]}
    last = ("attention/out", "self_mlp/down", "cross/out", "cross_mlp/down")
    assert changed == {f"levels/{i}/attention/layer/{name}/weight" for i in (1, 2) for name in last}
    assert {zero[k].std for k in changed} == {0}


def test_zero_initialised_attention_starts_as_the_identity_and_learns(build, tiny):
    g = change(tiny, attention_zero_init=True).generator
    module, params = build(lambda rngs: AttentionLayer(g, 8, 6, dtype=jnp.float32, rngs=rngs))
    x, w, local, mask = normal(0, N, 2, 2, 8), normal(1, N, g.w_dim), normal(2, N, 3, 6), np.ones((N, 3), bool)
    f = lambda p: module.bind(p)(x, w, local, mask)

    def loss(p):
        out = f(p)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(out, x)
    for branch, last in (("attention", "out"), ("self_mlp", "down"), ("cross", "out"), ("cross_mlp", "down")):
        assert np.abs(gradients[branch][last]["weight"]).max() > 1e-3, branch
