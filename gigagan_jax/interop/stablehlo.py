"""G as one StableHLO artefact (`jax.export`): any batch, CPU, CUDA and TPU; jax and flatbuffers run it.

An upsampler's takes small images of any size, as symbolic multiples of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import export

from gigagan_jax.config import Config
from gigagan_jax.interop.artefact import artefact_name, input_shapes, make_function, write_program
from gigagan_jax.models.network import Params, path_name
from gigagan_jax.models.upsampler import grid_of

PLATFORMS = ("cpu", "cuda", "tpu")
# Bytes of weights; the serialization of an artefact ends at 2 GiB.
MOST_INSIDE = 1.9e9


def file_name(config: Config) -> str:
    """Of the artefact."""
    return f"{artefact_name(config)}.stablehlo"


def notes(config: Config, size: tuple[int, int] | None = None) -> str:
    """What README.md says of the format; the artefact takes any `size`."""
    takes, images, whose, picture = "any batch", "`[n, R, R, 3]`", "sample", ""
    if config.is_upsampler:
        grid, factor = (
            grid_of(config.upsampler, config.generator),
            config.resolution // config.upsampler.input_resolution,
        )
        takes = f"any batch of images of any size whose sides are multiples of {grid}"
        images, whose = f"`[n, {factor} h, {factor} w, 3]`", "upscale"
        picture = ", and its program Pillow"
    return f"""`{file_name(config)}` runs on CPU, CUDA and TPU and takes {takes}.
It needs jax and flatbuffers{picture}; safetensors too where the weights lie beside it.
Images are {images} in about [-1, 1]. The z of a seed is that of `gigagan_jax.{whose}`.
JAX releases of the six months after the one that wrote the artefact read it, and those of the three weeks before (docs.jax.dev,
"Exporting and serializing staged-out computations"). Keep the checkpoint, to export again."""


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
    n, rows, columns = export.symbolic_shape("n, rows, columns")
    # Sides in cells of the grid: multiples of it by their form.
    grid = grid_of(config.upsampler, config.generator) if config.is_upsampler else 1
    symbols = {"n": n, "h": grid * rows, "w": grid * columns}
    sizes = lambda shape: tuple(symbols.get(size, size) for size in shape)
    inputs = {name: jax.ShapeDtypeStruct(sizes(shape), dtype) for name, (shape, dtype) in input_shapes(config).items()}
    if inside:
        exported = export.export(jax.jit(lambda inputs: run(params, inputs)), platforms=platforms)(inputs)
        return bytes(exported.serialize())
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in paths]

    def from_names(weights: dict[str, jax.Array], inputs: dict[str, jax.Array]) -> jax.Array:
        return run(jax.tree_util.tree_unflatten(structure, [weights[name] for name in names]), inputs)

    shapes = {name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, (_, x) in zip(names, paths, strict=True)}
    return bytes(export.export(jax.jit(from_names), platforms=platforms)(shapes, inputs).serialize())


def run_artefact(artefact: bytes, weights: dict[str, np.ndarray] | None, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Images [N, R, R, 3] of an artefact; `weights` of one that has none inside."""
    call = export.deserialize(bytearray(artefact)).call
    return np.asarray(jax.jit(call)(*(() if weights is None else (weights,)), inputs))


def program(config: Config, inside: bool) -> str:
    """run.py of the folder."""
    name = artefact_name(config)
    load = f"""import jax
import numpy as np
from jax import export

{name} = export.deserialize(bytearray(open("{file_name(config)}", "rb").read()))"""
    if not inside:
        load = load.replace("\n\n", "\nfrom safetensors.numpy import load_file\n\n")
        load += '\nweights = load_file("model.safetensors")\nweights.pop("w_avg")'
    z = f"jax.random.normal(jax.random.key(np.uint32(seed)), (1, {config.generator.z_dim}))"
    call = f"np.asarray(jax.jit({name}.call)({'' if inside else 'weights, '}inputs))"
    return write_program(config, load, z, call)
