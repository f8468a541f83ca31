"""Converts a checkpoint to PyTorch.

    python tools/convert_checkpoint.py --workdir=runs/digits --to=pytorch --out=DIR [--what=average,training,optimizer]

The folder has model.safetensors (in shards past 5 GB), config.json, torch_gigagan.py and a model card. Arrays are read a few at a
time. Outputs of both sides are compared where both networks fit into --memory, else every tensor through the inverse map.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gigagan_jax import cli
from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_bytes
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.interop import pytorch, torch_check


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=cli.local_folder, required=True, help="of a training run")
    parser.add_argument("--to", choices=("pytorch",), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder that is made")
    parser.add_argument(
        "--what", default="average", help=f"of {','.join(pytorch.CHOICES)}, with commas between (average)"
    )
    parser.add_argument("--memory", type=float, default=8.0, help="GB that the comparison may take (8)")
    parser.add_argument("--shard", type=float, default=5.0, help="GB of a file at most (5)")
    args = parser.parse_args(argv)
    choices = [word for word in args.what.split(",") if word]
    unknown = set(choices) - set(pytorch.CHOICES)
    if unknown or not choices:
        raise UserError(f"--what={args.what}: choose of {', '.join(pytorch.CHOICES)}")
    checkpoints = Checkpoints(args.workdir)
    step = checkpoints.require_valid_step()
    progress: list[ProgressBar] = []

    def show(done: int, total: int) -> None:
        if not progress:
            progress.append(ProgressBar("converting", total // 2**20, " MiB"))
        progress[0].step(done // 2**20 - progress[0].done)

    check = torch_check.Check(checkpoints, step, choices, args.memory * 1e9)
    files = pytorch.write_folder(
        args.out, checkpoints, step, choices, shard_bytes=int(args.shard * 1e9), progress=show, check=check
    )
    size = sum((args.out / name).stat().st_size for name in files)
    print(f"step {step}: {check.verdict}")
    print(f"{format_bytes(size)} in {args.out}: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    cli.main(verb)
