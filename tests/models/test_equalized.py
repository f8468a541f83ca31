"""Equalized layers: the formulas, their variance at the start, and ScannedLayers as the loop that it replaces."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from gigagan_jax.models.layers.equalized import (
    Conv,
    Linear,
    RmsNorm,
    ScannedLayers,
    call_with_remat,
    leaky_relu,
    normalize,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
def test_linear_formula(build, lr_mul):
    module, params = build(lambda rngs: Linear(48, 64, axes=(None, None), bias=0.5, lr_mul=lr_mul, rngs=rngs))
    x = normal(0, 3, 5, 48)
    params["bias"] = params["bias"] + normal(1, 64)
    weight, bias = (np.asarray(params[k], np.float64) for k in ("weight", "bias"))
    want = x.astype(np.float64) @ weight * lr_mul / math.sqrt(48) + bias * lr_mul
    np.testing.assert_allclose(module.bind(params)(x), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
def test_linear_starts_with_unit_variance_and_the_asked_bias(build, lr_mul):
    make = lambda bias: lambda rngs: Linear(400, 300, axes=(None, None), bias=bias, lr_mul=lr_mul, rngs=rngs)
    module, params = build(make(3.0))
    y = np.asarray(module.bind(params)(normal(0, 200, 400)))
    assert y.std() == pytest.approx(1.0, abs=0.03)
    assert y.mean() == pytest.approx(3.0, abs=0.03)
    assert np.std(params["weight"]) == pytest.approx(1 / lr_mul, rel=0.02)
    without, no_bias = build(make(None))
    assert set(no_bias) == {"weight"}
    np.testing.assert_array_equal(without.bind(no_bias)(np.zeros((1, 400), np.float32)), 0)


def test_an_eager_layer_is_drawn_as_it_declares():
    layer = Linear(200, 200, axes=("style", None), bias=1.0, lr_mul=0.5, rngs=nnx.Rngs(0))
    meta = layer.weight.get_metadata()
    assert (meta["init_mean"], meta["init_std"], meta["logical_axes"]) == (0.0, 2.0, ("style", None))
    assert float(layer.weight[...].std()) == pytest.approx(2.0, rel=0.02)
    assert layer.bias is not None
    np.testing.assert_array_equal(layer.bias[...], 2.0)


FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 64


def torch_conv(x, weight, bias, kernel, down):
    """StyleGAN2's convolution: pad, filter by [1, 3, 3, 1], then stride two; NCHW."""
    if down:
        c = x.shape[1]
        taps = torch.from_numpy(FILTER).expand(c, 1, 4, 4)
        pad = 2 if kernel == 3 else 1
        blurred = torch.nn.functional.conv2d(x, taps, padding=pad, groups=c)
        return torch.nn.functional.conv2d(blurred, weight, bias, stride=2)
    return torch.nn.functional.conv2d(x, weight, bias, padding=kernel // 2)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_parity_with_torch(build, kernel, down, bias):
    module, params = build(lambda rngs: Conv(5, 7, kernel=kernel, down=down, bias=bias, rngs=rngs))
    assert ("bias" in params) == bias
    if bias:
        params["bias"] = params["bias"] + normal(1, 7)
    x = normal(0, 2, 8, 6, 5)
    got = jax.jit(lambda p, x: module.bind(p)(x))(params, x)
    weight = torch.from_numpy(np.array(params["weight"])).permute(3, 2, 0, 1) / math.sqrt(kernel**2 * 5)
    want = torch_conv(nchw(x), weight, torch.from_numpy(np.array(params["bias"])) if bias else None, kernel, down)
    np.testing.assert_allclose(nchw(got), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", [1, 3])
def test_conv_starts_with_unit_variance(build, kernel):
    module, params = build(lambda rngs: Conv(64, 96, kernel=kernel, rngs=rngs))
    y = np.asarray(jax.jit(lambda p, x: module.bind(p)(x))(params, normal(0, 4, 12, 12, 64)))
    assert y[:, 1:-1, 1:-1].std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: Linear(6, 5, axes=(None, None), dtype=jnp.bfloat16, rngs=rngs),
        lambda rngs: Conv(6, 5, kernel=3, down=True, dtype=jnp.bfloat16, rngs=rngs),
        lambda rngs: RmsNorm(6, dtype=jnp.bfloat16, rngs=rngs),
    ],
)
def test_bfloat16_computes_so_and_keeps_float32_parameters(build, make):
    module, params = build(make)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    out = jax.eval_shape(lambda p: module.bind(p)(jnp.zeros((1, 4, 4, 6), jnp.float32)), params)
    assert out.dtype == jnp.bfloat16


def test_rms_norm_formula_and_zero(build):
    module, params = build(lambda rngs: RmsNorm(9, rngs=rngs))
    np.testing.assert_array_equal(params["gain"], 1.0)
    params = {"gain": jnp.asarray(normal(1, 9))}
    x = normal(0, 4, 9) * 7
    want = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * np.asarray(params["gain"])

    @jax.jit
    def f(x):
        return jax.vjp(module.bind(params), x)[0], jax.grad(lambda x: module.bind(params)(x).sum())(0 * x)

    value, grad_at_zero = f(x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert np.isfinite(grad_at_zero).all()


def test_normalize_gives_unit_second_moment_along_an_axis():
    x = normal(0, 5, 300) * 40
    np.testing.assert_allclose((np.asarray(normalize(x)) ** 2).mean(-1), 1, rtol=1e-5)
    np.testing.assert_allclose((np.asarray(normalize(x, axis=0)) ** 2).mean(0), 1, rtol=1e-5)


def test_leaky_relu_values_and_second_moment():
    np.testing.assert_allclose(
        leaky_relu(jnp.array([-2.0, 0.0, 3.0])), np.array([-0.4, 0, 3]) * math.sqrt(2), rtol=1e-6
    )
    # sqrt(2)^2 * (1 + 0.2^2) / 2
    assert float(jnp.mean(leaky_relu(jnp.asarray(normal(0, 400_000))) ** 2)) == pytest.approx(1.04, abs=0.01)


class Block(nnx.Module):
    """Small enough to compile fast, with two inputs and parameters of three shapes."""

    def __init__(self, *, rngs):
        self.norm = RmsNorm(6, rngs=rngs)
        self.linear = Linear(6, 6, axes=("embed", "mlp"), rngs=rngs)

    def __call__(self, x, shift):
        return x + leaky_relu(self.linear(self.norm(x))) * shift


@pytest.mark.parametrize("remat", [False, True])
def test_stack_is_the_loop_over_its_slices_with_the_same_gradients(build, remat):
    one, _ = build(lambda rngs: Block(rngs=rngs))
    stack, params = build(lambda rngs: ScannedLayers(lambda: Block(rngs=rngs), 3, remat=remat, rngs=rngs))
    x, shift = normal(0, 4, 6), normal(1, 6)

    def looped(p, x, shift):
        for i in range(3):
            x = one.bind(jax.tree.map(lambda v, i=i: v[i], p["layer"]))(x, shift)
        return x

    stacked = lambda p, x, shift: stack.bind(p)(x, shift)
    loss = lambda f: jax.jit(jax.value_and_grad(lambda *a: jnp.sin(f(*a)).sum(), argnums=(0, 1, 2)))
    got, want = (loss(f)(params, x, shift) for f in (stacked, looped))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    weights = np.asarray(params["layer"]["linear"]["weight"])
    assert weights.shape == (3, 6, 6)
    assert len({w.tobytes() for w in weights}) == 3, "every layer is drawn by itself"


def test_stack_declares_its_parameters_as_the_layer_does_with_layers_in_front(build):
    one, _ = build(lambda rngs: Block(rngs=rngs))
    stack, _ = build(lambda rngs: ScannedLayers(lambda: Block(rngs=rngs), 2, rngs=rngs))
    a, b = one.specs["linear"]["weight"], stack.specs["layer"]["linear"]["weight"]
    assert (b.shape, b.axes) == ((2, *a.shape), ("layers", *a.axes))
    assert (b.mean, b.std) == (a.mean, a.std)
    assert stack.specs["layer"]["norm"]["gain"].mean == 1.0


def test_run_with_remat_recomputes_and_gives_the_same_gradient(build):
    module, params = build(lambda rngs: Block(rngs=rngs))
    x, shift = normal(0, 4, 6), normal(1, 6)

    def grad(remat):
        return jax.grad(lambda p, x: jnp.sin(call_with_remat(module.bind(p), remat, x, shift)).sum(), argnums=(0, 1))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.jit(grad(True))(params, x),
        jax.jit(grad(False))(params, x),
    )
    assert "remat" in str(jax.make_jaxpr(grad(True))(params, x))
    assert "remat" not in str(jax.make_jaxpr(grad(False))(params, x))
