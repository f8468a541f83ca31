"""The vision-aided discriminator: what its projections keep, what its logits depend on, its heads against torch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from configs import imagenet
from gigagan_jax.config import DEFAULT_RULES, MeshConfig, from_dict
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.models.build import make_vision_aided
from gigagan_jax.models.network import Network, path_name
from gigagan_jax.models.vision_aided import Head, RandomProjection
from gigagan_jax.parallel import sharding

N = 3
SIDES = (4, 3)  # of the features, a layer
WIDTH, OUT = 48, 16  # of RandomProjection
CAPTIONS = ["a red cat", "a big dog", ""]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def perturbed(params, seed=0):
    """Every parameter a little off its start, where biases are zero."""
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten([x + 0.2 * normal([seed, i], *x.shape) for i, x in enumerate(leaves)])


def change(config, **fields):
    return dataclasses.replace(config, vision_aided=dataclasses.replace(config.vision_aided, **fields))


# ---------------------------------------------------------------- the fixed projections


@pytest.fixture(scope="module")
def projection(build):
    module, params = build(lambda rngs: RandomProjection(WIDTH, OUT, 2, rngs=rngs))
    return jax.jit(lambda x: module.bind(params)(x)), params


def uneven(seed=0):
    """Features a layer, [2, side, side, WIDTH]: channels and positions differ in size by orders of magnitude."""
    scale = lambda i, *shape: 10.0 ** np.random.default_rng([seed, i]).uniform(-1, 2, shape).astype(np.float32)
    return [normal([seed, r], 2, r, r, WIDTH) * scale(r, WIDTH) * scale(r + 10, 2, r, r, 1) for r in SIDES]


def test_projection_keeps_second_moment_one_at_every_position(projection):
    project, params = projection
    features = uneven()
    out = project(features)
    assert [x.shape for x in out] == [(2, r, r, OUT) for r in SIDES]
    for x, f, w in zip(out, features, params["weights"].values(), strict=True):
        np.testing.assert_allclose(np.square(x).mean(-1), 1.0, rtol=1e-5)
        # A 1x1 convolution, and then only the size is changed.
        plain = f.astype(np.float64) @ np.asarray(w, np.float64)
        want = plain / np.sqrt(np.square(plain).mean(-1, keepdims=True))
        np.testing.assert_allclose(x, want, atol=1e-4)


def test_projection_in_half_precision(projection):
    project, _ = projection
    out = project([jnp.asarray(f, jnp.bfloat16) for f in uneven()])
    for x in out:
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.square(np.asarray(x, np.float32)).mean(-1), 1.0, rtol=0.01)


def test_projection_of_empty_features_and_its_gradient_are_finite(projection):
    project, _ = projection
    nothing = [np.zeros((1, r, r, WIDTH), np.float32) for r in SIDES]
    for x in project(nothing):
        np.testing.assert_array_equal(x, 0)
    for g in jax.jit(jax.grad(lambda f: sum(x.sum() for x in project(f))))(nothing):
        assert np.isfinite(g).all()


def test_projection_is_a_fixed_function_of_the_seed_on_any_mesh(build):
    make = lambda rngs: RandomProjection(WIDTH, OUT, 2, rngs=rngs)
    module, params = build(make, seed=5)
    first, second = (np.asarray(w) for w in params["weights"].values())
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    spread = module.init(5, module.shardings(mesh, DEFAULT_RULES))
    other = build(make, seed=6)[1]
    for w, again, changed in zip(
        params["weights"].values(), *(p["weights"].values() for p in (spread, other)), strict=True
    ):
        np.testing.assert_array_equal(w, again)
        assert again.addressable_shards[0].data.size == again.size // 4
        assert abs(np.corrcoef(np.ravel(w), np.ravel(changed))[0, 1]) < 0.15
        # Of unit variance where its input is.
        assert np.std(w) == pytest.approx(1 / math.sqrt(WIDTH), rel=0.1)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.15


# ---------------------------------------------------------------- the heads


@pytest.fixture(scope="module")
def small(tiny):
    """With one layer of text: the bytes encoder alone sees no more of a caption, at its end, than the last letter."""
    text = dataclasses.replace(tiny.vision_aided.text, depth=1)
    assert tiny.text.encoder == "bytes"
    return change(dataclasses.replace(tiny, remat=False), text=text)


@pytest.fixture(scope="module")
def features(small):
    return [normal(i, N, r, r, small.vision_aided.projection) for i, r in enumerate(SIDES)]


@pytest.fixture(scope="module")
def made(small, build, features):
    """(module, f, params, tokens, t, logits)"""
    module, params = build(lambda rngs: make_vision_aided(small, rngs))
    params = perturbed(params)
    tokens = ByteTokenizer(small.text.length)(CAPTIONS)
    t = np.asarray(jax.jit(lambda tokens: module.bind(params).condition(tokens, None))(tokens))
    f = jax.jit(lambda p, x, t: module.bind(p)(x, t))
    return module, f, params, tokens, t, [np.asarray(x) for x in f(params, features, t)]


def moved(a, b):
    """bool [layers, N]: did any logit of the example move?"""
    return np.stack([np.abs(x - np.asarray(y)).max(-1) > 1e-4 for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_logit_for_each_position_of_each_layer(small, dtype):
    config = dataclasses.replace(small, dtype=dtype)
    module = Network("v", lambda rngs: make_vision_aided(config, rngs))

    def f(params):
        v = module.bind(params)
        x = [jnp.zeros((N, r, r, config.vision_aided.projection), dtype) for r in SIDES]
        t = v.condition(jnp.zeros((N, config.text.length), jnp.int32), None)
        return t, v(x, t)

    t, logits = jax.eval_shape(f, module.abstract())
    assert t.shape == (N, config.vision_aided.text.width)
    assert [(x.shape, x.dtype) for x in logits] == [((N, r * r), jnp.float32) for r in SIDES]


def test_captions_and_only_they_set_the_condition(made):
    module, _, params, tokens, t, _ = made
    assert np.abs(t[:, None] - t[None]).max(-1)[np.triu_indices(N, 1)].min() > 0.1
    swapped = jax.jit(lambda tokens: module.bind(params).condition(tokens, None))(tokens[::-1])
    np.testing.assert_allclose(swapped[::-1], t, rtol=1e-4, atol=1e-5)


def test_condition_is_one_layer_on_the_normalised_end_of_text(made):
    module, _, params, tokens, t, _ = made
    said = jax.jit(lambda tokens: module.bind(params).conditioner(tokens, None).global_)(tokens)
    said = np.asarray(said, np.float64)
    weight, bias = (np.asarray(params["mix"][k], np.float64) for k in ("weight", "bias"))
    x = said / np.sqrt(np.square(said).mean(-1, keepdims=True))
    y = x @ weight / math.sqrt(len(weight)) + bias
    np.testing.assert_allclose(t, np.where(y > 0, y, 0.2 * y) * math.sqrt(2), rtol=1e-4, atol=1e-5)


def test_a_caption_changes_its_own_logits_only(made, features):
    _, f, params, _, t, logits = made
    other = t.copy()
    other[1] = t[2]
    got = moved(logits, f(params, features, other))
    np.testing.assert_array_equal(got, [[False, True, False]] * len(SIDES))


def test_features_change_the_logits_of_their_own_layer_and_example_only(made, features):
    _, f, params, _, t, logits = made
    for layer in range(len(SIDES)):
        x = [v.copy() for v in features]
        x[layer][2] += 0.5
        want = np.zeros((len(SIDES), N), bool)
        want[layer, 2] = True
        np.testing.assert_array_equal(moved(logits, f(params, x, t)), want)


def test_the_unconditional_part_does_not_see_the_caption(made, features):
    _, f, params, _, t, logits = made
    more = jax.tree.map(lambda x: x, params)
    for head in more["heads"].values():
        head["unconditional"] = jax.tree.map(lambda v: v + 0.7, head["unconditional"])
    other = t[::-1].copy()
    shifts = [
        [np.asarray(b) - np.asarray(a) for a, b in zip(f(params, features, c), f(more, features, c), strict=True)]
        for c in (t, other)
    ]
    for one, two in zip(*shifts, strict=True):
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(one, two, atol=1e-4)
    assert moved(logits, f(params, features, other))[:, [0, 2]].all()


def test_without_its_conditional_part_a_head_ignores_the_caption(made, small, features):
    _, f, params, _, t, _ = made
    bare = jax.tree.map(lambda x: x, params)
    last = small.vision_aided.head_depth - 1
    for head in bare["heads"].values():
        for name in ("filters", "bias"):
            head["layers"][last][name] = 0 * head["layers"][last][name]
    none = f(params, features, None)  # as without a caption at all
    for a, b, c in zip(f(bare, features, t), f(bare, features, -t), none, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-5)
        assert np.abs(a).max() > 0.1


@pytest.mark.parametrize("depth", [1, 3])
def test_head_parity_with_torch(tiny, build, depth):
    config = change(tiny, head_depth=depth)
    module, params = build(lambda rngs: Head(config.vision_aided, 10, dtype=jnp.float32, rngs=rngs))
    params = perturbed(params)
    x, t = normal(0, N, 5, 5, config.vision_aided.projection), normal(1, N, 10)
    got = np.asarray(jax.jit(lambda p, x, t: module.bind(p)(x, t))(params, x, t))

    p = jax.tree.map(lambda v: torch.tensor(np.asarray(v)), params)
    act = lambda v: functional.leaky_relu(v, 0.2) * math.sqrt(2)
    conv = lambda v, q: functional.conv2d(
        v, q["weight"].permute(3, 2, 0, 1) / math.sqrt(math.prod(q["weight"].shape[:3])), q["bias"], padding="same"
    )
    h = act(conv(torch.tensor(x).permute(0, 3, 1, 2), p["entry"]))
    want = conv(h, p["unconditional"])
    for i in range(depth):
        q = p["layers"][i]
        style = torch.tensor(t) @ q["style"]["weight"] / math.sqrt(10) + q["style"]["bias"]
        kernels = (
            q["filters"][0].permute(3, 2, 0, 1)[None] * style[:, None, :, None, None] / math.sqrt(9 * style.shape[1])
        )
        if i < depth - 1:
            kernels = kernels / (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
        h = torch.cat([functional.conv2d(v[None], k, q["bias"], padding=1) for v, k in zip(h, kernels, strict=True)])
        h = act(h) if i < depth - 1 else h
    want = (want + h).flatten(1).numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def alive(path, g):
    assert np.isfinite(g).all(), path_name(path)
    assert np.abs(g).max() > 0, path_name(path)


def test_every_parameter_has_a_gradient(made, features):
    module, _, params, tokens, _, _ = made

    def loss(p):
        v = module.bind(p)
        return sum(jnp.sin(3 * x).sum() for x in v(features, v.condition(tokens, None)))

    jax.tree_util.tree_map_with_path(alive, jax.jit(jax.grad(loss))(params))


# ---------------------------------------------------------------- other conditions


def test_class_labels_set_the_logits(tiny, build, features):
    config = dataclasses.replace(
        from_dict(imagenet.get_config("tiny")), vision_aided=tiny.vision_aided, dtype="float32"
    )
    module, params = build(lambda rngs: make_vision_aided(config, rngs))

    @jax.jit
    def f(labels):
        v = module.bind(params)
        t = v.condition(None, labels)
        assert t.shape == (N, config.generator.w_dim)
        return v(features, t)

    got = moved(f(np.array([0, 1, 2], np.int32)), f(np.array([0, 7, 2], np.int32)))
    np.testing.assert_array_equal(got, [[False, True, False]] * len(SIDES))


def test_without_a_condition_there_is_only_the_unconditional_part(tiny, build, features):
    config = dataclasses.replace(tiny, condition="none")
    module, params = build(lambda rngs: make_vision_aided(config, rngs))
    assert {path_name(p).split("/")[0] for p, _ in jax.tree_util.tree_leaves_with_path(params)} == {"heads"}
    for head in params["heads"].values():
        assert {k for k, v in head.items() if jax.tree.leaves(v)} == {"entry", "unconditional"}

    def f(p):
        v = module.bind(p)
        assert v.condition(None, None) is None
        return v(features, None)

    logits = jax.eval_shape(f, params)
    assert [x.shape for x in logits] == [(N, r * r) for r in SIDES]
    loss = lambda p: sum(jnp.sin(3 * x).sum() for x in f(p))
    jax.tree_util.tree_map_with_path(alive, jax.jit(jax.grad(loss))(params))
