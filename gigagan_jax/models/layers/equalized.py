"""Layers with an equalized learning rate: weights drawn from N(0, 1), scaled at run time.

StyleGAN's scheme, which the paper calls crucial in attention layers too (sec. 3.1). Every parameter carries one logical
axis name per dimension (see parallel/sharding.py) and the way it is drawn, so that a training run can fill it shard by shard.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.models.layers.resample import blur, downsample
from gigagan_jax.models.layers.scan import scan
from gigagan_jax.parallel.sharding import gather

SQRT2 = math.sqrt(2.0)
LAYOUT = ("NHWC", "HWIO", "NHWC")


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], *, std: float = 0.0, mean: float = 0.0
) -> nnx.Param:
    """float32 parameter drawn from N(mean, std^2); `axes` names its dimensions."""
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axis names for shape {tuple(shape)}")
    value = jnp.full(shape, mean, jnp.float32)
    if std:
        value += std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=tuple(axes), init_mean=mean, init_std=std)


def value(variable: Any, dtype: Any, scale: float = 1.0) -> jax.Array:
    """A parameter times `scale`, in the precision of the computation and then gathered (see sharding.gather)."""
    x = variable[...]
    names = variable.get_metadata()["logical_axes"][-x.ndim :] if x.ndim else ()  # within a Stack without "layers"
    return gather((x if scale == 1.0 else x * scale).astype(dtype), names)


def leaky_relu(x: jax.Array) -> jax.Array:
    """max(x, 0.2 x) * sqrt(2): keeps the second moment of a normal input."""
    # A product with one of two constants: the fewest operations in its first and second derivative.
    return x * jnp.where(x > 0, jnp.asarray(SQRT2, x.dtype), jnp.asarray(0.2 * SQRT2, x.dtype))


def normalize(x: jax.Array, axis: int = -1, eps: float = 1e-8) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) along `axis`, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True) + eps)


class Linear(nnx.Module):
    """y = x W * lr_mul / sqrt(in) + b * lr_mul.

    Args:
      in_features, out_features: sizes of the last axis before and after.
      axes: logical axis names of W.
      bias: value the bias starts at; None for no bias.
      lr_mul: learning-rate multiplier; W is drawn from N(0, 1 / lr_mul^2).
      dtype: of the computation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        bias: float | None = 0.0,
        lr_mul: float = 1.0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.scale, self.lr_mul, self.dtype = lr_mul / math.sqrt(in_features), lr_mul, dtype
        self.weight = param(rngs, (in_features, out_features), axes, std=1.0 / lr_mul)
        self.bias = None if bias is None else param(rngs, (out_features,), (axes[1],), mean=bias / lr_mul)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]"""
        y = x.astype(self.dtype) @ value(self.weight, self.dtype, self.scale)
        if self.bias is not None:
            y += value(self.bias, self.dtype, self.lr_mul)
        return y


class Conv(nnx.Module):
    """k x k convolution, W * 1 / sqrt(k^2 in).

    Args:
      axes: logical names of the input and output channels.
      down: halve the resolution, with the [1, 3, 3, 1] filter in front of a stride of two.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        down: bool = False,
        bias: bool = True,
        axes: tuple[str | None, str | None] = ("conv_in", "conv_out"),
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel, self.down, self.dtype = kernel, down, dtype
        self.scale = 1.0 / math.sqrt(kernel * kernel * in_channels)
        self.weight = param(rngs, (kernel, kernel, in_channels, out_channels), ("kernel", "kernel", *axes), std=1.0)
        self.bias = param(rngs, (out_channels,), (axes[1],)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] -> [N, H, W, out], half the sides when `down`"""
        w = value(self.weight, self.dtype, self.scale)
        x = x.astype(self.dtype)
        if not self.down:
            y = conv(x, w)
        elif self.kernel == 1:
            y = conv(downsample(x), w)
        else:
            y = jax.lax.conv_general_dilated(blur(x), w, (2, 2), "VALID", dimension_numbers=LAYOUT)
        return y if self.bias is None else y + value(self.bias, self.dtype)


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    """[N, H, W, in] * [k, k, in, out], 'same' zero padding; a 1 x 1 kernel is a matrix product."""
    return (
        x @ w[0, 0] if w.shape[0] == 1 else jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT)
    )


class RmsNorm(nnx.Module):
    """x / rms(x) * gain over the last axis, in float32."""

    def __init__(self, features: int, *, axis: str = "channels", dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        self.gain = param(rngs, (features,), (axis,), mean=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        return (normalize(x, eps=1e-6) * value(self.gain, jnp.float32)).astype(self.dtype)


class Stack(nnx.Module):
    """`count` modules of one shape with their parameters stacked on a leading axis "layers" and applied by `scan`.

    On TPUs and GPUs compiled once instead of `count` times; each parameter keeps its own value and gradient.

    Args:
      make: builds one module; called once.
      remat: recompute each module in the backward pass instead of keeping what it computed.
    """

    def __init__(self, make: Callable[[], nnx.Module], count: int, *, remat: bool = False, rngs: nnx.Rngs):
        self.count, self.remat = count, remat
        self.layer = make()

        def stack(variable: Any) -> Any:
            m = variable.get_metadata()
            return param(
                rngs, (count, *variable.shape), ("layers", *m["logical_axes"]), std=m["init_std"], mean=m["init_mean"]
            )

        is_variable = lambda v: isinstance(v, nnx.Variable)
        graph, state = nnx.split(self.layer)
        self.layer = nnx.merge(graph, jax.tree.map(stack, state, is_leaf=is_variable))

    def __call__(self, x: Any, *args: Any) -> Any:
        """x -> layer_count(... layer_1(x, *args) ..., *args)"""
        graph, params = nnx.split(self.layer)
        body = lambda p, h, *a: nnx.merge(graph, p)(h, *a)
        if self.remat:
            body = jax.checkpoint(body)
        return scan(lambda h, p: (body(p, h, *args), None), x, nnx.to_pure_dict(params), self.count)[0]


def run(block: nnx.Module, remat: bool, x: Any, *args: Any) -> Any:
    """block(x, *args), recomputed in the backward pass when `remat`."""
    if not remat:
        return block(x, *args)  # type: ignore[operator]
    graph, params = nnx.split(block)
    return jax.checkpoint(lambda p, h, *a: nnx.merge(graph, p)(h, *a))(nnx.to_pure_dict(params), x, *args)
