"""Enlarges images: `python -m gigagan_jax.upscale INPUT... --out=FILE_OR_DIR --checkpoint=DIR_OR_ID [--scale=4]`.

Inputs are files, folders and patterns. Short flags and names of outputs are those of Real-ESRGAN: `NAME_out.png`.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from gigagan_jax import cli
from gigagan_jax.config import MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference import upscale_job
from gigagan_jax.inference.image_writer import FORMATS
from gigagan_jax.inference.tiling import Tiling
from gigagan_jax.parallel import sharding
from gigagan_jax.parallel.devices import log_devices
from gigagan_jax.telemetry.console import configure_logging

_log = logging.getLogger(__name__)

# Endings, as Real-ESRGAN takes them, and not the names of formats.
_ENDINGS = ("auto", *(ending[1:] for ending in FORMATS))


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    args = parse_arguments(argv)
    with cli.end_by_sigterm():
        return run(args, _load_upscaler)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UserError for a wrong flag or value."""
    parser = cli.Parser(prog="python -m gigagan_jax.upscale", description=__doc__)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="a file, a folder, or a pattern in quotes")
    parser.add_argument("-i", "--input", action="append", default=[], help="the same; may be given several times")
    parser.add_argument(
        "-o", "--out", type=cli.local_folder, help="a file for one input, or a folder (beside the input)"
    )
    parser.add_argument("-n", "--checkpoint", required=True, help="workdir of a run, model folder, or hub id")
    parser.add_argument("-s", "--scale", type=float, help="1 to 64, also 1.5 (the model's factor)")
    parser.add_argument("-t", "--tile", default="auto", help="input pixels of a tile's side; auto or 0 chooses (auto)")
    parser.add_argument("-f", "--format", choices=_ENDINGS, help="of outputs in a folder; auto keeps the input's (png)")
    parser.add_argument("-g", "--gpu", default="auto", help="index of the one device to use; auto uses all (auto)")
    parser.add_argument(
        "--text_path", help="folder or hub id of the frozen text encoder, where it moved since training"
    )
    parser.add_argument("--prompt", default="", help="what the image shows, for a text-conditional model")
    parser.add_argument("--class", dest="label", help="name or number of the class, for a class-conditional model")
    parser.add_argument("--seed", type=int, default=0, help="of the latent code and of the noise (0)")
    parser.add_argument("--noise", type=float, default=0.0, help="noise that hides artefacts of the input, 0 to 1 (0)")
    parser.add_argument("--wrap", action="store_true", help="the image is a texture that repeats")
    parser.add_argument(
        "--color-match", "--color_match", action="store_true", help="keep mean and contrast per channel"
    )
    parser.add_argument("--suffix", default="out", help="NAME_SUFFIX.png; may be empty (out)")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    args = parser.parse_args(argv)
    # Flags and words are two ways to say the same.
    args.inputs = [*args.inputs, *args.input]
    if not args.inputs:
        raise UserError("no input: name files or folders (see --help)")
    # It would be the current folder.
    if "" in args.inputs:
        raise UserError("an empty INPUT: name a file or a folder ('.' is the current one)")
    if args.scale is not None and not 1.0 <= args.scale <= upscale_job.MAX_SCALE:
        raise UserError(f"--scale={args.scale:g}: must be 1 to {upscale_job.MAX_SCALE:g}")
    if args.tile != "auto" and not args.tile.isdecimal():
        raise UserError(f"--tile={args.tile}: must be auto, 0 or a number of pixels")
    args.tile = 0 if args.tile == "auto" else int(args.tile)
    if args.gpu != "auto" and not args.gpu.isdecimal():
        raise UserError(f"--gpu={args.gpu}: must be auto or the index of a device")
    args.gpu = None if args.gpu == "auto" else int(args.gpu)
    # Seeds are 32 bits in the latents.
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed}: must be 0 to {2**32 - 1}")
    if not 0.0 <= args.noise <= 1.0:
        raise UserError(f"--noise={args.noise:g}: must be 0 to 1")
    # A slash would write into another folder.
    if "/" in args.suffix:
        raise UserError(f"--suffix={args.suffix}: must be a part of a file name")
    return args


def run(args: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Upscales what the arguments name.

    Args:
      args: of `parse_arguments`.
      load: makes an `inference.upscaler.Upscaler` of a workdir, a model folder or a hub id, on a `mesh`, with a `text_path`.

    Returns:
      0, or 2 where a file of a job failed.
    """
    configure_logging()
    files, outputs, job = _plan(args)
    log_devices()
    settings = upscale_job.Settings(args.scale, args.color_match)
    device = _find_device(args.gpu)
    mesh = sharding.make_mesh(MeshConfig(), None if device is None else [device])
    upscaler = load(args.checkpoint, mesh=mesh, text_path=args.text_path)
    model = upscaler.tile_model(prompt=args.prompt, label=args.label, seed=args.seed, noise=args.noise)
    # One for all files: what it learned of the memory is kept.
    tiling = Tiling(model, args.tile, args.wrap, device)
    # Stored in a PNG.
    text = {"model": upscaler.config.name, "step": str(upscaler.step), "seed": str(args.seed)}
    text |= {"prompt": args.prompt} if args.prompt else {}
    if not job:
        upscale_job.upscale_file(tiling, files[0], outputs[0], settings, overwrite=args.overwrite, text=text)
        print(outputs[0])
        return 0
    pairs = list(zip(files, outputs, strict=True))
    written, kept, failures = upscale_job.run_job(tiling, pairs, settings, overwrite=args.overwrite, text=text)
    if kept:
        _log.info("%d outputs exist and were kept: --overwrite replaces them", kept)
    _log.info("%d of %d images upscaled", written, len(pairs))
    # At the end, where they are seen.
    for line in failures:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 2 if failures else 0


def _plan(args: argparse.Namespace) -> tuple[list[Path], list[Path], bool]:
    """(inputs, an output each, whether they are a job), checked before the model is loaded. Raises UserError."""
    try:
        files = upscale_job.find_inputs(args.inputs)
        job = upscale_job.is_job(args.inputs, files)
        outputs = upscale_job.name_outputs(files, args.out, job, args.suffix, args.format)
        if job:
            # The outputs of an earlier job may lie among the inputs.
            files = upscale_job.without_own_outputs(files, outputs)
            outputs = upscale_job.name_outputs(files, args.out, job, args.suffix, args.format)
            upscale_job.check_unique(files, outputs)
        else:
            upscale_job.check_file(files[0], outputs[0], args.scale or 1.0, args.overwrite)
    # Folders that may not be read, names that are too long.
    except OSError as error:
        raise UserError(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}") from None
    return files, outputs, job


def _load_upscaler(checkpoint: str, mesh: Any, text_path: str | None) -> Any:
    # Here: the flags are checked before the networks are imported.
    from gigagan_jax.inference.upscaler import Upscaler

    return Upscaler.from_pretrained(checkpoint, text_path=text_path, mesh=mesh, flag="--checkpoint")


def _find_device(index: int | None) -> jax.Device | None:
    """The device of this index; None for no choice. Raises UserError where there is none."""
    devices = jax.local_devices()
    if index is not None and not 0 <= index < len(devices):
        raise UserError(f"--gpu={index}: there are {len(devices)} devices, 0 to {len(devices) - 1}")
    return None if index is None else devices[index]


if __name__ == "__main__":
    cli.main(verb)
