"""Conditions: captions through a text encoder and the learned transformer T, or class labels; and the mapping M.

The encoder is either one of bytes or words, which is trained with the network, or a frozen one (models/pretrained), whose
features come in from outside.

(t_local, t_global) = T(E_txt(c)): t_global is T's output at the end-of-text token, t_local the outputs at all other
positions (eq. 3a). w = M(z, t_global) (eq. 3b).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gigagan_jax.config import AttentionConfig, Config, GeneratorConfig, TextConfig, TransformerConfig
from gigagan_jax.models.layers.attention import FeedForward, SelfAttention
from gigagan_jax.models.layers.equalized import (
    Linear,
    RmsNorm,
    ScannedLayers,
    choose_precision,
    declare_parameter,
    leaky_relu,
    materialize,
    normalize,
)
from gigagan_jax.models.pretrained.text_encoder import BYTE_VOCABULARY, TRAINED_END, text_spec
from gigagan_jax.parallel.sharding import constrain

PAD_ID, END_ID = 0, TRAINED_END  # of the trained encoders


@dataclasses.dataclass(frozen=True)
class ConditionSettings:
    """What a network is conditioned on, whatever the network.

    Attributes:
      kind: "text", "class" or "none".
      text: the text encoder, for "text".
      num_classes: for "class".
      class_width: features of a class embedding, for "class".
    """

    kind: str
    text: TextConfig
    num_classes: int
    class_width: int

    @classmethod
    def from_config(cls, config: Config) -> "ConditionSettings":
        """The settings of a run."""
        return cls(config.condition, config.text, config.class_count, config.generator.w_dim)


class Condition(NamedTuple):
    """What a network is told about the image to make or to judge. Parts that do not apply are None.

    global_: [N, D] t_global or class embedding
    local: [N, C - 1, D] t_local
    mask: [N, C - 1] bool, False on padding
    """

    global_: jax.Array | None
    local: jax.Array | None = None
    mask: jax.Array | None = None


class TrainedEncoder(nnx.Module):
    """Trainable E_txt over the bytes or the words of a caption: needs no download.

    Each token sees its neighbours through a depthwise 1-D convolution, so that T starts from something like letters in context.

    A word's id is a pair of rows of two tables, and its embedding their sum (Shi et al., 2020, "Compositional embeddings using
    complementary partitions"): a million words are told apart by a few thousand rows.
    """

    def __init__(self, text: TextConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.dtype, self.buckets, width = dtype, text.buckets, text.width
        words = text.encoder == "words"
        table = lambda rows: declare_parameter(rngs, (rows, width), ("vocab", "embed"), std=1.0)
        self.embedding = table(text.buckets if words else BYTE_VOCABULARY)
        self.quotient_embedding = table(text.buckets) if words else None
        self.position = declare_parameter(rngs, (text.length, width), (None, "embed"), std=1.0)
        self.mix = declare_parameter(rngs, (3, width), (None, "embed"), std=1.0)
        self.bias = declare_parameter(rngs, (width,), ("embed",))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens int32 [N, C] -> [N, C, width]"""
        # Looked up in float32: the gradient of a lookup adds up over a batch.
        look_up = lambda table, rows: materialize(table, jnp.float32)[rows]
        if self.quotient_embedding is None:
            x = look_up(self.embedding, tokens)
        else:
            x = look_up(self.embedding, tokens % self.buckets)
            # 1 / sqrt(2): the sum keeps unit variance.
            x = (x + look_up(self.quotient_embedding, tokens // self.buckets)) / math.sqrt(2.0)
        x = (x + materialize(self.position, jnp.float32)).astype(self.dtype)
        # Padding is not a neighbour: t_global is read at the last token before it.
        seen = (tokens != PAD_ID)[:, :, None]
        padded = jnp.pad(jnp.where(seen, x, jnp.zeros_like(x)), ((0, 0), (1, 1), (0, 0)))
        # 1 / sqrt(3): a sum of three neighbours of unit variance keeps it.
        mix = materialize(self.mix, self.dtype, 1.0 / math.sqrt(3.0))
        # A depthwise convolution of width three, written as three products: faster to compile.
        near = padded[:, :-2] * mix[0] + x * mix[1] + padded[:, 2:] * mix[2]
        return x + leaky_relu(near + materialize(self.bias, self.dtype))


class TransformerBlock(nnx.Module):
    """Pre-norm self-attention and feed-forward, x + gain * f(x); padding is not looked at."""

    def __init__(self, config: TransformerConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.gain = config.residual_gain
        # Dot products, as in the text encoder that T continues.
        attention = AttentionConfig(heads=config.heads, head_dim=config.width // config.heads, kind="dot")
        self.attention = SelfAttention(config.width, attention, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(config.width, config.mlp_ratio, "rms", dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x += self.gain * self.attention(x, mask=mask)
        return x + self.gain * self.feed_forward(x)


class TextTransformer(nnx.Module):
    """T (eq. 3a). Features of the encoder are projected to T's width where they differ."""

    def __init__(self, in_width: int, config: TransformerConfig, *, remat: bool, dtype: Any, rngs: nnx.Rngs):
        self.project = (
            Linear(in_width, config.width, axes=("embed", None), dtype=dtype, rngs=rngs)
            if in_width != config.width
            else None
        )
        make = lambda: TransformerBlock(config, dtype=dtype, rngs=rngs)
        self.blocks = ScannedLayers(make, config.depth, remat=remat, rngs=rngs) if config.depth else None
        self.norm = RmsNorm(config.width, dtype=dtype, rngs=rngs)

    def __call__(self, features: jax.Array, mask: jax.Array, end: jax.Array) -> Condition:
        """features [N, C, in_width], mask bool [N, C], end int32 [N] (place of end-of-text) -> Condition"""
        x = features if self.project is None else self.project(features)
        if self.blocks is not None:
            x = self.blocks(x, mask)
        x = self.norm(x)
        # A product with one-hot rows instead of a gather: the partitioner keeps it on the example's device.
        at_end = jax.nn.one_hot(end, x.shape[1], dtype=x.dtype)
        t_global = jnp.einsum("nc,ncd->nd", at_end, x, precision=choose_precision(x.dtype))
        # The end token went into t_global: positions behind it move up by one, so that the length stays static.
        keep = jnp.arange(x.shape[1] - 1) < end[:, None]
        local = jnp.where(keep[:, :, None], x[:, :-1], x[:, 1:])
        return Condition(t_global, local, jnp.where(keep, mask[:, :-1], mask[:, 1:]))


class Conditioner(nnx.Module):
    """From what the data has (tokens or labels) to a Condition; each network owns one.

    Raises:
      UserError: the sizes of a frozen encoder are not found (models/pretrained/architectures.py).
    """

    def __init__(
        self,
        settings: ConditionSettings,
        transformer: TransformerConfig,
        *,
        remat: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.kind = settings.kind
        self.width = transformer.width if self.kind == "text" else settings.class_width
        if self.kind == "text":
            text = settings.text
            self.spec = text_spec(text)
            # A frozen encoder is no part of the network: its features come in from outside.
            self.encoder = TrainedEncoder(text, dtype=dtype, rngs=rngs) if text.is_trained else None
            self.transformer = TextTransformer(self.spec.width, transformer, remat=remat, dtype=dtype, rngs=rngs)
        elif self.kind == "class":
            self.embedding = declare_parameter(rngs, (settings.num_classes, self.width), ("vocab", "embed"), std=1.0)

    def __call__(
        self, tokens: jax.Array | None, labels: jax.Array | None, features: jax.Array | None = None
    ) -> Condition:
        """tokens int32 [N, C] (with features [N, C, D] of a frozen encoder) or labels int32 [N] -> Condition"""
        if self.kind == "text":
            if tokens is not None and self.encoder is not None:
                features = self.encoder(tokens)
            if tokens is None or features is None:
                raise ValueError("condition='text' needs tokens, and with a frozen encoder its features")
            # The end-of-text token's place, by the tokenizer's id: padding may have ids of its own.
            end = self.spec.end_position(tokens)
            # What comes after the end is padding, whatever its ids are.
            mask = jnp.arange(tokens.shape[1]) <= end[:, None]
            return self.transformer(features, mask, end)
        if self.kind == "class":
            return Condition(materialize(self.embedding, jnp.float32)[labels])
        return Condition(None)


class Conditioned(nnx.Module):
    """A network that makes images under a condition.

    Attributes:
      conditioner: its own.
    """

    conditioner: Conditioner

    def condition(
        self, tokens: jax.Array | None, labels: jax.Array | None = None, features: jax.Array | None = None
    ) -> Condition:
        """tokens int32 [N, C] (with features [N, C, D] of a frozen encoder) or labels int32 [N] -> Condition (eq. 3a)"""
        with jax.named_scope("conditioner"):
            return self.conditioner(tokens, labels, features)


class Mapping(nnx.Module):
    """M: w = M(z, t_global), fully connected, inputs normalised to unit second moment (StyleGAN2; eq. 3b).

    Args:
      g: sizes of z, w and the layers.
      global_width: features of t_global; 0 without a condition.
      extra_width: features of what else the images depend on.
    """

    def __init__(self, g: GeneratorConfig, global_width: int, *, extra_width: int = 0, rngs: nnx.Rngs):
        make = lambda n, **kind: Linear(
            n, g.w_dim, **{"axes": ("style", None), "lr_mul": g.mapping_lr_mul, "rngs": rngs} | kind
        )
        fan_in = g.z_dim + global_width + extra_width
        self.first = make(g.z_dim + global_width, fan_in=fan_in)
        # A layer of its own, with the scale that one layer of all inputs would give it: a few features more would not
        # divide over a mesh.
        extra = lambda: make(extra_width, fan_in=fan_in, axes=(None, None), bias=None)
        self.extra = extra() if extra_width else None
        self.rest = nnx.List([make(g.w_dim) for _ in range(g.mapping_depth - 1)])

    def __call__(self, z: jax.Array, t_global: jax.Array | None, extra: jax.Array | None = None) -> jax.Array:
        """z [N, z_dim], t_global [N, D] or None, extra [N, E] of unit second moment or None -> w [N, w_dim] float32"""
        # z and t_global differ in size: each is normalised before they are joined (StyleGAN2).
        parts = [normalize(z)] if t_global is None else [normalize(z), normalize(t_global)]
        x = self.first(jnp.concatenate(parts, axis=-1))
        if self.extra is not None:
            assert extra is not None
            x += self.extra(extra)
        x = leaky_relu(x)
        for layer in self.rest:
            x = leaky_relu(layer(x))
        return constrain(x, "batch", None)
