"""The encoder of T5 (Raffel et al., 2020), with the tensor names of transformers' T5EncoderModel.

The module covers T5 v1.0 (relu), v1.1 and Flan-T5 (gated gelu), and mT5, which has another vocabulary. Activations
exceed the range of float16. Norms, softmax and the residual sum are float32 in every precision; bfloat16 has the
range for the rest. Equal to the torch class of transformers, by tests/models/pretrained/test_t5.py.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.layers.equalized import declare_parameter, materialize, normalize
from gigagan_jax.models.pretrained.hub import CONFIG, read_json
from gigagan_jax.models.pretrained.transformer import ACTIVATIONS, Dense, Encoder, dot_attention
from gigagan_jax.models.pretrained.weights import Row, require_type, transpose_linear


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder, with the names and defaults of transformers."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    # Relative positions share a bias by bucket; see `relative_position_buckets`.
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    # Ids of the sentencepiece vocabulary, which T5, Flan-T5 and mT5 share.
    pad_token_id: int = 0
    eos_token_id: int = 1

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """Name in ACTIVATIONS; "gated-gelu" means the tanh approximation in transformers."""
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else self.feed_forward_proj.removeprefix("gated-")


def _known_config(width: int, hidden: int, depth: int, heads: int, proj: str = "gated-gelu") -> T5Config:
    return T5Config(d_model=width, d_ff=hidden, num_layers=depth, num_heads=heads, feed_forward_proj=proj)


# Flan-T5 is fine-tuned from v1.1, so both have these sizes.
_V11 = {
    "small": _known_config(512, 1024, 8, 6),
    "base": _known_config(768, 2048, 12, 12),
    "large": _known_config(1024, 2816, 24, 16),
    "xl": _known_config(2048, 5120, 24, 32),
    "xxl": _known_config(4096, 10240, 24, 64),
}
# Architectures by hub id, so that a run can be planned without its weights.
KNOWN = {
    **{f"google/t5-v1_1-{size}": config for size, config in _V11.items()},
    **{f"google/flan-t5-{size}": config for size, config in _V11.items()},
    "google-t5/t5-small": _known_config(512, 2048, 6, 8, "relu"),
    "google-t5/t5-base": _known_config(768, 3072, 12, 12, "relu"),
    "google-t5/t5-large": _known_config(1024, 4096, 24, 16, "relu"),
}

# Defaults of transformers for fields that a config.json of each kind leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {},
    "mt5": {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
}


def read_config(folder: Path) -> T5Config:
    """The architecture in a folder's config.json.

    Raises:
      UserError: the network is of another kind, or its sizes are invalid.
    """
    file = folder / CONFIG
    values = read_json(file)
    kind = values.get("model_type")
    if kind not in _DEFAULTS:
        raise UserError(f"{file}: model_type={kind!r} is no T5 ({' or '.join(_DEFAULTS)}); give the folder of one")
    fields = dataclasses.fields(T5Config)
    values = {f.name: f.default for f in fields} | _DEFAULTS[kind] | values
    config = T5Config(**{f.name: require_type(values, f.name, type(f.default), file) for f in fields})
    if config.activation not in ACTIVATIONS:
        known = ", ".join([*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)])
        raise UserError(f"{file}: feed_forward_proj={config.feed_forward_proj!r}; known: {known}")
    # The first configs of Flan-T5 named "gelu" here, and the gate in another field.
    stated = {"is_gated_act": config.gated, "dense_act_fn": config.activation}
    wrong = [f"{n}={values[n]!r}" for n, v in stated.items() if values.get(n, v) != v]
    if wrong:
        raise UserError(
            f"{file}: feed_forward_proj={config.feed_forward_proj!r} contradicts {', '.join(wrong)}; "
            "take a later revision of these files"
        )
    sizes = {f.name: getattr(config, f.name) for f in fields if f.name.startswith(("d_", "num_", "vocab", "relative"))}
    # A quarter of the buckets hold single distances; the rest of a half needs larger ones.
    exact = config.relative_attention_num_buckets // 4
    if min(*sizes.values(), exact) < 1 or config.relative_attention_max_distance <= exact:
        raise UserError(f"{file}: sizes that make no network: {', '.join(f'{k}={v}' for k, v in sizes.items())}")
    return config


# ---------------------------------------------------------------- the network


class T5Norm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, in float32: no mean is subtracted and no bias added."""

    def __init__(self, features: int, eps: float, *, dtype: Any, rngs: nnx.Rngs):
        self.eps, self.dtype = eps, dtype
        self.gain = declare_parameter(rngs, (features,), ("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C]"""
        return (normalize(x, eps=self.eps) * materialize(self.gain, jnp.float32)).astype(self.dtype)


class T5Attention(nnx.Module):
    """Multi-head self-attention without biases. Heads times their width may differ from the channels."""

    def __init__(self, config: T5Config, *, dtype: Any, rngs: nnx.Rngs):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.heads = config.num_heads
        make = lambda: Dense(width, inner, axes=("embed", "heads"), bias=False, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value = make(), make(), make()
        self.out = Dense(inner, width, axes=("heads", "embed"), bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """x [N, C, D], bias float32 [1, heads, C, C], mask bool [N, 1, 1, C] -> [N, C, D]"""
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        # T5 does not scale the logits: the scale is part of the initial weights.
        y = dot_attention(q, k, v, scale=1.0, bias=bias, mask=mask)
        return self.out(y.reshape(*y.shape[:2], -1))


class T5Block(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); the sum stays float32."""

    def __init__(self, config: T5Config, *, dtype: Any, rngs: nnx.Rngs):
        c = config
        self.activation = c.activation
        self.norm1 = T5Norm(c.d_model, c.layer_norm_epsilon, dtype=dtype, rngs=rngs)
        self.attention = T5Attention(c, dtype=dtype, rngs=rngs)
        self.norm2 = T5Norm(c.d_model, c.layer_norm_epsilon, dtype=dtype, rngs=rngs)
        wide = lambda: Dense(c.d_model, c.d_ff, axes=("embed", "mlp"), bias=False, dtype=dtype, rngs=rngs)
        self.gate = wide() if c.gated else None
        self.up = wide()
        self.down = Dense(c.d_ff, c.d_model, axes=("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """x float32 [N, C, D], bias float32 [1, heads, C, C], mask bool [N, 1, 1, C] -> float32 [N, C, D]"""
        # float32 sums: activations of the larger models exceed the range of float16.
        x += self.attention(self.norm1(x), bias, mask).astype(jnp.float32)
        y, act = self.norm2(x), ACTIVATIONS[self.activation]
        hidden = act(self.up(y)) if self.gate is None else act(self.gate(y)) * self.up(y)
        return x + self.down(hidden).astype(jnp.float32)


class T5Encoder(nnx.Module):
    """The encoder of T5.

    Args:
      config: sizes.
      dtype: precision of the products; norms, softmax and the residual sum are float32.
      remat: recompute each block in the backward pass.
    """

    def __init__(self, config: T5Config, *, dtype: Any = jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.token = declare_parameter(rngs, (c.vocab_size, c.d_model), ("vocab", "embed"))
        # One small table for all blocks. It is replicated, so that the number of heads need not divide over the mesh.
        self.position_bias = declare_parameter(rngs, (c.relative_attention_num_buckets, c.num_heads), (None, None))
        self.encoder = Encoder(lambda: T5Block(c, dtype=dtype, rngs=rngs), c.num_layers, remat=remat, rngs=rngs)
        self.norm = T5Norm(c.d_model, c.layer_norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens int32 [N, C], mask bool [N, C] (False: padding, masked out) -> [N, C, D], after the final norm"""
        x = materialize(self.token, self.token[...].dtype)[tokens].astype(jnp.float32)
        x = self.encoder(
            x, self._attention_bias(tokens.shape[1]), mask[:, None, None, :], taps=(self.config.num_layers,)
        )[0]
        return self.norm(x)

    def _attention_bias(self, length: int) -> jax.Array:
        """float32 [1, heads, length, length] by (query, key)"""
        c = self.config
        # The bias depends on the distance only: one row for each distance, gathered into [length, length].
        places = np.arange(1 - length, length)
        number = relative_position_buckets(places, c.relative_attention_num_buckets, c.relative_attention_max_distance)
        by_distance = materialize(self.position_bias, jnp.float32)[number]  # [2 length - 1, heads]
        at = jnp.arange(length)
        return by_distance[at[None, :] - at[:, None] + (length - 1)].transpose(2, 0, 1)[None]


def relative_position_buckets(places: np.ndarray, count: int, max_distance: int) -> np.ndarray:
    """Bucket of each relative position, key - query; half of the buckets are for later keys.

    In each half, the first buckets hold single distances. The others grow logarithmically up to `max_distance`, and
    larger distances share the last one.

    places int [...] -> int32 [...] in [0, count)
    """
    half = count // 2
    exact = half // 2
    distance = np.abs(places)
    # float32, as in training: where the exact value is an integer (distance 64 of 128), rounding decides the bucket.
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    grown = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + grown.astype(np.int32), half - 1)
    return (np.where(places > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


# ---------------------------------------------------------------- the key table

# The embedding's two names: shared with the decoder, and the encoder's own. Files hold one or both.
_SHARED, _OWN = "shared.weight", "encoder.embed_tokens.weight"


def t5_rows(keys: Collection[str], config: T5Config) -> list[Row]:
    """Key table of the encoder.

    Args:
      keys: names of all tensors in the file; the name of the embedding depends on the writer.
      config: sizes.
    """
    block = "encoder.block.{}.layer"
    linear = {
        "attention/query": "0.SelfAttention.q",
        "attention/key": "0.SelfAttention.k",
        "attention/value": "0.SelfAttention.v",
        "attention/out": "0.SelfAttention.o",
        "down": "1.DenseReluDense.wo",
    }
    if config.gated:
        linear |= {"gate": "1.DenseReluDense.wi_0", "up": "1.DenseReluDense.wi_1"}
    else:
        linear["up"] = "1.DenseReluDense.wi"
    path_of_blocks = "encoder/blocks/layer"
    return [
        Row("token", _SHARED if _SHARED in keys else _OWN),
        # Only block 0 of a file holds the position bias, which all blocks share.
        Row("position_bias", f"{block.format(0)}.0.SelfAttention.relative_attention_bias.weight"),
        *(
            Row(f"{path_of_blocks}/{path}/weight", f"{block}.{key}.weight", transpose_linear)
            for path, key in linear.items()
        ),
        Row(f"{path_of_blocks}/norm1/gain", f"{block}.0.layer_norm.weight"),
        Row(f"{path_of_blocks}/norm2/gain", f"{block}.1.layer_norm.weight"),
        Row("norm/gain", "encoder.final_layer_norm.weight"),
    ]


def is_encoder(key: str) -> bool:
    """Whether a tensor of the file belongs to the encoder, not to the decoder."""
    return not key.startswith(("decoder.", "lm_head."))


def duplicate_embedding_filter(keys: Collection[str]) -> Callable[[str], bool]:
    """Predicate of the second copy of the embedding, in files that hold it under both names."""
    both = _SHARED in keys and _OWN in keys
    return lambda key: both and key == _OWN
