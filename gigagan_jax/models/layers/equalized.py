"""Layers with an equalized learning rate: weights drawn from N(0, 1), scaled at run time.

StyleGAN's scheme, which the paper calls crucial in attention layers too (sec. 3.1). Every parameter carries one logical
axis name per dimension (see parallel/sharding.py) and the way it is drawn, so that a training run can fill it shard by shard.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.models.layers.resample import blur, downsample
from gigagan_jax.models.layers.scan import Body, scan
from gigagan_jax.parallel.sharding import gather_parameter

SQRT2 = math.sqrt(2.0)
LAYOUT = ("NHWC", "HWIO", "NHWC")


def declare_parameter(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], *, std: float = 0.0, mean: float = 0.0
) -> nnx.Param:
    """float32 parameter drawn from N(mean, std^2); `axes` names its dimensions."""
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axis names for shape {tuple(shape)}")
    # The value is only drawn where a module is built outside of `Network`, which draws by name instead.
    initial = jnp.full(shape, mean, jnp.float32)
    if std:
        initial += std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(initial, logical_axes=tuple(axes), init_mean=mean, init_std=std, attention=False)


def mark_as_attention(module: nnx.Module) -> None:
    """Marks all parameters of a module as those of an attention layer, which have a weight decay of their own (A2)."""
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            variable.set_metadata("attention", True)


def materialize(variable: Any, dtype: Any, scale: float = 1.0) -> jax.Array:
    """A parameter times `scale`, in the precision of the computation and then gathered (see sharding.gather_parameter)."""
    # Cast before the gather: bfloat16 halves what devices send each other.
    x = variable[...]
    names = (
        variable.get_metadata()["logical_axes"][-x.ndim :] if x.ndim else ()
    )  # within ScannedLayers without "layers"
    return gather_parameter((x if scale == 1.0 else x * scale).astype(dtype), names)


def choose_precision(dtype: Any) -> jax.lax.Precision | None:
    """Precision of a product in `dtype`: HIGHEST in float32, jax's default in any other."""
    # By default a TPU rounds float32 operands to bfloat16 and a GPU to TF32: float32 would be so in name only.
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def leaky_relu(x: jax.Array) -> jax.Array:
    """max(x, 0.2 x) * sqrt(2): keeps the second moment of a normal input."""
    # A product with one of two constants: the fewest operations in its first and second derivative.
    return x * jnp.where(x > 0, jnp.asarray(SQRT2, x.dtype), jnp.asarray(0.2 * SQRT2, x.dtype))


def normalize(x: jax.Array, axis: int = -1, eps: float = 1e-8) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) along `axis`, in float32."""
    # Bfloat16 keeps 8 bits: sums of squares over hundreds of channels would lose their small terms.
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True) + eps)


class Linear(nnx.Module):
    """y = x W * lr_mul / sqrt(in) + b * lr_mul.

    Args:
      in_features, out_features: sizes of the last axis before and after.
      axes: logical axis names of W.
      bias: value the bias starts at; None for no bias.
      lr_mul: learning-rate multiplier; W is drawn from N(0, 1 / lr_mul^2).
      zero_init: W starts at zero instead.
      fan_in: features that share the output with this layer; 0: its own.
      dtype: of the computation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        fan_in: int = 0,
        bias: float | None = 0.0,
        lr_mul: float = 1.0,
        zero_init: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        # lr_mul divides the drawn values and multiplies the used ones: the output is the same, an update is lr_mul
        # times smaller.
        self.scale, self.lr_mul, self.dtype = lr_mul / math.sqrt(fan_in or in_features), lr_mul, dtype
        std = 0.0 if zero_init else 1.0 / lr_mul
        self.weight = declare_parameter(rngs, (in_features, out_features), axes, std=std)
        self.bias = None if bias is None else declare_parameter(rngs, (out_features,), (axes[1],), mean=bias / lr_mul)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]"""
        w = materialize(self.weight, self.dtype, self.scale)
        y = jnp.matmul(x.astype(self.dtype), w, precision=choose_precision(self.dtype))
        if self.bias is not None:
            y += materialize(self.bias, self.dtype, self.lr_mul)
        return y


class Conv(nnx.Module):
    """k x k convolution, W * 1 / sqrt(k^2 in).

    Args:
      fan_in: channels that share the output with this convolution; 0: its own.
      axes: logical names of the input and output channels.
      down: halve the resolution, with the [1, 3, 3, 1] filter in front of a stride of two.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        fan_in: int = 0,
        down: bool = False,
        bias: bool = True,
        axes: tuple[str | None, str | None] = ("conv_in", "conv_out"),
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel, self.down, self.dtype = kernel, down, dtype
        self.scale = 1.0 / math.sqrt(kernel * kernel * (fan_in or in_channels))
        self.weight = declare_parameter(
            rngs, (kernel, kernel, in_channels, out_channels), ("kernel", "kernel", *axes), std=1.0
        )
        self.bias = declare_parameter(rngs, (out_channels,), (axes[1],)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, in] -> [N, H, W, out], half the sides when `down`"""
        w = materialize(self.weight, self.dtype, self.scale)
        x = x.astype(self.dtype)
        if not self.down:
            y = conv(x, w)
        elif self.kernel == 1:
            # A 1x1 convolution commutes with downsampling: afterwards it costs a quarter.
            y = conv(downsample(x), w)
        else:
            # Filter and stride in one: the blur gives one pixel more than it takes, so that no padding is needed
            # here.
            y = _convolve(blur(x), w, 2, "VALID")
        return y if self.bias is None else y + materialize(self.bias, self.dtype)


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    """[N, H, W, in] * [k, k, in, out], 'same' zero padding; a 1 x 1 kernel is a matrix product."""
    if w.shape[0] == 1:
        # A matrix product is compiled faster than a 1x1 convolution, and partitioned better.
        return jnp.matmul(x, w[0, 0], precision=choose_precision(x.dtype))
    return _convolve(x, w, 1, "SAME")


def _convolve(x: jax.Array, w: jax.Array, stride: int, padding: str) -> jax.Array:
    exact = choose_precision(x.dtype)
    return jax.lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=LAYOUT, precision=exact)


class RmsNorm(nnx.Module):
    """x / rms(x) * gain over the last axis, in float32."""

    def __init__(self, features: int, *, axis: str = "channels", dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        self.gain = declare_parameter(rngs, (features,), (axis,), mean=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        return (normalize(x, eps=1e-6) * materialize(self.gain, jnp.float32)).astype(self.dtype)


class Segment(NamedTuple):
    """Layers of several stacks in turn: `repeats` times, `counts[i]` layers of stack i."""

    repeats: int
    counts: tuple[int, ...]


class ScannedLayers(nnx.Module):
    """`count` modules of one shape with their parameters stacked on a leading axis "layers" and applied by `scan`.

    On TPUs and GPUs compiled once instead of `count` times; each parameter keeps its own value and gradient.

    Args:
      make: builds one module; called once.
      remat: recompute each module in the backward pass instead of keeping what it computed.
    """

    def __init__(self, make: Callable[[], nnx.Module], count: int, *, remat: bool = False, rngs: nnx.Rngs):
        self.count, self.remat = count, remat
        # One layer is built as a pattern; its parameters are then declared `count` times on a leading axis.
        self.layer = make()

        def stack(variable: Any) -> Any:
            m = variable.get_metadata()
            axes = ("layers", *m["logical_axes"])
            stacked = declare_parameter(rngs, (count, *variable.shape), axes, std=m["init_std"], mean=m["init_mean"])
            # `declare_parameter` knows nothing of attention layers: the mark is carried over from the pattern.
            stacked.set_metadata("attention", m["attention"])
            return stacked

        is_variable = lambda v: isinstance(v, nnx.Variable)
        graph, state = nnx.split(self.layer)
        self.layer = nnx.merge(graph, jax.tree.map(stack, state, is_leaf=is_variable))

    def __call__(self, x: Any, *args: Any) -> Any:
        """x -> layer_count(... layer_1(x, *args) ..., *args)"""
        body, params = self._split(args)
        return scan(body, x, params, self.count)[0]

    def _split(self, args: tuple) -> tuple[Body, Any]:
        # The body of a scan over these layers, and the stacked parameters.
        # The graph is the same for all layers: what changes from trip to trip are the parameters.
        graph, params = nnx.split(self.layer)
        layer = lambda p, h, *a: nnx.merge(graph, p)(h, *a)
        if self.remat:
            # Inside the scan: one layer's activations exist at a time in the backward pass.
            layer = jax.checkpoint(layer)
        return lambda h, p: (layer(p, h, *args), None), nnx.to_pure_dict(params)

    @staticmethod
    def interleave(stacks: Sequence["ScannedLayers"], segments: Sequence[Segment], x: Any, *args: Any) -> Any:
        """Applies layers of several stacks in turn, each stack's in their order; every segment is one scan.

        Args:
          stacks: layers that take and return the same kind of x.
          segments: how many layers of which stack come next; together, all of every stack.
          x: what the first layer takes.
          args: what every layer takes besides.
        """
        bodies, stacked = zip(*(stack._split(args) for stack in stacks), strict=True)
        cut = [_cut_stack(params, [(s.repeats, s.counts[i]) for s in segments]) for i, params in enumerate(stacked)]
        for segment, *parts in zip(segments, *cut, strict=True):

            def run_once(h: Any, params: Any, counts: tuple[int, ...] = segment.counts) -> tuple[Any, None]:
                for body, p, count in zip(bodies, params, counts, strict=True):
                    if count:
                        h, _ = scan(body, h, p, count)
                return h, None

            x, _ = scan(run_once, x, parts, segment.repeats)
        return x


def _cut_stack(stacked: Any, sizes: Sequence[tuple[int, int]]) -> list[Any]:
    # A tree of arrays [layers, ...] -> one of arrays [repeats, count, ...] for each size, of None for a count of 0.
    def cut(leaf: jax.Array) -> list[jax.Array | None]:
        # One split: its gradient is one concatenation.
        parts = iter(jax.lax.split(leaf, [repeats * count for repeats, count in sizes if count], axis=0))
        return [next(parts).reshape(*size, *leaf.shape[1:]) if size[1] else None for size in sizes]

    leaves, structure = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(structure, own) for own in zip(*map(cut, leaves), strict=True)]


def call_with_remat(block: nnx.Module, remat: bool, x: Any, *args: Any) -> Any:
    """block(x, *args), recomputed in the backward pass when `remat`."""
    if not remat:
        # nnx.Module declares no __call__.
        return block(x, *args)  # type: ignore[operator]
    # jax.checkpoint takes functions of arrays: the module goes in as its parameters and is rebuilt inside.
    graph, params = nnx.split(block)
    return jax.checkpoint(lambda p, h, *a: nnx.merge(graph, p)(h, *a))(nnx.to_pure_dict(params), x, *args)
