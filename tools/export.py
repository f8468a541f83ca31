"""Exports the generator or the upsampler of a run as an artefact that runs without this package.

    python tools/export.py --workdir=docs/weights/digits --format=stablehlo --out=DIR
    python tools/export.py --workdir=docs/weights/digits --format=onnx --out=DIR
    cd DIR && python run.py "a handwritten seven" 3
    python tools/export.py --workdir=docs/weights/photos --format=onnx --input_size=128x96 --out=DIR
    cd DIR && python run.py photo.png 3

StableHLO needs jax and flatbuffers, ONNX needs onnxruntime alone; both take any batch. z, w_avg and the truncations are inputs.
Of an upsampler, z, the small image and the level of its noise: as StableHLO of any size, as ONNX of --input_size.
The artefact is run and compared with this package before the folder gets its name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax import cli
from gigagan_jax.checkpoint.run_folder import workdir_argument
from gigagan_jax.config import Config
from gigagan_jax.config.parameter_renames import nest
from gigagan_jax.core import files
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_bytes
from gigagan_jax.inference.latents import center_z
from gigagan_jax.interop import artefact, onnx_export, stablehlo
from gigagan_jax.interop.checkpoint_arrays import Original, open_original, state_networks
from gigagan_jax.interop.model_folder import CONFIG_FILE, torch_config
from gigagan_jax.interop.torch_table import to_torch
from gigagan_jax.interop.weights import save_weights
from gigagan_jax.models.network import Params
from gigagan_jax.models.upsampler import grid_of

# Weights go into the artefact up to this many bytes, unless --weights says otherwise.
_INSIDE = 1e9
# Batches of the check: the artefact takes any.
_BATCHES = (1, 3)
# Height and width of small images.
Size = tuple[int, int]


def write_stablehlo(
    folder: Path, original: Original, params: Params, w_avg: np.ndarray, inside: bool, size: Size | None
) -> Any:
    """Writes the files; returns inputs -> images."""
    config = original.config
    data = stablehlo.export_generator(config, params, np.asarray(center_z(config.generator.z_dim)), inside=inside)
    (folder / stablehlo.file_name(config)).write_bytes(data)
    weights = None
    if not inside:
        save_weights(folder, config, params, w_avg, step=original.step, dtype=np.float32)
        from safetensors.numpy import load_file

        weights = load_file(folder / "model.safetensors")
        weights.pop("w_avg")
    (folder / artefact.PROGRAM_FILE).write_text(stablehlo.program(config, inside))
    return lambda inputs: stablehlo.run_artefact(data, weights, inputs)


def write_onnx(
    folder: Path, original: Original, params: Params, w_avg: np.ndarray, inside: bool, size: Size | None
) -> Any:
    """Writes the files; returns inputs -> images."""
    config = original.config
    file = folder / onnx_export.file_name(config)
    tensors = to_torch(state_networks(config)["g"], config, params)
    centers = np.array(center_z(config.generator.z_dim))
    onnx_export.export_generator(config, tensors, w_avg, centers, file, inside=inside, size=size)
    (folder / artefact.PROGRAM_FILE).write_text(onnx_export.program(config, size))
    return lambda inputs: onnx_export.run_artefact(file, inputs)


FORMATS: dict[str, tuple[Callable[..., Any], str, Callable[..., str], float]] = {
    "stablehlo": (write_stablehlo, "StableHLO", stablehlo.notes, stablehlo.MOST_INSIDE),
    "onnx": (write_onnx, "ONNX", onnx_export.notes, onnx_export.MOST_INSIDE),
}


def input_size(config: Config, form: str, given: str | None) -> Size | None:
    """Height and width of the small images that an artefact is made for; None for any, or for none.

    Args:
      config: of the run.
      form: of FORMATS.
      given: of the flag, pixels or WIDTHxHEIGHT.

    Raises:
      UserError: the flag has no meaning here, or is no size of this upsampler.
    """
    if given is not None and not config.is_upsampler:
        raise UserError(f"--input_size={given}: {config.name} is a base model, which takes no image: leave it out")
    if given is not None and form != "onnx":
        raise UserError(f"--input_size={given} is of --format=onnx; StableHLO takes any size: leave it out")
    if form != "onnx" or not config.is_upsampler:
        return None
    sides = (given or str(config.upsampler.input_resolution)).split("x")
    grid = grid_of(config.upsampler, config.generator)
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) <= 2**16 for side in sides):
        raise UserError(f"--input_size={given}: must be pixels a side, or WIDTHxHEIGHT")
    width, height = int(sides[0]), int(sides[-1])
    if width % grid or height % grid:
        raise UserError(f"--input_size={given}: sides of {config.name}'s images are multiples of {grid}")
    return height, width


def sizes_of_check(config: Config, size: Size | None) -> tuple[Size | None, ...]:
    """Sizes of small images, one for each of the batches: that of training and an oblong one, where any is taken."""
    if size is not None or not config.is_upsampler:
        return (size,) * len(_BATCHES)
    grid = grid_of(config.upsampler, config.generator)
    return None, (2 * grid, 3 * grid)


def compare(
    config: Config, params: Params, w_avg: np.ndarray, run: Callable[..., np.ndarray], size: Size | None = None
) -> float:
    """Largest difference of an artefact's images. Raises UserError past the tolerance."""
    reference = jax.jit(artefact.make_function(config, np.asarray(center_z(config.generator.z_dim))))
    found = []
    for count, sides in zip(_BATCHES, sizes_of_check(config, size), strict=True):
        inputs = artefact.example_inputs(config, count, w_avg, sides)
        found.append(np.abs(np.asarray(reference(params, inputs)) - run(inputs)).max())
    # Python's max would drop what is not a number.
    worst = float(np.max(found))
    # Not a number is no agreement either.
    if not worst <= artefact.TOLERANCE:
        raise UserError(
            f"images of the artefact differ by {worst:.1e}, more than {artefact.TOLERANCE:.0e}; nothing was written"
        )
    return worst


def export(args: argparse.Namespace) -> int:
    """Writes the folder."""
    with files.new_folder(args.out) as part:
        write, title, notes, most = FORMATS[args.format]
        original = open_original(args.workdir, args.text_path)
        config, network = original.config, state_networks(original.config)["g"]
        size = input_size(config, args.format, args.input_size)
        weight = 4 * network.count()
        inside = args.weights == "inside" or (args.weights is None and weight <= _INSIDE)
        if inside and weight > most:
            raise UserError(
                f"--weights=inside: {format_bytes(weight)} of weights do not fit into one {title} file: --weights=beside"
            )
        print(
            f"step {original.step}, {format_bytes(weight)} of weights {'inside' if inside else 'beside'}: exporting",
            flush=True,
        )
        params = jax.tree.map(jnp.asarray, nest(dict(original.arrays.read(network, "g", "average"))))
        w_avg = np.array(original.arrays.read_array("w_avg", (config.generator.w_dim,)))
        run = write(part, original, params, w_avg, inside, size)
        verdict = f"images of {len(_BATCHES)} batches agree to {compare(config, params, w_avg, run, size):.1e}"
        (part / CONFIG_FILE).write_text(json.dumps(torch_config(config), indent=1) + "\n")
        if not config.is_upsampler:
            np.save(part / artefact.W_AVG_FILE, w_avg)
        low = artefact.ANY_SIZE if size is None else onnx_export.low_shape(size)
        readme = artefact.write_readme(config, original.step, title, notes(config, size), verdict, low)
        (part / "README.md").write_text(readme)
    print(f"{verdict}; {format_bytes(sum(f.stat().st_size for f in args.out.iterdir()))} in {args.out}")
    return 0


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", type=workdir_argument, required=True, help="of a training run, or published weights"
    )
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--out", type=cli.local_folder, required=True, help="folder that is made")
    parser.add_argument("--weights", choices=("inside", "beside"), help="of the artefact's file (inside up to 1 GB)")
    parser.add_argument(
        "--input_size", metavar="WxH", help="pixels of an upsampler's images as ONNX (those of training)"
    )
    parser.add_argument("--text_path", help="folder or hub id of the frozen text encoder of published weights")
    args = parser.parse_args(argv)
    if args.format == "onnx":
        onnx_export.check_packages()
    with cli.end_by_sigterm():
        return export(args)


if __name__ == "__main__":
    cli.main(verb)
