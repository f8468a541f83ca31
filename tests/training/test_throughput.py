"""Counting operations from the trace, against formulas."""

import jax
import jax.numpy as jnp
import pytest

from gigagan_jax.training.throughput import count_flops

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)


def test_product_and_its_gradients():
    assert count_flops(lambda x, w: x @ w, X, W) == 2 * 8 * 16 * 16
    both = jax.grad(lambda x, w: jnp.sum(jnp.square(x @ w)), argnums=(0, 1))
    assert count_flops(both, X, W) == 3 * 2 * 8 * 16 * 16


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_counts_as_its_loop(remat):
    body = lambda h, w: (jnp.tanh(h @ w), None)
    body = jax.checkpoint(body) if remat else body
    stack = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)

    def loop(x, w):
        for i in range(5):
            x = body(x, w[i])[0]
        return x

    scan = lambda x, w: jax.lax.scan(body, x, w)[0]
    assert count_flops(scan, X, stack) == count_flops(loop, X, stack) == 5 * 2 * 8 * 16 * 16
    grad = lambda f: jax.grad(lambda w, x: jnp.sum(f(x, w)))
    assert count_flops(grad(scan), stack, X) >= count_flops(grad(loop), stack, X) - 2 * 8 * 16 * 16


def test_convolution():
    x, w = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count_flops(conv, x, w) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
