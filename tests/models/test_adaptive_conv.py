"""The adaptive convolution in all its forms against StyleGAN2's definition in torch, with grouped convolutions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from gigagan_jax.models.layers.adaptive_conv import AdaptiveConv, demodulation, mixed_conv
from gigagan_jax.models.layers.equalized import conv

FORMS = ("bank", "shift", "im2col", "vmap", "auto")
N, SIDE, C_IN, C_OUT, W = 3, 5, 4, 6, 8


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def torch_reference(p, x, w, *, up, demodulate, activation):
    """Eq. 1 and 2 per sample: mix the bank by softmax, modulate, demodulate, convolve in groups. x [N, H, W, C]."""
    affine = lambda a: w @ a["weight"] / math.sqrt(w.shape[1]) + a["bias"]
    _, k, _, c_in, c_out = p["filters"].shape
    bank = p["filters"] / math.sqrt(k * k * c_in)
    mix = torch.softmax(affine(p["select"]), -1) if "select" in p else torch.ones(len(x), 1, dtype=x.dtype)
    kernels = torch.einsum("bn,nhwio->boihw", mix, bank) * affine(p["style"])[:, None, :, None, None]
    if demodulate:
        kernels = kernels * (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    x = x.permute(0, 3, 1, 2)
    if up:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
        taps = (taps[:, None] * taps[None, :] / 16).expand(c_in, 1, 4, 4)
        x = functional.conv_transpose2d(x, taps, stride=2, padding=1, groups=c_in)
    n, _, h, wide = x.shape
    y = functional.conv2d(x.reshape(1, n * c_in, h, wide), kernels.flatten(0, 1), padding=k // 2, groups=n)
    y = y.reshape(n, c_out, h, wide).permute(0, 2, 3, 1) + p["bias"]
    return functional.leaky_relu(y, 0.2) * math.sqrt(2) if activation else y


@pytest.mark.parametrize(
    "form, bank, options",
    [(form, bank, {}) for form in FORMS[:-1] for bank in (2, 4)]
    + [("auto", 1, {})]
    + [("auto", bank, {"up": True}) for bank in (1, 2, 4)]
    + [("auto", bank, {"kernel": 1, "demodulate": False, "activation": False}) for bank in (1, 4)],
)
def test_parity_with_torch_values_and_gradients(build, form, bank, options):
    make = lambda rngs: AdaptiveConv(C_IN, C_OUT, w_dim=W, bank=bank, form=form, rngs=rngs, **options)
    module, params = build(make)
    params["bias"] = jnp.asarray(normal(5, C_OUT))
    x, w = normal(0, N, SIDE, SIDE, C_IN), normal(1, N, W)
    sides = SIDE * (2 if options.get("up") else 1)
    weigh = normal(2, N, sides, sides, C_OUT)

    def loss(p, x, w):
        y = module.bind(p)(x, w)
        return (y * weigh).sum(), y

    (_, got), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x, w)

    leaf = lambda v: torch.from_numpy(np.array(v, np.float64)).requires_grad_()
    inputs = jax.tree.map(leaf, (params, x, w))
    settings = {"up": False, "demodulate": True, "activation": True}
    want = torch_reference(*inputs, **settings | {k: v for k, v in options.items() if k != "kernel"})
    (want * torch.from_numpy(weigh)).sum().backward()

    np.testing.assert_allclose(got, want.detach(), rtol=1e-4, atol=1e-5)
    check = lambda a, b: np.testing.assert_allclose(a, b.grad, rtol=1e-3, atol=1e-4)
    jax.tree.map(check, grads, inputs)


def test_demodulation_equals_the_norm_of_the_mixed_and_modulated_filters():
    bank, style = normal(0, 4, 3, 3, 5, 7), normal(1, 2, 5)
    mix = np.asarray(jax.nn.softmax(normal(2, 2, 4)))
    kernels = np.einsum("bn,nhwio->bhwio", mix, bank) * style[:, None, None, :, None]
    want = 1 / np.sqrt((kernels**2).sum((1, 2, 3)) + 1e-8)
    f = jax.jit(demodulation)
    np.testing.assert_allclose(f(bank, style, mix), want, rtol=1e-4)
    half = f(*(jnp.asarray(v, jnp.bfloat16) for v in (bank, style, mix)))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, want, rtol=0.03)


@pytest.mark.parametrize("count, chosen", [(1, (0, 0, 0)), (2, (1, 0, 1)), (3, (2, 0, 1))])
def test_a_one_hot_mixture_is_the_plain_convolution_with_that_filter_in_every_form(count, chosen):
    x, bank = normal(0, 3, SIDE, SIDE, C_IN), normal(1, count, 3, 3, C_IN, C_OUT)

    @jax.jit
    def both(x):
        mix = jax.nn.one_hot(np.array(chosen), count)
        plain = jnp.concatenate([conv(x[i : i + 1], bank[n]) for i, n in enumerate(chosen)])
        return {form: mixed_conv(x, bank, mix, form) for form in FORMS}, plain

    got, want = both(x)
    for form in FORMS:
        np.testing.assert_allclose(got[form], want, rtol=1e-4, atol=1e-4, err_msg=form)


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="'fft'"):
        mixed_conv(jnp.zeros((1, 4, 4, 2)), jnp.zeros((2, 3, 3, 2, 2)), jnp.ones((1, 2)), "fft")


@pytest.mark.parametrize("bank", [1, 4])
def test_output_has_unit_variance_whatever_the_style_and_the_filters_weigh(build, bank):
    module, params = build(lambda rngs: AdaptiveConv(48, 64, w_dim=32, bank=bank, activation=False, rngs=rngs))
    f = jax.jit(lambda p, x, w: module.bind(p)(x, w))
    x, w = normal(0, 4, 12, 12, 48), normal(1, 4, 32)
    y = np.asarray(f(params, x, w))
    # A filter sums 432 independent inputs with weights of unit norm; 100 places and 64 filters an image.
    np.testing.assert_allclose(y[:, 1:-1, 1:-1].std((1, 2, 3)), 1, atol=0.06)
    heavier = params | {"filters": params["filters"] * 3, "style": jax.tree.map(lambda v: v * 5, params["style"])}
    np.testing.assert_allclose(f(heavier, x, w), y, rtol=1e-3, atol=1e-3)


def test_style_starts_around_one_and_the_bank_near_even(build):
    module, params = build(lambda rngs: AdaptiveConv(4, 4, w_dim=16, bank=8, rngs=rngs))
    np.testing.assert_array_equal(params["style"]["bias"], 1.0)
    np.testing.assert_array_equal(params["select"]["bias"], 0.0)
    x = normal(0, 1, SIDE, SIDE, 4)
    zero_w = np.zeros((1, 16), np.float32)
    mean = np.asarray(params["filters"]).mean(0)
    want = conv(x, mean) / np.sqrt((mean**2).sum((0, 1, 2)))
    want = np.maximum(want, 0.2 * want) * math.sqrt(2)
    np.testing.assert_allclose(jax.jit(lambda p: module.bind(p)(x, zero_w))(params), want, rtol=1e-4, atol=1e-5)


def test_one_mixture_serves_all_samples():
    """One w for all tiles of an image: the kernel is mixed once, and the result is that of a mixture a sample."""
    keys = jax.random.split(jax.random.key(5), 3)
    conv = AdaptiveConv(5, 7, w_dim=6, bank=3, rngs=nnx.Rngs(0))
    x, w = jax.random.normal(keys[0], (4, 8, 8, 5)), jax.random.normal(keys[1], (1, 6))
    shared = conv(x, w)
    np.testing.assert_allclose(shared, conv(x, jnp.repeat(w, 4, axis=0)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shared[:1], conv(x[:1], w), rtol=1e-5, atol=1e-5)
