"""The generator as a whole: what each pyramid level depends on, and what no image may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet
from gigagan_jax.config import GeneratorConfig, from_dict
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.models.build import make_generator
from gigagan_jax.models.generator import channels_at
from gigagan_jax.models.layers.resample import upsample
from gigagan_jax.models.network import Network, path_name

N = 3
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles in half the time


def change(config, **generator):
    return dataclasses.replace(config, generator=dataclasses.replace(config.generator, **generator))


def generator(config):
    return lambda rngs: make_generator(config, rngs)


@pytest.fixture(scope="module")
def small(tiny):
    """Three levels, a bank at two of them, attention at one: quick to compile."""
    text = dataclasses.replace(tiny.generator.text, depth=1)
    config = dataclasses.replace(tiny, remat=False, text=dataclasses.replace(tiny.text, length=24))
    return change(config, blocks=(1, 1, 1), bank=(1, 2, 2), attention_depth=(0, 1, 0), text=text)


@pytest.fixture(scope="module")
def made(small, build):
    """(f, params, z, tokens); f(params, z, tokens, local_tokens) -> (images, w), t_local from a caption of its own.

    A fifth argument is added to t_local where the caption has ended.
    """
    module, params = build(generator(small))

    @jax.jit
    def run(params, z, tokens, local_tokens, behind):
        g = module.bind(params)
        condition, other = g.condition(tokens), g.condition(local_tokens)
        w = g.map(z, condition)
        local = jnp.where(other.mask[:, :, None], other.local, other.local + behind)
        return g.synthesize(w, condition._replace(local=local, mask=other.mask)), w

    def f(params, z, tokens, local_tokens, behind=0.0):
        return run(params, z, tokens, local_tokens, behind)

    z = np.random.default_rng(0).standard_normal((N, small.generator.z_dim), np.float32)
    return f, params, z, captions("a cat", "", "red and green")


def captions(*texts):
    return ByteTokenizer(24)(texts)


def moved(a, b):
    """Largest change of each image [N] in each level: list of arrays."""
    return [np.abs(np.asarray(x) - np.asarray(y)).max((1, 2, 3)) for x, y in zip(a, b, strict=True)]


def test_pyramid_of_float32_images(made, small):
    f, params, z, tokens = made
    images, w = f(params, z, tokens, tokens)
    assert [x.shape for x in images] == [(N, r, r, 3) for r in (4, 8, 16)]
    assert {x.dtype for x in images} == {np.dtype("float32")}
    assert w.shape == (N, small.generator.w_dim)
    for x in images:
        assert np.isfinite(x).all()
        assert 0.2 < float(x.std()) < 5


def test_every_level_depends_on_z_and_on_the_caption(made):
    f, params, z, tokens = made
    base, _ = f(params, z, tokens, tokens)
    for other in (f(params, -z, tokens, tokens), f(params, z, *[captions("a dog", "two", "red")] * 2)):
        for change in moved(base, other[0]):
            assert (change > 1e-2).all()


def test_w_carries_the_caption_to_every_level_and_t_local_to_those_from_the_first_attention_on(made):
    f, params, z, tokens = made
    base, w = f(params, z, tokens, tokens)
    other = captions("a dog", "two", "red")
    images, same_w = f(params, z, tokens, other)
    np.testing.assert_array_equal(w, same_w)
    first, *later = moved(base, images)
    np.testing.assert_array_equal(first, 0)  # no attention at 4 px
    for change in later:
        assert (change > 1e-3).all()
    for change in moved(base, f(params, z, other, tokens)[0]):
        assert (change > 1e-2).all()


def test_an_image_does_not_depend_on_what_is_behind_the_end_of_its_caption(made):
    f, params, z, tokens = made
    base, _ = f(params, z, tokens, tokens)
    for change in moved(base, f(params, z, tokens, tokens, 3.0)[0]):
        np.testing.assert_array_equal(change, 0)


def test_an_image_does_not_depend_on_the_others_in_its_batch(made):
    f, params, z, tokens = made
    base, _ = f(params, z, tokens, tokens)
    z, tokens = z.copy(), tokens.copy()
    z[0] *= -1
    tokens[0] = captions("something else")[0]
    for change in moved(base, f(params, z, tokens, tokens)[0]):
        assert change[0] > 1e-2
        np.testing.assert_allclose(change[1:], 0, atol=1e-5)


def test_levels_are_sums_so_that_a_low_one_shows_in_all_above(made):
    f, params, z, tokens = made
    base, _ = f(params, z, tokens, tokens)
    other = jax.tree.map(lambda x: x, params)
    colour = np.array([0.5, -1.0, 2.0], np.float32)
    to_rgb = other["levels"][0]["to_rgb"]
    to_rgb["bias"] = to_rgb["bias"] + colour
    images, _ = f(other, z, tokens, tokens)
    shift = np.broadcast_to(colour, (N, 4, 4, 3))
    for a, b in zip(base, images, strict=True):
        np.testing.assert_allclose(np.asarray(b) - np.asarray(a), shift, atol=1e-4)
        shift = jax.jit(upsample)(shift)


def test_bfloat16_is_close_to_float32(made, small):
    f, params, z, tokens = made
    want, want_w = f(params, z, tokens, tokens)
    module = Network("half", generator(dataclasses.replace(small, dtype="bfloat16")))
    images, w = jax.jit(lambda p: module.bind(p)(z, tokens))(params)
    # M is float32; only its input has gone through bfloat16.
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(w, want_w, atol=0.1)
    for a, b in zip(images, want, strict=True):
        assert a.dtype == jnp.float32
        assert float(jnp.abs(a - b).mean() / b.std()) < 0.05


@pytest.fixture(scope="module")
def gradients(small, build):
    """{remat: gradient of a function of all levels} of an 8 px generator with stacked blocks and attention."""
    config = dataclasses.replace(small, resolution=8)
    config = change(config, blocks=(1, 2), bank=(1, 2), attention_depth=(0, 1))
    tokens = captions("a cat", "a longer one")
    z = np.random.default_rng(1).standard_normal((2, config.generator.z_dim), np.float32)
    _, params = build(generator(config))

    def grad(remat):
        module = Network("g", generator(dataclasses.replace(config, remat=remat)))
        loss = lambda p: sum(jnp.sin(3 * x).sum() for x in module.bind(p)(z, tokens)[0])
        assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(params))) == remat
        return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)

    return {remat: grad(remat) for remat in (False, True)}


def test_remat_leaves_the_gradients_as_they_are(gradients):
    def close(path, a, b):
        scale = float(jnp.abs(a).max())
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * scale, err_msg=path_name(path))

    jax.tree_util.tree_map_with_path(close, gradients[False], gradients[True])


def test_every_parameter_has_a_gradient(gradients):
    def alive(path, g):
        assert np.isfinite(g).all(), path_name(path)
        assert np.abs(g).max() > 0, path_name(path)

    jax.tree_util.tree_map_with_path(alive, gradients[False])


def shapes(config):
    g = Network("g", generator(config))
    n = 2
    text = config.condition == "text"
    tokens = jax.ShapeDtypeStruct((n, config.text.length), jnp.int32) if text else None
    labels = jax.ShapeDtypeStruct((n,), jnp.int32) if config.condition == "class" else None
    z = jax.ShapeDtypeStruct((n, config.generator.z_dim), jnp.float32)
    return [x.shape for x in jax.eval_shape(lambda p, *a: g.bind(p)(*a), g.abstract(), z, tokens, labels)[0]]


def test_conditions_and_variants_have_the_same_pyramid(tiny):
    want = [(2, r, r, 3) for r in (4, 8, 16)]
    for config in (
        tiny,
        dataclasses.replace(tiny, condition="none"),
        from_dict(imagenet.get_config("tiny")),
        change(tiny, attention_placement="every"),
        change(tiny, w_token=False, cross_attention=False, mlp_after_self=False),
    ):
        assert shapes(config) == want


def test_channels_of_the_paper():
    assert [channels_at(GeneratorConfig(), r) for r in (4, 8, 16, 32, 64)] == [1600, 1600, 1024, 512, 256]
