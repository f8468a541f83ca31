"""Resampling by two against the explicit [1, 3, 3, 1] filter of StyleGAN2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from gigagan_jax.models.layers.resample import blur, downsample, image_pyramid, upsample

FILTER = torch.from_numpy(np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 64)


def image(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def through_torch(f, x):
    return f(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def taps(x):
    return FILTER.expand(x.shape[1], 1, 4, 4)


TORCH = {
    upsample: lambda x: functional.conv_transpose2d(x, 4 * taps(x), stride=2, padding=1, groups=x.shape[1]),
    downsample: lambda x: functional.conv2d(x, taps(x), stride=2, padding=1, groups=x.shape[1]),
    blur: lambda x: functional.conv2d(x, taps(x), padding=2, groups=x.shape[1]),
}


@pytest.mark.parametrize("f", TORCH, ids=lambda f: f.__name__)
def test_parity_with_torch(f):
    x = image(2, 6, 4, 3)
    got = jax.jit(f)(x)
    np.testing.assert_allclose(got, through_torch(TORCH[f], x), rtol=1e-5, atol=1e-6)
    inner = jax.jit(f)(x.reshape(2, 1, 6, 4, 3))
    np.testing.assert_array_equal(inner[:, 0], got, err_msg="more leading axes")
    assert jax.eval_shape(f, jnp.zeros(x.shape, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("f, edge", [(upsample, 1), (downsample, 1), (blur, 2)], ids=["up", "down", "blur"])
def test_a_constant_stays_itself_inside_and_fades_at_the_zeros_outside(f, edge):
    y = np.asarray(jax.jit(f)(np.full((1, 8, 8, 2), 3.0, np.float32)))
    np.testing.assert_allclose(y[:, edge:-edge, edge:-edge], 3.0, rtol=1e-6)
    assert y[0, 0, 0, 0] < 3.0


def test_upsample_is_four_times_the_adjoint_of_downsample():
    small, large = image(1, 4, 6, 2), image(1, 8, 12, 2, seed=1)

    @jax.jit
    def f(small, large):
        up, back = jax.vjp(upsample, small)
        return up, downsample(large), back(large)[0]

    up, down, back = map(np.asarray, f(small, jnp.asarray(large)))
    assert np.vdot(up, large) == pytest.approx(4 * np.vdot(small, down), rel=1e-5)
    np.testing.assert_allclose(back, 4 * down, rtol=1e-5, atol=1e-6)


def test_upsample_then_downsample_keeps_a_ramp():
    ramp = np.tile(np.arange(12, dtype=np.float32)[None, :, None, None], (1, 1, 12, 1))
    back = np.asarray(jax.jit(lambda x: downsample(upsample(x)))(ramp))
    np.testing.assert_allclose(back[:, 2:-2, 2:-2], ramp[:, 2:-2, 2:-2], rtol=1e-6)


def test_pyramid_is_area_averaging():
    x = image(2, 16, 16, 3)
    levels = jax.jit(lambda x: image_pyramid(x, 3))(x)
    np.testing.assert_array_equal(levels[0], x)
    for i, level in enumerate(levels):
        want = through_torch(lambda x, i=i: functional.avg_pool2d(x, 2**i), x)
        np.testing.assert_allclose(level, want, rtol=1e-5, atol=1e-6)
    assert len(image_pyramid(x, 1)) == 1
