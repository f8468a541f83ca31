"""Writes the generator or the upsampler of a run as model.safetensors and config.json, which sample without the run.

python tools/export_weights.py --workdir=runs/digits --out=weights/digits
python -m gigagan_jax.sample --workdir=weights/digits --prompt="a handwritten seven" --out=seven.png
python tools/export_weights.py --workdir=runs/photos --out=weights/photos --detail=0.5
python -m gigagan_jax.upscale photo.jpg --checkpoint=weights/photos
"""

import argparse
from collections.abc import Sequence

import jax
import numpy as np

from gigagan_jax import cli
from gigagan_jax.checkpoint.run_folder import workdir_argument
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_bytes
from gigagan_jax.core.workdir_files import WEIGHTS_FILE
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.inference.upscaler import Upscaler
from gigagan_jax.interop.checkpoint_arrays import open_original
from gigagan_jax.models.network import Params, path_name

DTYPES = {"float16": np.float16, "float32": np.float32}


def scale_detail(params: Params, share: float) -> Params:
    """Parameters with which the image is that of Lanczos and `share` of the network's difference to it.

    The levels' images add up, so that this is the interpolation between both (as of networks in ESRGAN: Wang et al., 2018).
    """
    is_rgb = lambda path: "to_rgb" in path_name(path) and path_name(path).endswith(("filters", "bias"))
    # The style's affine stays: ToRGB is linear in its filters and its own bias.
    is_own = lambda path: is_rgb(path) and "style" not in path_name(path)
    return jax.tree_util.tree_map_with_path(lambda path, x: x * share if is_own(path) else x, params)


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=workdir_argument, required=True, help="of a training run")
    parser.add_argument("--out", type=cli.local_folder, required=True, help="folder for the two files")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16", help="of the tensors (float16)")
    parser.add_argument(
        "--text_path", help="folder or hub id of the frozen text encoder, where it moved since training"
    )
    parser.add_argument(
        "--detail",
        type=float,
        help="share of what an upsampler's levels add to its Lanczos image (1: as it was trained)",
    )
    args = parser.parse_args(argv)
    if args.detail is not None and not 0 <= args.detail <= 2:
        raise UserError(f"--detail={args.detail}: must be 0 (Lanczos) to 2; 1 is what was trained")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out={args.out} is a file: name a folder")
    kind = Upscaler if open_original(args.workdir, args.text_path).config.is_upsampler else TextToImage
    model = kind.from_workdir(args.workdir, text_path=args.text_path)
    if args.detail is not None:
        if not (isinstance(model, Upscaler) and model.config.upsampler.image_skip):
            raise UserError(
                "--detail: needs an upsampler whose image starts as the small one (config.upsampler.image_skip)"
            )
        model.params = scale_detail(model.params, args.detail)
    model.save_pretrained(args.out, dtype=DTYPES[args.dtype])
    print(f"step {model.step}, {format_bytes((args.out / WEIGHTS_FILE).stat().st_size)}, in {args.out}")
    return 0


if __name__ == "__main__":
    cli.main(verb)
