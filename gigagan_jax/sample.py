"""Images from prompts: `python -m gigagan_jax.sample --workdir=DIR --prompt="a handwritten seven" --out=FILE_OR_DIR`.

A `.png` path gets one grid (rows are prompts, columns seeds). A folder gets one PNG per image, with prompt and seed inside.
"""

import logging
from collections.abc import Sequence

import jax

from gigagan_jax import cli
from gigagan_jax.checkpoint.run_folder import workdir_argument
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.images import draw_grid, file_name, save_png
from gigagan_jax.inference.sampler import prompts_and_seeds
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.inference.upscaler import Upscaler
from gigagan_jax.telemetry.console import configure_logging

_log = logging.getLogger(__name__)

# docs/truncation.md has the curves that it follows.
DEFAULT_TRUNCATION = 1.0


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(prog="python -m gigagan_jax.sample", description=__doc__)
    parser.add_argument(
        "--workdir", type=workdir_argument, required=True, help="of a training run; its newest checkpoint is used"
    )
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--num", type=int, default=8, help="images a prompt, with seeds SEED, SEED + 1, ... (8)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (0)")
    parser.add_argument(
        "--truncation",
        type=float,
        default=DEFAULT_TRUNCATION,
        help=f"how far w keeps from the mean of its prompt: 0 is one image a prompt, 1 all variety ({DEFAULT_TRUNCATION:g})",
    )
    parser.add_argument(
        "--global_truncation",
        type=float,
        default=1.0,
        help="the same from the mean of all prompts, which weakens the prompt too (1); the paper's psi sets both",
    )
    parser.add_argument(
        "--text_path", help="folder or hub id of the frozen text encoder, where it moved since training"
    )
    parser.add_argument(
        "--upsampler", help="workdir, folder or hub id of an upsampler, which enlarges the images (docs/upsampler.md)"
    )
    parser.add_argument(
        "--upsampler_noise",
        type=float,
        default=0.0,
        help="level of noise augmentation before it, up to what it was trained for (0)",
    )
    parser.add_argument("--upsampler_text_path", help="as --text_path, for the upsampler")
    parser.add_argument("--out", type=cli.local_folder, required=True, help="a .png for a grid, or a folder")
    return parser


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    configure_logging(process_index=jax.process_index())
    if args.num < 1:
        raise UserError(f"--num={args.num}: must be at least 1")
    # Seeds are 32 bits in the latents.
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed}: must be 0 to {2**32 - 1}")
    if not 0.0 <= args.truncation <= 1.0:
        raise UserError(f"--truncation={args.truncation}: must be 0 to 1")
    if not 0.0 <= args.global_truncation <= 1.0:
        raise UserError(f"--global_truncation={args.global_truncation}: must be 0 to 1")
    # A folder may be named x.png.
    is_grid = args.out.suffix.lower() == ".png" and not args.out.is_dir()
    if not is_grid and args.out.is_file():
        raise UserError(f"--out={args.out} is a file and no .png: name a .png for a grid, or a folder")

    model = TextToImage.from_workdir(args.workdir, text_path=args.text_path)
    upsampler = None
    if args.upsampler is not None:
        # Before the base model runs: an error in it costs no images.
        upsampler = Upscaler.from_pretrained(args.upsampler, text_path=args.upsampler_text_path)
        upsampler.check_noise(args.upsampler_noise)
    elif args.upsampler_noise or args.upsampler_text_path:
        raise UserError("--upsampler_noise and --upsampler_text_path are of an upsampler: name it by --upsampler")
    prompts, seeds = prompts_and_seeds(args.prompt, args.num, args.seed)
    _log.info("sampling %d images from step %d", len(prompts), model.step)

    def log_progress(done: int, total: int) -> None:
        # A single batch needs no progress.
        if total > model.sampler.batch:
            _log.info("%d of %d images", done, total)

    images = model(
        prompts,
        seeds,
        truncation=args.truncation,
        global_truncation=args.global_truncation,
        progress=log_progress,
    )
    if upsampler is not None:
        _log.info("enlarging %d images %d times", len(prompts), upsampler.factor)
        images = upsampler.enlarge(images, prompts, seeds, args.upsampler_noise)
    # All processes sample, since the model may span them; one writes.
    if jax.process_index() != 0:
        return 0
    # Stored as text chunks of the PNG.
    metadata = {"model": model.config.name, "step": str(model.step), "truncation": f"{args.truncation:g}"}
    metadata |= {"global_truncation": f"{args.global_truncation:g}"}
    if upsampler is not None:
        metadata |= {"upsampler": upsampler.config.name, "upsampler_step": str(upsampler.step)}
    if is_grid:
        shape = (len(args.prompt), args.num, *images.shape[1:])
        text = {"prompt": "\n".join(args.prompt), "seed": f"{seeds[0]}..{seeds[args.num - 1]}"}
        save_png(args.out, draw_grid(images.reshape(shape), args.prompt), metadata | text)
        print(args.out)
    else:
        for i, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
            save_png(args.out / file_name(i, prompt, seed), image, metadata | {"prompt": prompt, "seed": str(seed)})
        print(f"{len(images)} images in {args.out}")
    return 0


if __name__ == "__main__":
    cli.main(verb)
