"""Writes the generator or the upsampler of a run as model.safetensors and config.json, which sample without the run.

python tools/export_weights.py --workdir=runs/digits --out=weights/digits
python -m gigagan_jax.sample --workdir=weights/digits --prompt="a handwritten seven" --out=seven.png
python -m gigagan_jax.upscale photo.jpg --checkpoint=weights/photos
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gigagan_jax import cli
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_bytes
from gigagan_jax.core.workdir_files import WEIGHTS_FILE
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.inference.upscaler import Upscaler
from gigagan_jax.interop.checkpoint_arrays import open_original

DTYPES = {"float16": np.float16, "float32": np.float32}


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=cli.local_folder, required=True, help="of a training run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16", help="of the tensors (float16)")
    parser.add_argument(
        "--text_path", help="folder or hub id of the frozen text encoder, where it moved since training"
    )
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out={args.out} is a file: name a folder")
    kind = Upscaler if open_original(args.workdir, args.text_path).config.is_upsampler else TextToImage
    model = kind.from_workdir(args.workdir, text_path=args.text_path)
    model.save_pretrained(args.out, dtype=DTYPES[args.dtype])
    print(f"step {model.step}, {format_bytes((args.out / WEIGHTS_FILE).stat().st_size)}, in {args.out}")
    return 0


if __name__ == "__main__":
    cli.main(verb)
