"""Exports the generator of a run as an artefact that runs without this package.

    python tools/export.py --workdir=docs/weights/digits --format=stablehlo --out=DIR
    python tools/export.py --workdir=docs/weights/digits --format=onnx --out=DIR
    cd DIR && python run.py "a handwritten seven" 3

StableHLO needs jax and flatbuffers, ONNX needs onnxruntime alone; both take any batch. z, w_avg and the truncations are inputs.
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

# Weights go into the artefact up to this many bytes, unless --weights says otherwise.
_INSIDE = 1e9
# Batches of the check: the artefact takes any.
_BATCHES = (1, 3)


def write_stablehlo(folder: Path, original: Original, params: Params, w_avg: np.ndarray, inside: bool) -> Any:
    """Writes the files; returns inputs -> images."""
    config = original.config
    data = stablehlo.export_generator(config, params, np.asarray(center_z(config.generator.z_dim)), inside=inside)
    (folder / stablehlo.FILE).write_bytes(data)
    weights = None
    if not inside:
        save_weights(folder, config, params, w_avg, step=original.step, dtype=np.float32)
        from safetensors.numpy import load_file

        weights = load_file(folder / "model.safetensors")
        weights.pop("w_avg")
    (folder / artefact.PROGRAM_FILE).write_text(stablehlo.program(config, inside))
    return lambda inputs: stablehlo.run_artefact(data, weights, inputs)


def write_onnx(folder: Path, original: Original, params: Params, w_avg: np.ndarray, inside: bool) -> Any:
    """Writes the files; returns inputs -> images."""
    config = original.config
    tensors = to_torch(state_networks(config)["g"], config, params)
    centers = np.array(center_z(config.generator.z_dim))
    onnx_export.export_generator(config, tensors, w_avg, centers, folder / onnx_export.FILE, inside=inside)
    (folder / artefact.PROGRAM_FILE).write_text(onnx_export.program(config))
    return lambda inputs: onnx_export.run_artefact(folder / onnx_export.FILE, inputs)


FORMATS: dict[str, tuple[Callable[..., Any], str, str, float]] = {
    "stablehlo": (write_stablehlo, "StableHLO", stablehlo.NOTES, stablehlo.MOST_INSIDE),
    "onnx": (write_onnx, "ONNX", onnx_export.NOTES, onnx_export.MOST_INSIDE),
}


def compare(config: Config, params: Params, w_avg: np.ndarray, run: Callable[..., np.ndarray]) -> float:
    """Largest difference of an artefact's images. Raises UserError past the tolerance."""
    reference = jax.jit(artefact.make_function(config, np.asarray(center_z(config.generator.z_dim))))
    found = []
    for count in _BATCHES:
        inputs = artefact.example_inputs(config, count, w_avg)
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
        size = 4 * network.count()
        inside = args.weights == "inside" or (args.weights is None and size <= _INSIDE)
        if inside and size > most:
            raise UserError(
                f"--weights=inside: {format_bytes(size)} of weights do not fit into one {title} file: --weights=beside"
            )
        print(
            f"step {original.step}, {format_bytes(size)} of weights {'inside' if inside else 'beside'}: exporting",
            flush=True,
        )
        params = jax.tree.map(jnp.asarray, nest(dict(original.arrays.read(network, "g", "average"))))
        w_avg = np.array(original.arrays.read_array("w_avg", (config.generator.w_dim,)))
        run = write(part, original, params, w_avg, inside)
        verdict = f"images of {len(_BATCHES)} batches agree to {compare(config, params, w_avg, run):.1e}"
        (part / CONFIG_FILE).write_text(json.dumps(torch_config(config), indent=1) + "\n")
        np.save(part / artefact.W_AVG_FILE, w_avg)
        (part / "README.md").write_text(artefact.write_readme(config, original.step, title, notes, verdict))
    print(f"{verdict}; {format_bytes(sum(f.stat().st_size for f in args.out.iterdir()))} in {args.out}")
    return 0


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", type=cli.local_folder, required=True, help="of a training run, or published weights"
    )
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder that is made")
    parser.add_argument("--weights", choices=("inside", "beside"), help="of the artefact's file (inside up to 1 GB)")
    parser.add_argument("--text_path", help="folder or hub id of the frozen text encoder of published weights")
    args = parser.parse_args(argv)
    if args.format == "onnx":
        onnx_export.check_packages()
    with cli.end_by_sigterm():
        return export(args)


if __name__ == "__main__":
    cli.main(verb)
