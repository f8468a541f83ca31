"""Sample-adaptive convolution: a filter bank mixed per sample, modulated and demodulated (sec. 3.1, eq. 1 and 2).

With K = sum_n a_n K_n, style s over input channels and demodulation d over output channels,

    y = d * conv(s * x, K),    d_o = (sum_{k,i} (s_i K_{k,i,o})^2 + eps)^(-1/2).

d is a quadratic form in `a` over the Gram matrices of the bank, so no per-sample kernel is needed for it, and with a bank
of one none is needed at all. Otherwise the same product is computed in one of four forms; which is fastest depends on the
device, the resolution, the bank and the samples a device:

    bank    one convolution of N stacked copies of the input, weighted by `a`: N times the multiplications, all dense
    shift   per-sample kernels, k^2 shifted batched matrix products
    im2col  per-sample kernels, one batched matrix product over unfolded patches
    vmap    per-sample kernels, a convolution mapped over the batch (a grouped convolution)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.models.layers.equalized import (
    Linear,
    choose_precision,
    conv,
    declare_parameter,
    leaky_relu,
    materialize,
)
from gigagan_jax.models.layers.resample import upsample
from gigagan_jax.parallel.sharding import gather_parameter


def demodulation(
    bank: jax.Array,
    style: jax.Array,
    mix: jax.Array,
    eps: float = 1e-8,
    axes: tuple[str | None, ...] = ("bank", "kernel", "kernel", None, None),
) -> jax.Array:
    """1 / norm of each output filter after mixing and modulation, in float32.

    Args:
      bank: [bank, kh, kw, in, out]
      style: [N, in]
      mix: [N, bank] mixture weights
      axes: logical names of the bank's dimensions

    Returns:
      [N, out]
    """
    # Float32: the norm is a sum over k^2 x in products, and its inverse scales the whole output.
    bank, style, mix = (v.astype(jnp.float32) for v in (bank, style, mix))
    n, c_out = bank.shape[0], bank.shape[-1]
    squares = jnp.square(style)
    energy = jnp.zeros((style.shape[0], c_out), jnp.float32)
    # Pairs of filters by their distance in the bank. The Gram matrices are elementwise products summed over the kernel: as
    # one einsum over all pairs the compiler makes them matrix products of size N x N (on a v5p, estimated, 100 times slower).
    for d in range(n // 2 + 1):
        gram = gather_parameter(jnp.sum(bank * jnp.roll(bank, -d, axis=0), axis=(1, 2)), (axes[0], *axes[3:]))
        times = 1.0 if d == 0 or 2 * d == n else 2.0  # a pair met in one order only counts for both
        pair = times * mix * jnp.roll(mix, -d, axis=1)
        # The energy is sum_nm a_n a_m sum_i s_i^2 G_nm[i, o]: linear in the squared style for each pair.
        weights = pair[:, :, None] * squares[:, None, :]
        energy += jnp.einsum("bni,nio->bo", weights, gram, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.rsqrt(energy + eps)


def mixed_conv(x: jax.Array, bank: jax.Array, mix: jax.Array, form: str = "auto") -> jax.Array:
    """Convolution of each sample with its own mixture of the bank.

    Args:
      x: [N, H, W, in]
      bank: [bank, kh, kw, in, out], odd and equal kh and kw
      mix: [N, bank], or [1, bank] for all samples
      form: see the module's text; "auto" chooses by bank and kernel

    Returns:
      [N, H, W, out]
    """
    if form not in ("auto", "bank", "shift", "im2col", "vmap"):
        raise ValueError(f"unknown form {form!r}")
    count, k, _, c_in, c_out = bank.shape
    mix = mix.astype(x.dtype)
    if form == "auto":
        # By measurements on a CPU (docs/performance.md, "Adaptive convolution").
        form = "bank" if count <= 2 else "shift"
    if count == 1:
        # A bank of one has no choice to make: no per-sample kernel is needed.
        return conv(x, bank[0]) * mix[:, :, None, None]
    if mix.shape[0] == 1:
        # One sample, or one mixture for all: the kernel is mixed, and a convolution is left.
        kernel = jnp.einsum("n,nhwio->hwio", mix[0], bank, precision=choose_precision(x.dtype))
        return conv(x, kernel)
    n, h, w, _ = x.shape
    if form == "bank":
        # Copies of the input, each weighted for its filter, make one dense convolution of N times the channels.
        stacked = (x[:, :, :, None, :] * mix[:, None, None, :, None]).reshape(n, h, w, count * c_in)
        return conv(stacked, bank.transpose(1, 2, 0, 3, 4).reshape(k, k, count * c_in, c_out))
    # One kernel a sample: what the next three forms apply.
    exact = choose_precision(x.dtype)
    kernels = jnp.einsum("bn,nhwio->bhwio", mix, bank, precision=exact)
    if k == 1:
        return jnp.einsum("bhwi,bio->bhwo", x, kernels[:, 0, 0], precision=exact)
    if form == "vmap":
        return jax.vmap(lambda xi, ki: conv(xi[None], ki)[0])(x, kernels)
    pad = (k - 1) // 2
    # 'Same' padding by hand: the shifts below slice it.
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    patches = [padded[:, i : i + h, j : j + w] for i in range(k) for j in range(k)]
    if form == "im2col":
        unfolded = jnp.concatenate(patches, -1).reshape(n, h * w, k * k * c_in)
        kernels = kernels.reshape(n, k * k * c_in, c_out)
        return jnp.matmul(unfolded, kernels, precision=exact).reshape(n, h, w, c_out)
    kernels = kernels.reshape(n, k * k, c_in, c_out)
    # "shift": k^2 batched products that accumulate: no copy of the input k^2 times as large is made.
    product = lambda p, kernel: jnp.matmul(p.reshape(n, h * w, c_in), kernel, precision=exact)
    out = sum(product(p, kernels[:, i]) for i, p in enumerate(patches))
    return jnp.asarray(out).reshape(n, h, w, c_out)


class AdaptiveConv(nnx.Module):
    """g_adaconv (eq. 2): k x k, filter bank chosen by a softmax of an affine of w, modulated by another.

    Args:
      in_channels, out_channels: channels before and after.
      w_dim: size of w.
      kernel: side of the filters.
      bank: filters to mix, N.
      up: double the resolution first, with [1, 3, 3, 1].
      demodulate: False for ToRGB.
      activation: leaky ReLU after the bias.
      form: how per-sample kernels are computed.
      gain: factor on the filters; demodulation takes it out again.
      out_axis: logical name of the output channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        w_dim: int,
        kernel: int = 3,
        bank: int = 1,
        up: bool = False,
        demodulate: bool = True,
        activation: bool = True,
        form: str = "auto",
        gain: float = 1.0,
        out_axis: str = "conv_out",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.up, self.demodulate, self.activation, self.form, self.dtype = up, demodulate, activation, form, dtype
        self.scale = gain / math.sqrt(kernel * kernel * in_channels)
        axes = ("bank", "kernel", "kernel", "conv_in", out_axis)
        self.filters = declare_parameter(rngs, (bank, kernel, kernel, in_channels, out_channels), axes, std=1.0)
        # Added after demodulation, so that its size does not depend on the style.
        self.bias = declare_parameter(rngs, (out_channels,), (out_axis,))
        # A style starts around one: the first images depend on the filters, not on w.
        self.style = Linear(w_dim, in_channels, axes=("style", None), bias=1.0, rngs=rngs)
        # No bias towards any filter: the softmax starts near even.
        self.select = Linear(w_dim, bank, axes=("style", None), rngs=rngs) if bank > 1 else None

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """x [N, H, W, in], w [N, w_dim] or [1, w_dim] for all -> [N, H, W, out], twice the sides when `up`"""
        style = self.style(w.astype(jnp.float32))
        if self.select is None:
            mix = jnp.ones((w.shape[0], 1), jnp.float32)
        else:
            mix = jax.nn.softmax(self.select(w.astype(jnp.float32)), axis=-1)
        axes = self.filters.get_metadata()["logical_axes"][-5:]
        # In float32: demodulation needs the exact filters, the convolution a cast and gathered copy.
        filters = self.filters[...] * self.scale
        # Scaling the input instead of the kernel: the same product, and no kernel a sample.
        x = x.astype(self.dtype) * style[:, None, None, :].astype(self.dtype)
        if self.up:
            x = upsample(x)
        y = mixed_conv(x, gather_parameter(filters.astype(self.dtype), axes), mix, self.form)
        if self.demodulate:
            # On the output, for the same reason.
            y *= demodulation(filters, style, mix, axes=axes)[:, None, None, :].astype(self.dtype)
        y += materialize(self.bias, self.dtype)
        return leaky_relu(y) if self.activation else y


def modulated_head(
    channels: int, width: int, depth: int, *, w_dim: int, kernel: int, dtype: Any, rngs: nnx.Rngs
) -> nnx.List:
    """`depth` modulated convolutions to one logit: channels -> width -> ... -> 1.

    The last is neither demodulated nor activated, and computes in float32 whatever `dtype`.
    """
    widths = [channels, *(width,) * (depth - 1), 1]
    layers = []
    for i in range(depth):
        last = i == depth - 1
        kind: dict[str, Any] = {"dtype": dtype}
        if last:
            # Float32: bfloat16 rounds a logit near 1 to steps of 1/128, and losses act on differences of logits.
            kind = {"dtype": jnp.float32, "demodulate": False, "activation": False, "out_axis": "rgb"}
        layers.append(AdaptiveConv(*widths[i : i + 2], w_dim=w_dim, kernel=kernel, rngs=rngs, **kind))
    return nnx.List(layers)
