"""Building blocks of the frozen transformers: dense layer, layer norm, attention, pre-norm block, stacked encoder.

Weights are those of the files, without equalized learning rates or initial values. Parameters keep the precision that
they are loaded in. Products run in `dtype`, norms and softmax in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.models.layers.equalized import ScannedLayers, declare_parameter, materialize
from gigagan_jax.models.layers.scan import scan

# Names of transformers; "gelu" is exact there, the other two are the tanh approximation.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Dense(nnx.Module):
    """y = x W + b.

    Args:
      in_features, out_features: sizes of the last axis before and after.
      axes: logical axis names of W, [in, out].
      bias: whether there is a b.
      dtype: precision of the computation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool = True,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.weight = declare_parameter(rngs, (in_features, out_features), axes)
        self.bias = declare_parameter(rngs, (out_features,), (axes[1],)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]"""
        y = x.astype(self.dtype) @ materialize(self.weight, self.dtype)
        return y if self.bias is None else y + materialize(self.bias, self.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * gain + bias over the last axis, in float32."""

    def __init__(self, features: int, eps: float, *, dtype: Any, rngs: nnx.Rngs):
        self.eps, self.dtype = eps, dtype
        self.gain = declare_parameter(rngs, (features,), ("embed",))
        self.bias = declare_parameter(rngs, (features,), ("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C]"""
        # Mean and variance in two passes: the one-pass formula cancels where the mean is large.
        x = x.astype(jnp.float32)
        x -= x.mean(-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * materialize(self.gain, jnp.float32) + materialize(self.bias, jnp.float32)).astype(self.dtype)


def dot_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + bias) v with float32 logits.

    Args:
      q, k, v: [N, T, heads, d]
      bias: broadcastable to [N, heads, T, T], added to the logits
      mask: bool, broadcastable to [N, heads, T, T]; False entries are masked out

    Returns:
      [N, T, heads, d]
    """
    # float32 logits: bfloat16 keeps 8 bits, too few for the differences that softmax depends on.
    logits = jnp.einsum("nthd,nshd->nhts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if mask is not None:
        # A finite value: a row without any True entry gives a uniform softmax instead of NaN.
        logits = jnp.where(mask, logits, -1e30)
    return jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)


class Attention(nnx.Module):
    """Multi-head self-attention with biased projections."""

    def __init__(self, width: int, heads: int, *, dtype: Any, rngs: nnx.Rngs):
        self.heads = heads
        make = lambda axes: Dense(width, width, axes=axes, dtype=dtype, rngs=rngs)
        # Three matrices as in the files, not one joined one: each is a row of the key table.
        self.query, self.key, self.value = (make(("embed", "heads")) for _ in range(3))
        self.out = make(("heads", "embed"))

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x [N, T, C], mask bool broadcastable to [N, heads, T, T] -> [N, T, C]"""
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        y = dot_attention(q, k, v, scale=1.0 / math.sqrt(q.shape[-1]), mask=mask)
        return self.out(y.reshape(x.shape))


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x)).

    Args:
      width, hidden: channels, and channels inside the feed-forward.
      heads: of attention.
      activation: name in ACTIVATIONS.
      eps: of the norms.
    """

    def __init__(self, width: int, hidden: int, heads: int, activation: str, eps: float, *, dtype: Any, rngs: nnx.Rngs):
        self.activation = activation
        self.norm1 = LayerNorm(width, eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, eps, dtype=dtype, rngs=rngs)
        self.up = Dense(width, hidden, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Dense(hidden, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [N, T, C] -> [N, T, C]"""
        # The residual sum has the precision of the computation, unlike T5's, which needs float32.
        x += self.attention(self.norm1(x), mask)
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm2(x))))


class Encoder(nnx.Module):
    """`depth` blocks with stacked weights, applied by `scan`.

    Args:
      make: builds one block.
      remat: recompute each block in the backward pass.
    """

    def __init__(self, make: Callable[[], nnx.Module], depth: int, *, remat: bool, rngs: nnx.Rngs):
        self.depth, self.remat = depth, remat
        self.blocks = ScannedLayers(make, depth, rngs=rngs)

    def __call__(self, x: jax.Array, *args: Any, taps: Sequence[int]) -> list[jax.Array]:
        """x -> outputs of the first t blocks, for each t of `taps`; 0 is x. Blocks after the last tap do not run."""
        last = max(taps)
        # Taps are validated in Python: a wrong one would otherwise index another block silently.
        if not 0 <= min(taps) <= last <= self.depth:
            raise ValueError(f"taps {tuple(taps)} of {self.depth} blocks")
        graph, params = nnx.split(self.blocks.layer)
        # Weights are stacked over the blocks: a slice drops the blocks after the last tap.
        first = jax.tree.map(lambda p: p[:last], nnx.to_pure_dict(params))
        # One body for all blocks: it is traced and compiled once, whatever the depth.
        body = lambda p, h, *a: nnx.merge(graph, p)(h, *a)
        if self.remat:
            body = jax.checkpoint(body)
        # Outputs of all blocks are kept only where a tap lies between them; otherwise the last one is enough.
        inner = any(0 < t < last for t in taps)

        def apply_block(h: jax.Array, p: Any) -> tuple[jax.Array, jax.Array | None]:
            h = body(p, h, *args)
            return h, h if inner else None

        # With every output kept, memory grows by one [N, T, C] a block.
        end, every = scan(apply_block, x, first, last) if last else (x, None)
        return [x if t == 0 else end if every is None or t == last else every[t - 1] for t in taps]
