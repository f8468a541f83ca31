"""What the vision-aided discriminator sees: each policy against NumPy, how it draws, its gradient, and the mesh."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax.config import Config, MeshConfig
from gigagan_jax.parallel import sharding
from gigagan_jax.training.diff_augment import POLICIES, augment, color, cutout, translation

ALL = tuple(POLICIES)
KEY = jax.random.key(7)


def uniform(seed, n, side, low=-1.0):
    return np.random.default_rng(seed).uniform(low, 1.0, (n, side, side, 3)).astype(np.float32)


def shifted(x, down, right):
    """[N, R, R, 3] moved by whole pixels, zeros coming in."""
    side = x.shape[1]
    to = lambda by: slice(max(by, 0), side + min(by, 0))
    out = np.zeros_like(x)
    out[:, to(down), to(right)] = x[:, to(-down), to(-right)]
    return out


def unrelated(*draws):
    """Are draws of many examples without correlation?"""
    return np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.2


# ---------------------------------------------------------------- closed forms


def test_color_is_one_shift_and_two_factors_an_example():
    """Brightness moves the mean and nothing else does; contrast scales what is around it, saturation what is around grey."""
    x = uniform(0, 512, 8)
    y = np.asarray(jax.jit(color)(KEY, x))

    def parts(v):
        v = v.astype(np.float64)
        grey = v.mean(-1, keepdims=True)
        mean = grey.mean((1, 2), keepdims=True)
        return mean, grey - mean, v - grey

    factor = lambda a, b: (a * b).sum((1, 2, 3), keepdims=True) / (a * a).sum((1, 2, 3), keepdims=True)
    (mean, light, hue), (new_mean, new_light, new_hue) = parts(x), parts(y)
    brightness, contrast, both = new_mean - mean, factor(light, new_light), factor(hue, new_hue)
    np.testing.assert_allclose(new_light, contrast * light, atol=1e-5)
    np.testing.assert_allclose(new_hue, both * hue, atol=1e-5)
    drawn = {
        "brightness": (brightness, -0.5, 0.5),
        "saturation": (both / contrast, 0, 2),
        "contrast": (contrast, 0.5, 1.5),
    }
    for name, (values, low, high) in drawn.items():
        least, most, width = values.min(), values.max(), high - low
        assert low - 1e-5 <= least < low + 0.05 * width, name
        assert high - 0.05 * width < most <= high + 1e-5, name
        assert abs(values.mean() - (low + high) / 2) < 0.05 * width, name
    assert unrelated(*(values.ravel() for values, _, _ in drawn.values()))


def test_color_keeps_grey_images_grey():
    x = np.repeat(uniform(1, 16, 8)[..., :1], 3, axis=-1)
    y = np.asarray(jax.jit(color)(KEY, x))
    np.testing.assert_allclose(y, np.repeat(y[..., :1], 3, axis=-1), atol=1e-6)
    assert np.abs(y - x).max() > 0.1


@pytest.mark.parametrize("side", [8, 16, 32])
def test_translation_is_a_shift_within_an_eighth(side):
    x, most = uniform(2, 512, side), side // 8
    y = np.asarray(jax.jit(translation)(KEY, x))
    steps = range(-most, most + 1)
    found = {(i, j): np.flatnonzero((shifted(x, i, j) == y).all((1, 2, 3))) for i in steps for j in steps}
    # Every example is its image under exactly one of these shifts.
    np.testing.assert_array_equal(np.sort(np.concatenate(list(found.values()))), np.arange(len(x)))
    shift = np.zeros((len(x), 2), int)
    for by, examples in found.items():
        shift[examples] = by
    for axis in shift.T:
        counts = np.bincount(axis + most)
        assert len(counts) == 2 * most + 1
        assert counts.min() > 0.5 * len(x) / len(counts)
    assert unrelated(*shift.T)


@pytest.mark.parametrize("side", [8, 16])
def test_cutout_zeroes_a_square_of_half_the_side(side):
    x, size = uniform(3, 512, side, low=0.1), side // 2
    y = np.asarray(jax.jit(cutout)(KEY, x))
    gone = (y == 0).all(-1)
    np.testing.assert_array_equal(y, np.where(gone[..., None], 0, x))  # the rest is untouched
    lines = [gone.any(2), gone.any(1)]
    np.testing.assert_array_equal(gone, lines[0][:, :, None] & lines[1][:, None, :])  # rows times columns
    firsts = []
    for cut in lines:
        first, last = cut.argmax(1), side - 1 - cut[:, ::-1].argmax(1)
        length = last - first + 1
        np.testing.assert_array_equal(cut.sum(1), length)  # without gaps
        clipped = (first == 0) | (last == side - 1)
        assert (length[~clipped] == size).all()
        assert (length >= size // 2).all()
        assert (length <= size).all()
        # Where it would begin without the border: the centre may be anywhere in the image.
        firsts.append(np.where(first > 0, first, last + 1 - size))
        assert set(firsts[-1]) == set(range(-(size // 2), side - size // 2 + 1))
    assert unrelated(*firsts)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("name", ALL)
def test_draws_differ_between_examples_and_keys(name):
    x = np.repeat(uniform(4, 1, 32), 64, axis=0)
    run = jax.jit(POLICIES[name])
    y = np.asarray(run(KEY, x))
    assert len(np.unique(y.reshape(64, -1), axis=0)) > 30
    np.testing.assert_array_equal(run(KEY, x), y)
    other = np.asarray(run(jax.random.key(8), x))
    assert (y != other).any((1, 2, 3)).mean() > 0.9


def test_policies_are_applied_in_order_each_with_a_draw_of_its_own():
    x = uniform(5, 8, 16)
    once, again = jax.random.fold_in(KEY, 0), jax.random.fold_in(KEY, 1)
    shift, cut, both = jax.jit(color), jax.jit(cutout), jax.jit(augment, static_argnums=2)
    np.testing.assert_allclose(both(KEY, x, ("color", "cutout")), cut(again, shift(once, x)), atol=1e-6)
    np.testing.assert_allclose(both(KEY, x, ("cutout", "color")), shift(again, cut(once, x)), atol=1e-6)
    twice = np.asarray(both(KEY, x, ("cutout", "cutout")))
    np.testing.assert_array_equal(twice, cut(again, cut(once, x)))
    assert (twice == 0).sum() > (np.asarray(cut(once, x)) == 0).sum()
    np.testing.assert_array_equal(augment(KEY, x, ()), x)


def test_the_default_policies_are_all_there_are():
    assert set(Config().vision_aided.augment) == set(POLICIES)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("policies", [*((name,) for name in ALL), ALL], ids="+".join)
def test_gradient_by_finite_differences(policies):
    """All policies are affine in the images: a difference of any size is the derivative, but for rounding."""
    x, weight = uniform(6, 6, 16), uniform(7, 6, 16)
    run = jax.jit(lambda x: augment(KEY, x, policies))
    y, back = jax.vjp(run, x)
    (grad,) = back(weight)
    assert np.abs(grad).max() > 0.1
    y, grad, rng = np.asarray(y, np.float64), np.asarray(grad, np.float64), np.random.default_rng(8)
    pixels = [np.zeros_like(x) for _ in range(8)]
    for pixel in pixels:
        pixel[tuple(rng.integers(0, size) for size in x.shape)] = 2.0
    for step in (*pixels, uniform(9, 6, 16), uniform(10, 6, 16)):
        moved = np.asarray(run(x + step), np.float64) - y
        difference, scale = (moved * weight).sum(), np.linalg.norm(moved) * np.linalg.norm(weight)
        assert difference == pytest.approx((grad * step).sum(), abs=1e-5 * scale + 1e-5)


def test_gradient_of_the_sum_counts_visible_pixels():
    policies, x = ("translation", "cutout"), uniform(11, 32, 16)
    total = jax.jit(lambda x: augment(KEY, x, policies).sum((1, 2, 3)))
    grad = np.asarray(jax.jit(jax.grad(lambda x: total(x).sum()))(x))
    assert set(np.unique(grad)) == {0.0, 1.0}
    np.testing.assert_array_equal(grad, np.repeat(grad[..., :1], 3, axis=-1))
    # As many as come through from a white image, and no fewer than translation and cutout leave at the least.
    visible = np.asarray(total(np.ones_like(x)))
    np.testing.assert_array_equal(grad.sum((1, 2, 3)), visible)
    share = visible / x[0].size
    assert share.min() >= (7 / 8) ** 2 - 1 / 4
    assert share.max() < 1


# ---------------------------------------------------------------- devices


@pytest.fixture(scope="module")
def on_one():
    return on_mesh((1, 1, 1))[0]


def on_mesh(shape):
    """(images, gradients) of all policies on a mesh with the batch sharded; and the compiled program."""
    mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    rows = NamedSharding(mesh, PartitionSpec(("fsdp", "data")))

    def run(key, x, weight):
        y, back = jax.vjp(lambda x: augment(key, x, ALL), x)
        return y, back(weight)[0]

    everywhere = NamedSharding(mesh, PartitionSpec())
    run = jax.jit(run, in_shardings=(everywhere, rows, rows), out_shardings=rows)
    arguments = (KEY, uniform(12, 16, 16), uniform(13, 16, 16))
    return jax.device_get(run(*arguments)), run.lower(*arguments).compile().as_text()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_an_example_does_not_depend_on_the_mesh(on_one, shape):
    found, program = on_mesh(shape)
    for one, eight in zip(on_one, found, strict=True):
        assert np.abs(one - eight).max() <= 1e-6 * np.abs(one).max()
    # No example, and no draw, leaves its device.
    assert re.findall(r"all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter", program) == []
