"""What a bench feeds the step: batches of noise, coloured discs with captions, and frozen networks with random weights."""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.data.tokenizers import make_tokenizer
from gigagan_jax.models.network import Params, is_spec, path_name
from gigagan_jax.models.pretrained import hub
from gigagan_jax.models.pretrained.architectures import REQUIREMENTS, read_architecture
from gigagan_jax.models.pretrained.frozen import FrozenNetworks
from gigagan_jax.models.pretrained.text_encoder import text_spec, tokenizer_options
from gigagan_jax.training.batch import abstract_batch

UNKNOWN = -1  # the label of an example whose class is not known: it forbids no caption


def draw_tokens(rng: np.random.Generator, shape: tuple[int, ...], vocabulary: int, end: int) -> np.ndarray:
    """int32 [N, C]: rows of random ids that all differ, each as long as it may be, with the end of text last."""
    tokens = rng.integers(3, vocabulary, shape, np.int32)
    tokens[tokens == end] = 3
    tokens[:, 0] = 3 + np.arange(shape[0]) % (min(vocabulary, end if end > 3 else vocabulary) - 3)
    tokens[:, -1] = end
    return tokens


def synthetic_batch(config: Config, shardings: dict[str, Any]) -> dict[str, jax.Array]:
    """A batch of noise whose captions all differ, each a valid wrong caption of every other; see step.abstract_batch.

    Args:
      config: of the step.
      shardings: of the batch.

    Raises:
      UserError: the sizes of a frozen text encoder cannot be found out.
    """
    rng = np.random.default_rng(0)
    out: dict[str, jax.Array] = {}
    for name, spec in abstract_batch(config).items():
        value: np.ndarray
        if name == "image":
            value = rng.integers(0, 256, spec.shape, np.uint8)
        elif name == "tokens":
            text = text_spec(config.text)
            value = draw_tokens(rng, spec.shape, text.vocab_size, text.end_id)
        elif name == "clip_tokens":
            sizes = read_architecture("clip", config.clip_path, REQUIREMENTS["clip_text"]).text
            value = draw_tokens(rng, spec.shape, sizes.vocab_size, sizes.eos_token_id)
        elif name == "label" and config.condition == "class":
            value = rng.integers(0, config.class_count, spec.shape, np.int32)
        elif name == "label":
            value = np.full(spec.shape, UNKNOWN, np.int32)
        else:  # stored embeddings: features and clip_text
            value = rng.standard_normal(spec.shape, np.float32)
            if name == "clip_text":
                value /= np.linalg.norm(value, axis=1, keepdims=True)
            value = value.astype(spec.dtype)
        out[name] = jax.device_put(value, shardings[name])
    return out


# ---------------------------------------------------------------- a data set that needs no files

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
    "white": (235, 235, 235),
    "black": (20, 20, 20),
}
SIZES = {"small": 0.15, "middling": 0.25, "large": 0.38}  # radius, of the side


def discs(config: Config, batches: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Batches of discs on plain backgrounds, "a large red disc on blue", at random places; for a trained text encoder.

    Returns:
      `image` uint8 [N, R, R, 3], `tokens` int32 [N, C], `label` int32 [N], unknown
    """
    rng = np.random.default_rng(seed)
    tokenizer = make_tokenizer(config.text.encoder, config.text.length, **tokenizer_options(config.text))
    n, side = config.batch_size, config.resolution
    names = list(COLOURS)
    y, x = (np.arange(side) + 0.5) / side, (np.arange(side) + 0.5) / side
    out = []
    for _ in range(batches):
        images, captions = np.empty((n, side, side, 3), np.uint8), []
        for i in range(n):
            disc, ground = (names[k] for k in rng.choice(len(names), 2, replace=False))
            size = str(rng.choice(list(SIZES)))
            radius = SIZES[size]
            cy, cx = rng.uniform(radius, 1 - radius, 2)
            edge = (radius - np.hypot(y[:, None] - cy, x[None] - cx)) * side + 0.5
            cover = np.clip(edge, 0, 1)[..., None]
            images[i] = np.rint(cover * COLOURS[disc] + (1 - cover) * COLOURS[ground])
            captions.append(f"a {size} {disc} disc on {ground}")
        out.append({"image": images, "tokens": tokenizer(captions), "label": np.full(n, UNKNOWN, np.int32)})
    return out


def endless(batches: list[dict[str, np.ndarray]], shardings: dict[str, Any]) -> Iterator[dict[str, jax.Array]]:
    """The batches in turn, on the devices."""
    while True:
        for batch in batches:
            yield {k: jax.device_put(v, shardings[k]) for k, v in batch.items()}


# ---------------------------------------------------------------- frozen networks without their files


def without_files(frozen: FrozenNetworks) -> list[str]:
    """Hub ids of frozen networks that are not in the hub's cache."""
    paths = {tower.path for tower in frozen.towers.values()}
    return sorted(p for p in paths if not Path(p).expanduser().exists() and hub.find_cached(p) is None)


def random_frozen(frozen: FrozenNetworks, mesh: Any, seed: int = 0) -> Params:
    """Random parameters of all frozen networks in their shapes and precisions, drawn on the devices, each born sharded.

    Matrices have a deviation of 1 / sqrt(inputs), gains are one, biases zero, the logit scale log(100): activations and so
    the work of the device are like those of real weights; losses mean nothing.
    """
    abstract, where = frozen.abstract(), frozen.shardings(mesh)
    modules = {name: tower.module for name, tower in frozen.towers.items()}
    if frozen.projection is not None:
        modules["projection"] = frozen.projection

    def one(name: str, path: tuple, spec: Any, shape: Any, key: jax.Array) -> jax.Array:
        text = path_name(path)
        if text.endswith("gain"):
            return jnp.ones(shape.shape, shape.dtype)
        if text.endswith("logit_scale"):
            return jnp.full(shape.shape, math.log(100.0), shape.dtype)
        dimensions = [n for n, axis in zip(spec.shape, spec.axes, strict=True) if axis != "layers"]
        if text.endswith("bias") or not dimensions:
            return jnp.zeros(shape.shape, shape.dtype)
        deviation = math.prod(dimensions[:-1]) ** -0.5 if len(dimensions) > 1 else 0.02
        stream = jax.random.fold_in(key, zlib.crc32(f"{name}/{text}".encode()))
        return (jax.random.normal(stream, shape.shape) * deviation).astype(shape.dtype)

    def make(key: jax.Array) -> Params:
        return {
            name: jax.tree_util.tree_map_with_path(
                lambda path, spec, shape, name=name: one(name, path, spec, shape, key),
                module.specs,
                abstract[name],
                is_leaf=is_spec,
            )
            for name, module in modules.items()
        }

    return jax.jit(make, out_shardings=where)(jax.random.key(seed)) if modules else {}


def write_tiny_clip(folder: Path) -> Path:
    """The config.json of a toy CLIP, beside an empty file where its weights would be: for random weights only."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = {
        "model_type": "clip",
        "text_config": tower | {"vocab_size": 512, "eos_token_id": 511},
        "vision_config": tower | {"image_size": 32, "patch_size": 8},
        "projection_dim": 24,
    }
    (folder / hub.CONFIG).write_text(json.dumps(config))
    (folder / hub.SINGLE).touch()
    return folder
