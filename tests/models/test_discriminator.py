"""The discriminator: its pairs and their order, what each prediction may depend on, its heads and statistics."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from configs import imagenet
from gigagan_jax.config import DiscriminatorConfig, from_dict
from gigagan_jax.models.build import make_discriminator
from gigagan_jax.models.discriminator import (
    ModulatedHead,
    ProjectionHead,
    TrunkBlock,
    channels_at,
    minibatch_std,
    prediction_pairs,
)
from gigagan_jax.models.network import Network, path_name

N, S, M = 4, 2, 2
SIDES = (16, 8, 4)  # high to low
GROUP = 2
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles in half the time


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def predict(disc, images, t):
    """Logits [N, S, M, h * w] of every pair, for images [N, S, r, r, 3] a level and captions [N, M, D]."""
    sources = {str(s): [x[:, s] for x in images] for s in range(images[0].shape[1])}
    captions = [] if t is None else [t[:, m] for m in range(t.shape[1])]
    out = disc(sources, captions[0] if captions else None, captions[1] if len(captions) > 1 else None)
    by_caption = lambda logits: [logits.own] + ([logits.wrong] if logits.wrong else [])
    pairs = range(len(out["0"].own))
    return [jnp.stack([jnp.stack([x[k] for x in by_caption(out[s])], axis=1) for s in sources], axis=1) for k in pairs]


def change(config, **discriminator):
    return dataclasses.replace(config, discriminator=dataclasses.replace(config.discriminator, **discriminator))


# ---------------------------------------------------------------- pairs


def test_fifteen_pairs_by_exit_then_level():
    got = prediction_pairs(DiscriminatorConfig())
    assert len(got) == 15
    assert [tuple(p) for p in got] == [(i, j) for j in range(5) for i in range(j + 1)]
    by_level = [sum(p.level == i for p in got) for i in range(5)]
    assert by_level == [5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    "inputs, outputs, want",
    [
        (True, True, [(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)]),
        (True, False, [(0, 2), (1, 2), (2, 2)]),
        (False, True, [(0, 0), (0, 1), (0, 2)]),
        (False, False, [(0, 2)]),
    ],
)
def test_pairs_are_what_the_network_returns(tiny, inputs, outputs, want):
    config = change(tiny, multi_scale_input=inputs, multi_scale_output=outputs)
    assert [tuple(p) for p in prediction_pairs(config.discriminator)] == want
    assert shapes(config) == [(N, S, M, max(1, (SIDES[j] // 2) ** 2) if j < 2 else 1) for _, j in want]


def shapes(config, captions=M):
    d = Network("d", lambda rngs: make_discriminator(config, rngs))
    sides = SIDES if config.discriminator.multi_scale_input else SIDES[:1]
    images = [jax.ShapeDtypeStruct((N, S, r, r, 3), jnp.float32) for r in sides]

    def f(p):
        disc = d.bind(p)
        tokens = jnp.zeros((N, config.text.length), jnp.int32) if config.condition == "text" else None
        t = disc.condition(tokens, jnp.zeros((N,), jnp.int32) if config.condition == "class" else None)
        if t is not None:
            t = jnp.stack([t] * captions, axis=1)
        return predict(disc, [jnp.zeros(x.shape, x.dtype) for x in images], t)

    out = jax.eval_shape(f, d.abstract())
    assert {x.dtype for x in out} == {np.dtype("float32")}
    return [x.shape for x in out]


def test_classes_and_no_condition(tiny):
    assert shapes(from_dict(imagenet.get_config("tiny")), captions=2) == [(N, S, 2, 1)]
    assert shapes(dataclasses.replace(tiny, condition="none"))[-1] == (N, S, 1, 1)


def test_channels_of_the_paper():
    assert [channels_at(DiscriminatorConfig(), r) for r in (64, 32, 16, 8, 4)] == [512, 1024, 1536, 1536, 1536]


# ---------------------------------------------------------------- the network as a whole


@pytest.fixture(scope="module")
def small(tiny):
    text = dataclasses.replace(tiny.discriminator.text, depth=1)
    config = dataclasses.replace(tiny, remat=False, text=dataclasses.replace(tiny.text, length=16))
    return change(
        config, blocks=(1, 2, 1), attention_depth=(0, 1, 0), minibatch_std=GROUP, head_depth=3, head_width=8, text=text
    )


@pytest.fixture(scope="module")
def made(small, build):
    """(f, params, images, t, logits)"""
    module, params = build(lambda rngs: make_discriminator(small, rngs))
    f = jax.jit(lambda p, images, t: predict(module.bind(p), images, t))
    images = [normal(i, N, S, r, r, 3) for i, r in enumerate(SIDES)]
    t = normal(9, N, M, small.discriminator.text.width)
    return f, params, images, t, [np.asarray(x) for x in f(params, images, t)]


def different(a, b):
    """bool [pairs, N, S, M]: did the prediction move?"""
    moved = np.stack([np.abs(x - np.asarray(y)).max(-1) for x, y in zip(a, b, strict=True)])
    assert not ((moved > 1e-5) & (moved < 1e-4)).any(), "neither rounding nor a change"
    return moved > 1e-4


@pytest.mark.parametrize("level", range(3))
def test_late_entry_a_pair_sees_its_own_level_only(made, small, level):
    f, params, images, t, logits = made
    images = [x + 0.5 * normal(20, *x.shape) if i == level else x for i, x in enumerate(images)]
    moved = different(logits, f(params, images, t))
    for pair, m in zip(prediction_pairs(small.discriminator), moved, strict=True):
        assert m.all() if pair.level == level else not m.any(), pair


def test_groups_of_the_deviation_never_mix_levels_sources_or_other_groups(made, small):
    f, params, images, t, logits = made
    images = [x.copy() for x in images]
    images[0][1, 1] += 1.0  # the output image of example 1, source 1
    moved = different(logits, f(params, images, t))
    for pair, m in zip(prediction_pairs(small.discriminator), moved, strict=True):
        want = np.zeros((N, S, M), bool)
        if pair.level == 0:
            want[1, 1] = True
            if pair.exit == 2:  # the last exit, after the deviation over examples 0 and 1
                want[0, 1] = True
        np.testing.assert_array_equal(m, want, err_msg=str(pair))


def test_a_caption_changes_its_own_predictions_only(made):
    f, params, images, t, logits = made
    t = t.copy()
    t[2, 1] *= -1
    want = np.zeros((N, S, M), bool)
    want[2, :, 1] = True
    for m in different(logits, f(params, images, t)):
        np.testing.assert_array_equal(m, want)


def test_captions_change_places_with_their_predictions(made):
    f, params, images, t, logits = made
    for a, b in zip(logits, f(params, images, t[:, ::-1]), strict=True):
        np.testing.assert_allclose(a[:, :, ::-1], b, rtol=1e-4, atol=1e-5)


def test_the_unconditional_branch_does_not_see_the_caption(made):
    f, params, images, t, logits = made
    other = jax.tree.map(lambda x: x, params)
    for head in (level["head"] for level in other["levels"].values()):
        head["unconditional"] = jax.tree.map(lambda v: v + 0.7, head["unconditional"])
    for a, b in zip(logits, f(other, images, t), strict=True):
        shift = np.asarray(b) - a
        assert np.abs(shift).max() > 0.1
        np.testing.assert_allclose(shift[:, :, 0], shift[:, :, 1], atol=1e-4)


def test_without_its_conditional_branch_a_head_ignores_the_caption(made, small):
    f, params, images, t, _ = made
    other = jax.tree.map(lambda x: x, params)
    last = small.discriminator.head_depth - 1
    for head in (level["head"] for level in other["levels"].values()):
        head["layers"][last] = jax.tree.map(lambda v: 0 * v, head["layers"][last])
    for a, b in zip(f(other, images, t), f(other, images, -t), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a).max() > 0


def test_sources_and_captions_are_as_if_asked_one_by_one(made, small):
    _, params, images, t, logits = made
    module = Network("d", lambda rngs: make_discriminator(small, rngs))
    alone = jax.jit(lambda images, t: predict(module.bind(params), images, t))
    for s, m in ((0, 1), (1, 0)):
        got = alone([x[:, s : s + 1] for x in images], t[:, m : m + 1])
        for a, b in zip(got, logits, strict=True):
            np.testing.assert_allclose(a, b[:, s : s + 1, m : m + 1], rtol=1e-3, atol=1e-4)


def test_every_parameter_has_a_gradient(small, build):
    config = dataclasses.replace(small, resolution=8, remat=True)
    config = change(config, blocks=(2, 1), attention_depth=(1, 0), mlp=True)
    module, params = build(lambda rngs: make_discriminator(config, rngs))
    images = [normal(i, N, 1, r, r, 3) for i, r in enumerate((8, 4))]
    tokens = np.array([[1, 50 + i, 60, 2] + [0] * 12 for i in range(N)], np.int32)

    def loss(p):
        d = module.bind(p)
        return sum(jnp.sin(3 * x).sum() for x in predict(d, images, d.condition(tokens)[:, None]))

    def alive(path, g):
        assert np.isfinite(g).all(), path_name(path)
        assert np.abs(g).max() > 0, path_name(path)

    jax.tree_util.tree_map_with_path(alive, jax.jit(jax.grad(loss), compiler_options=QUICK)(params))


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("down, gain", [(False, 1.0), (True, 1.0), (False, 0.6)])
def test_residual_block_parity_with_torch(build, down, gain):
    module, params = build(
        lambda rngs: TrunkBlock(4, 6 if down else 4, down=down, gain=gain, dtype=jnp.float32, rngs=rngs)
    )
    params["conv0"]["bias"] = jnp.asarray(normal(1, 4))
    x = normal(0, 2, 3, 8, 8, 4)
    got = jax.jit(lambda p, x: module.bind(p)(x))(params, x)
    p = jax.tree.map(lambda v: torch.from_numpy(np.array(v)), params)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    blur = lambda x, pad: functional.conv2d(x, (taps[:, None] * taps[None]).expand(4, 1, 4, 4), padding=pad, groups=4)
    weight = lambda a: a["weight"].permute(3, 2, 0, 1) / math.sqrt(math.prod(a["weight"].shape[:3]))
    act = lambda x: functional.leaky_relu(x, 0.2) * math.sqrt(2)
    flat = torch.from_numpy(x.reshape(6, 8, 8, 4)).permute(0, 3, 1, 2)
    h = act(functional.conv2d(flat, weight(p["conv0"]), p["conv0"]["bias"], padding=1))
    if down:
        h = functional.conv2d(blur(h, 2), weight(p["conv1"]), p["conv1"]["bias"], stride=2)
        skip = functional.conv2d(blur(flat, 1), weight(p["skip"]), stride=2)
    else:
        h, skip = functional.conv2d(h, weight(p["conv1"]), p["conv1"]["bias"], padding=1), flat
    want = ((skip + gain * act(h)) / math.sqrt(1 + gain**2)).permute(0, 2, 3, 1).reshape(got.shape)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_residual_gain_is_that_of_every_block(tiny):
    d = nnx.eval_shape(lambda: make_discriminator(change(tiny, residual_gain=0.6), nnx.Rngs(0)))
    *halving, last = d.levels
    assert [level.down.gain for level in halving] == [0.6, 0.6]
    assert [level.blocks.layer.gain for level in (halving[1], last)] == [0.6, 0.6]


def test_minibatch_std_formula_and_isolation():
    x = normal(0, 6, 3, 2, 2, 5)
    f = jax.jit(minibatch_std, static_argnums=1)
    for group in (2, 3, 6):
        got = np.asarray(f(x, group))
        assert got.shape == (6, 3)
        for n in range(6):
            start = n // group * group
            want = np.sqrt(x[start : start + group].var(0) + 1e-8).mean((1, 2, 3))
            np.testing.assert_allclose(got[n], want, rtol=1e-5)
    moved = x.copy()
    moved[3, 1] *= 9
    want = np.zeros((6, 3), bool)
    want[2:4, 1] = True
    np.testing.assert_array_equal(f(moved, 2) != f(x, 2), want)


def test_minibatch_std_of_equal_images_has_a_finite_gradient():
    grad = jax.jit(jax.grad(lambda x: minibatch_std(x, 2).sum()))(jnp.ones((2, 1, 2, 2, 3)))
    np.testing.assert_array_equal(grad, 0)


def test_projection_head_formula(build, tiny):
    c, d = 12, 5
    module, params = build(lambda rngs: ProjectionHead(tiny.discriminator, c, d, dtype=jnp.float32, rngs=rngs))
    params["unconditional"]["bias"] = jnp.asarray([0.3])
    x, t = normal(0, N, S, 2, 2, c), normal(1, N, 3, d)
    got = jax.jit(lambda p, x, t: module.bind(p)(x, t))(params, x, t)
    weight, embed = np.asarray(params["unconditional"]["weight"])[0, 0, :, 0], np.asarray(params["embed"]["weight"])
    plain = (x @ weight / math.sqrt(c) + 0.3).reshape(N, S, 1, 4)
    class_ = np.einsum("nshwc,nmc->nsmhw", x, t @ embed / math.sqrt(d)).reshape(N, S, 3, 4) / math.sqrt(c)
    np.testing.assert_allclose(got, plain + class_, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs a condition"):
        module.bind(params)(x, None)


def test_modulated_head_parity_with_torch_map_by_map(build, small):
    c, d = 6, 5
    config = change(small, head_depth=4, head_width=8)
    module, params = build(lambda rngs: ModulatedHead(config.discriminator, c, d, dtype=jnp.float32, rngs=rngs))
    for i, layer in params["layers"].items():
        layer["bias"] = jnp.asarray(normal(30 + i, *layer["bias"].shape))
    x, t = normal(0, 2, S, 3, 3, c), normal(1, 2, M, d)
    got = np.asarray(jax.jit(lambda p, x, t: module.bind(p)(x, t))(params, x, t))
    assert got.shape == (2, S, M, 9)

    p = jax.tree.map(lambda v: torch.from_numpy(np.array(v)), params)
    assert [layer["filters"].shape[-2:] for layer in p["layers"].values()] == [(6, 8), (8, 8), (8, 8), (8, 1)]
    for n, s, m in np.ndindex(2, S, M):
        image = torch.from_numpy(x[n, s]).permute(2, 0, 1)[None]
        y = image
        for i, layer in p["layers"].items():
            style = torch.from_numpy(t[n, m]) @ layer["style"]["weight"] / math.sqrt(d) + layer["style"]["bias"]
            kernel = layer["filters"][0, 0, 0] / math.sqrt(len(style)) * style[:, None]
            if i < 3:
                kernel = kernel * (kernel.square().sum(0) + 1e-8).rsqrt()
            y = functional.conv2d(y, kernel.T[:, :, None, None], layer["bias"])
            if i < 3:
                y = functional.leaky_relu(y, 0.2) * math.sqrt(2)
        plain = p["unconditional"]["weight"][0, 0].T[:, :, None, None] / math.sqrt(c)
        y = y + functional.conv2d(image, plain, p["unconditional"]["bias"])
        np.testing.assert_allclose(got[n, s, m], y.flatten(), rtol=1e-3, atol=1e-4)
