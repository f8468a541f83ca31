"""Converts checkpoints to PyTorch or safetensors, and back.

    python tools/convert_checkpoint.py --to=pytorch --workdir=runs/digits --out=DIR [--what=optimizer]
    python tools/convert_checkpoint.py --from=pytorch --input=DIR --out=runs/again

The folder has model.safetensors (in shards past 5 GB), config.json and a model card; for PyTorch, torch_gigagan.py and
torch_training.py too. --to=safetensors keeps the names and layouts of this project. Arrays are read a few at a
time. Outputs of both sides are compared where both networks fit into --memory, else every tensor through the inverse map.
The way back makes a workdir that `train` goes on from: without the networks of training G is its average and D starts anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gigagan_jax import cli
from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.checkpoint.run_folder import workdir_argument
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.core import files
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_bytes
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.interop import model_folder, model_folder_reader, torch_check
from gigagan_jax.interop.checkpoint_arrays import open_original
from gigagan_jax.interop.tensor_names import TENSOR_NAMES
from gigagan_jax.training.state import Networks

# {flag: group of the config} of networks whose places are no part of a folder.
_PATHS = {"text_path": "text", "clip_path": "clip", "vision_path": "vision_aided", "perceptual_path": "perceptual"}


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=sorted(TENSOR_NAMES))
    direction.add_argument("--from", dest="source", choices=sorted(TENSOR_NAMES))
    parser.add_argument("--workdir", type=workdir_argument, help="--to: of a training run, or published weights")
    parser.add_argument("--input", type=cli.local_folder, help="--from: folder that was converted, or trained in torch")
    parser.add_argument(
        "--out", type=cli.local_folder, required=True, help="folder that is made: of the other framework"
    )
    parser.add_argument(
        "--what",
        choices=model_folder.CHOICES,
        help="--to: the average of G, which samples (average); with the networks of training; with their optimizers too",
    )
    for flag, group in _PATHS.items():
        network = {
            "text": "text encoder",
            "clip": "CLIP",
            "vision_aided": "image tower",
            "perceptual": "VGG-16 of the perceptual loss",
        }[group]
        parser.add_argument(f"--{flag}", help=f"folder or hub id of the run's frozen {network}")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that the comparison may take (8)")
    parser.add_argument("--shard", type=float, default=5.0, help="GB of a file at most (5)")
    args = parser.parse_args(argv)
    needed, other = ("workdir", "input") if args.to else ("input", "workdir")
    if getattr(args, needed) is None or getattr(args, other) is not None:
        raise UserError(
            f"{f'--to={args.to}' if args.to else f'--from={args.source}'} needs --{needed}=DIR, and no --{other}"
        )
    only = ("clip_path", "vision_path", "perceptual_path") if args.to else ("what",)
    if unused := [name for name in only if getattr(args, name) is not None]:
        raise UserError(f"--{unused[0]} has no meaning with {'--to' if args.to else '--from'}: leave it out")
    with cli.end_by_sigterm():
        return convert_to(args) if args.to else convert_from(args)


def convert_to(args: argparse.Namespace) -> int:
    """A checkpoint as a folder."""
    # Each includes those before it.
    choices = model_folder.CHOICES[: model_folder.CHOICES.index(args.what or "average") + 1]
    for name in ("memory", "shard"):
        if not 0 < getattr(args, name) < 1e9:
            raise UserError(f"--{name}={getattr(args, name)} must be a positive number of GB")
    original = open_original(args.workdir, args.text_path)
    progress: list[ProgressBar] = []

    def show(done: int, total: int) -> None:
        if not progress:
            progress.append(ProgressBar("converting", total // 2**20, " MiB"))
        progress[0].step(done // 2**20 - progress[0].done)

    check = torch_check.Check(original, choices, args.to, args.memory * 1e9)
    names = model_folder.write_folder(
        args.out, original, choices, args.to, shard_bytes=int(args.shard * 1e9), progress=show, check=check
    )
    size = sum((args.out / name).stat().st_size for name in names)
    print(f"step {original.step}: {check.verdict}")
    print(f"{format_bytes(size)} in {args.out}: {len(names)} files, begin with README.md")
    return 0


def convert_from(args: argparse.Namespace) -> int:
    """A converted folder as a workdir."""
    # First: what cannot be written is known before anything is read.
    with files.new_folder(args.out) as part:
        paths = {group: getattr(args, flag) for flag, group in _PATHS.items() if getattr(args, flag)}
        imported = model_folder_reader.read_folder(args.input, args.source, paths)
        networks, step = Networks(imported.config), imported.step
        state = networks.state_of_arrays(
            imported.params,
            imported.average,
            imported.w_avg,
            imported.moments,
            imported.counts,
            step,
            imported.images,
        )
        open_workdir(part, imported.config)
        checkpoints = Checkpoints(part, imported.config)
        checkpoints.save(step, state, imported.data, imported.config, imported.frozen, images=imported.images)
        checkpoints.close()
    anew = [name for name in networks.trained() if name not in imported.params and name != "g"]
    anew += [f"moments of {name}" for name in networks.trained() if name not in imported.moments]
    print(f"step {step} in {args.out}" + (f"; these start anew: {', '.join(anew)}" if anew else ""))
    return 0


if __name__ == "__main__":
    cli.main(verb)
