"""The generator as one StableHLO artefact (`jax.export`): any batch, CPU, CUDA and TPU; jax alone runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from gigagan_jax.config import Config
from gigagan_jax.models.build import build_generator
from gigagan_jax.models.network import Params, path_name
from gigagan_jax.models.pretrained.text_encoder import text_spec

PLATFORMS = ("cpu", "cuda", "tpu")


def input_shapes(config: Config) -> dict[str, tuple[tuple[str | int, ...], Any]]:
    """{input: (shape, dtype)} of an artefact; "n" is the batch.

    z; tokens, with features of a frozen text encoder, or labels; w_avg; truncation towards the mean of the prompt, and towards
    w_avg (docs/truncation.md).
    """
    shapes: dict[str, tuple[tuple[str | int, ...], Any]] = {"z": (("n", config.generator.z_dim), jnp.float32)}
    if config.condition == "text":
        shapes["tokens"] = (("n", config.text.length), jnp.int32)
        if not config.text.is_trained:
            shapes["features"] = (("n", config.text.length, text_spec(config.text).width), jnp.float32)
    elif config.condition == "class":
        shapes["labels"] = (("n",), jnp.int32)
    shapes["w_avg"] = ((config.generator.w_dim,), jnp.float32)
    shapes |= {"truncation": ((), jnp.float32), "global_truncation": ((), jnp.float32)}
    return shapes


def make_function(config: Config, centers: np.ndarray) -> Callable[..., jax.Array]:
    """f(params, inputs) -> float32 images [N, R, R, 3] in about [-1, 1].

    Args:
      config: of the run.
      centers: [K, z_dim], the z whose mean w is that of a prompt.
    """
    network = build_generator(config)

    def run(params: Params, inputs: dict[str, jax.Array]) -> jax.Array:
        generator = network.bind(params)
        condition = generator.condition(inputs.get("tokens"), inputs.get("labels"), inputs.get("features"))
        w = generator.map(inputs["z"], condition)
        mean = jnp.zeros_like(w)
        for z in centers:
            mean += generator.map(jnp.broadcast_to(z, inputs["z"].shape), condition) / len(centers)
        near = inputs["w_avg"] + inputs["global_truncation"] * (w - inputs["w_avg"])
        return generator.synthesize(mean + inputs["truncation"] * (near - mean), condition)[-1]

    return run


def export_generator(
    config: Config, params: Params, centers: np.ndarray, *, inside: bool = True, platforms: Sequence[str] = PLATFORMS
) -> bytes:
    """The serialized artefact.

    Args:
      config: of the run.
      params: of G.
      centers: as `make_function` takes them.
      inside: the weights are constants of it; else its first argument is {path: array}.
      platforms: that it is lowered for.
    """
    run = make_function(config, centers)
    (n,) = export.symbolic_shape("n")
    sizes = lambda shape: tuple(n if size == "n" else size for size in shape)
    inputs = {name: jax.ShapeDtypeStruct(sizes(shape), dtype) for name, (shape, dtype) in input_shapes(config).items()}
    if inside:
        exported = export.export(jax.jit(lambda inputs: run(params, inputs)), platforms=platforms)(inputs)
        return bytes(exported.serialize())
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in paths]

    def from_names(weights: dict[str, jax.Array], inputs: dict[str, jax.Array]) -> jax.Array:
        return run(jax.tree_util.tree_unflatten(structure, [weights[name] for name in names]), inputs)

    shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, (_, x) in zip(names, paths, strict=True)}
    return bytes(export.export(jax.jit(from_names), platforms=platforms)(shapes, inputs).serialize())
