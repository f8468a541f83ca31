"""Attention: squared-distance self-attention with tied query and key, cross-attention to text, feed-forward (sec. 3.1).

Dot-product attention is not Lipschitz; the paper replaces its logits by the negative squared distance between query and
key, projected by one matrix, and scales them to about unit variance at the start. The distance is expanded,

    -|q - k|^2 = 2 q.k - |k|^2 - |q|^2,

where |q|^2 does not change the softmax: what is left is a dot product and a bias per key. (`cdist` would have a NaN
gradient at zero distance, where a tied query meets its own key.)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import AttentionConfig
from gigagan_jax.models.layers.equalized import Linear, RmsNorm, choose_precision, leaky_relu, mark_as_attention


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, kind: str, mask: jax.Array | None, mask_self: bool = False
) -> jax.Array:
    """Softmax attention with float32 logits.

    Args:
      q: [N, T, heads, d]
      k, v: [N, S, heads, d]
      kind: "dot" has logits q.k / sqrt(d); "l2" has -|q - k|^2 / sqrt(8 d), of unit variance for normal q and k.
      mask: [N, S] bool, keys that may be seen; None for all.
      mask_self: forbid key i to query i.

    Returns:
      [N, T, heads, d]
    """
    d = q.shape[-1]
    # Float32 sums: softmax takes differences of logits, which bfloat16 rounds to steps of 1/2 near 100.
    exact = choose_precision(q.dtype)
    logits = jnp.einsum("nthd,nshd->nhts", q, k, precision=exact, preferred_element_type=jnp.float32)
    if kind == "dot":
        logits *= 1.0 / math.sqrt(d)
    else:
        # |k|^2 alone: |q|^2 is the same for all keys of a query, and softmax ignores it.
        squared = jnp.sum(jnp.square(k.astype(jnp.float32)), axis=-1).swapaxes(1, 2)[:, :, None, :]
        # 8 d is the variance of |q - k|^2 for standard normal q and k of d dimensions.
        logits = (2.0 * logits - squared) * (1.0 / math.sqrt(8.0 * d))
    if mask is not None:
        # -1e30 and not -inf: a row without any key gives a mean instead of NaN.
        logits = jnp.where(mask[:, None, None, :], logits, -1e30)
    if mask_self:
        # With tied query and key a token is nearest to itself: its weight would hide the others'.
        logits = jnp.where(jnp.eye(q.shape[1], k.shape[1], dtype=bool), -1e30, logits)
    # Back to the computation's type only after the softmax.
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("nhts,nshd->nthd", weights, v, precision=exact)


class _Norm(nnx.Module):
    """The configured normalisation before a branch."""

    def __init__(self, features: int, kind: str, *, dtype: Any, rngs: nnx.Rngs):
        self.rms = RmsNorm(features, dtype=dtype, rngs=rngs) if kind == "rms" else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.astype(self.dtype) if self.rms is None else self.rms(x)


class SelfAttention(nnx.Module):
    """Self-attention branch; `extra` (w, in the generator) is one more token to look at.

    Args:
      features: channels C of the tokens.
      extra_features: size of the extra token before projection; 0 for none.
      zero_init: the last projection starts at zero, and with it the branch.
    """

    def __init__(
        self,
        features: int,
        config: AttentionConfig,
        *,
        extra_features: int = 0,
        zero_init: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        self.head_dim = round(config.head_dim * config.dim_multiplier)
        inner = config.heads * self.head_dim
        self.norm = _Norm(features, config.norm, dtype=dtype, rngs=rngs)
        self.to_query = Linear(features, inner, axes=("embed", "heads"), bias=None, dtype=dtype, rngs=rngs)
        # One projection for query and key: the squared distance is Lipschitz only then (Kim et al., 2021).
        tied = config.kind == "l2"
        self.to_key = (
            None if tied else Linear(features, inner, axes=("embed", "heads"), bias=None, dtype=dtype, rngs=rngs)
        )
        # Values keep a projection of their own; only the logits need the tie.
        self.to_value = Linear(features, inner, axes=("embed", "heads"), bias=None, dtype=dtype, rngs=rngs)
        self.out = Linear(inner, features, axes=("heads", "embed"), zero_init=zero_init, dtype=dtype, rngs=rngs)
        self.to_extra = (
            Linear(extra_features, features, axes=("style", None), dtype=dtype, rngs=rngs) if extra_features else None
        )
        mark_as_attention(self)

    def __call__(self, x: jax.Array, extra: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
        """x [N, T, C], extra [N, E], mask [N, T] -> [N, T, C] (without the residual)"""
        h = self.norm(x)
        tokens = h
        if self.to_extra is not None:
            if extra is None or mask is not None:
                raise ValueError("the extra token is missing, or given together with a mask")
            # w is a key and a value, never a query: it is looked at, and has no output.
            tokens = jnp.concatenate([h, self.to_extra(extra)[:, None]], axis=1)
        split = lambda y: y.reshape(*y.shape[:2], self.config.heads, self.head_dim)
        key = split((self.to_query if self.to_key is None else self.to_key)(tokens))
        # The tied projection was computed for all tokens; queries are those of the feature map.
        query = key[:, : h.shape[1]] if self.to_key is None else split(self.to_query(h))
        c = self.config
        y = attend(query, key, split(self.to_value(tokens)), kind=c.kind, mask=mask, mask_self=c.mask_self)
        return self.out(y.reshape(*y.shape[:2], -1))


class CrossAttention(nnx.Module):
    """Dot-product attention from feature map to text (sec. 3.1, "Interleaving attention with convolution").

    Args:
      features: channels C of the queries.
      context_features: channels of the text tokens.
      zero_init: the last projection starts at zero, and with it the branch.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        config: AttentionConfig,
        *,
        zero_init: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.heads, self.head_dim = config.heads, round(config.head_dim * config.dim_multiplier)
        inner = self.heads * self.head_dim
        self.norm = _Norm(features, config.norm, dtype=dtype, rngs=rngs)
        self.context_norm = _Norm(context_features, config.norm, dtype=dtype, rngs=rngs)
        self.to_query = Linear(features, inner, axes=("embed", "heads"), bias=None, dtype=dtype, rngs=rngs)
        self.to_key = Linear(context_features, inner, axes=("embed", "heads"), bias=None, dtype=dtype, rngs=rngs)
        self.to_value = Linear(context_features, inner, axes=("embed", "heads"), bias=None, dtype=dtype, rngs=rngs)
        self.out = Linear(inner, features, axes=("heads", "embed"), zero_init=zero_init, dtype=dtype, rngs=rngs)
        mark_as_attention(self)

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x [N, T, C], context [N, S, D], mask [N, S] -> [N, T, C] (without the residual)"""
        split = lambda y: y.reshape(*y.shape[:2], self.heads, self.head_dim)
        # Text features and feature maps differ in size: each has a norm of its own.
        context = self.context_norm(context)
        y = attend(
            split(self.to_query(self.norm(x))),
            split(self.to_key(context)),
            split(self.to_value(context)),
            kind="dot",
            mask=mask,
        )
        return self.out(y.reshape(*y.shape[:2], -1))


class FeedForward(nnx.Module):
    """norm -> C x ratio -> leaky ReLU -> C branch (without the residual).

    Args:
      features: channels C.
      ratio: hidden features, times C.
      norm: kind of the normalisation before the branch.
      zero_init: the last projection starts at zero, and with it the branch.
    """

    def __init__(
        self,
        features: int,
        ratio: float,
        norm: str,
        *,
        zero_init: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = round(features * ratio)
        # Before the branch: the residual stream itself stays unnormalised.
        self.norm = _Norm(features, norm, dtype=dtype, rngs=rngs)
        self.up = Linear(features, hidden, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, features, axes=("mlp", "embed"), zero_init=zero_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(leaky_relu(self.up(self.norm(x))))
