"""Images from prompts: `python -m gigagan_jax.sample --workdir=DIR --prompt="a handwritten seven" --out=FILE_OR_DIR`.

A `.png`, `.jpg` or `.webp` gets the picture, or a grid of several (rows are prompts, columns seeds). A folder or `.tar` gets a
file an image and its metadata; a job that was stopped goes on by the same command. docs/sampling.md has the rest.
"""

import argparse
import logging
import re
from collections.abc import Sequence

import jax

from gigagan_jax import cli
from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.config import Config, needs_prompts
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER
from gigagan_jax.inference.image_encoding import DEFAULT_QUALITY
from gigagan_jax.inference.prompts import Prompt, check_names, read_prompts
from gigagan_jax.inference.sample_grid import check_grid, save_picture
from gigagan_jax.inference.sample_job import SampleJob, SampleSettings, check_job, report_cut_prompts, run_job
from gigagan_jax.inference.sample_outputs import SHARD_SIZE, Destination, parse_destination
from gigagan_jax.inference.sampler import check_truncation
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.inference.upscaler import Upscaler
from gigagan_jax.parallel.devices import log_devices
from gigagan_jax.telemetry.console import configure_logging

_log = logging.getLogger(__name__)

# docs/truncation.md has the curves that it follows.
DEFAULT_TRUNCATION = 1.0
# Images of a prompt; of a prompt in a file one, as there may be many.
_NUM, _NUM_OF_FILE = 8, 1


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(prog="python -m gigagan_jax.sample", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a training run, or a folder of published weights")
    parser.add_argument("--step", type=int, help="of an earlier checkpoint of the run (the newest)")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="text, or the name or number of a class; may be given several times",
    )
    parser.add_argument(
        "--prompts",
        action="append",
        default=[],
        metavar="FILE",
        help="a prompt a line; .jsonl, .csv: fields prompt, seed, file_name or id; - is the standard input; may be given "
        "several times",
    )
    parser.add_argument("--num", type=int, help=f"images a prompt ({_NUM}; with --prompts {_NUM_OF_FILE})")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="first seed (0); the images of a prompt have SEED, SEED + 1, ...; with --prompts every image has its own",
    )
    parser.add_argument(
        "--truncation",
        type=float,
        default=DEFAULT_TRUNCATION,
        help="how far w keeps from the mean of its prompt: 0 is one image a prompt, 1 all variety, up to 2 more than that "
        f"({DEFAULT_TRUNCATION:g})",
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
    parser.add_argument(
        "--out", required=True, help="a .png, .jpg or .webp for one picture or grid, a folder, or a .tar"
    )
    parser.add_argument("--format", choices=("png", "jpg", "webp"), help="of the images in a folder or tar (png)")
    parser.add_argument(
        "--quality", type=int, help=f"of .jpg and .webp, 1 to 100; WebP is lossless at 100 ({DEFAULT_QUALITY})"
    )
    parser.add_argument(
        "--shard_size", type=int, help=f"images a tar ({SHARD_SIZE} where the name has a number, as in x-%%05d.tar)"
    )
    return parser


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    configure_logging(process_index=jax.process_index())
    log_devices()
    destination = _check_flags(args)
    place, step = _split_step(args.workdir, args.step)
    # Before the model is loaded: an error in it costs little.
    prompts = [Prompt(text) for text in args.prompt]
    for file in args.prompts:
        prompts += read_prompts(file)
    check_names(prompts)
    with cli.end_by_sigterm():
        return _sample(args, destination, RunFolder.open(place), step, prompts)


def _sample(
    args: argparse.Namespace, destination: Destination, place: RunFolder, step: int | None, prompts: list[Prompt]
) -> int:
    upsampler = None
    if args.upsampler is not None:
        # Before the base model runs: an error in it costs no images.
        upsampler = Upscaler.from_pretrained(args.upsampler, text_path=args.upsampler_text_path)
        upsampler.check_noise(args.upsampler_noise)
    # A file may have many thousand prompts: eight images of each are not what is meant.
    num = args.num if args.num is not None else _NUM_OF_FILE if args.prompts else _NUM

    def make_job(config: Config) -> SampleJob:
        check_job(config, prompts)
        job = SampleJob(prompts if needs_prompts(config) else [Prompt("")], num, args.seed, bool(args.prompts))
        # A folder takes any number.
        if destination.kind == "file":
            check_grid(config, job, destination, 1 if upsampler is None else upsampler.factor)
        return job

    # Checked before the weights are read, which may take minutes.
    model = TextToImage.from_workdir(place, step=step, text_path=args.text_path, check=make_job)
    job = make_job(model.config)
    # Both outputs write them into their metadata.
    settings = SampleSettings(
        args.truncation,
        args.global_truncation,
        DEFAULT_QUALITY if args.quality is None else args.quality,
        upsampler,
        args.upsampler_noise,
    )
    report_cut_prompts(model, job)
    _log.info("%d image%s of the checkpoint of step %d", len(job), "s" if len(job) > 1 else "", model.step)
    if destination.kind == "file":
        save_picture(model, job, destination, settings)
        said = str(destination.path)
    else:
        run_job(model, job, destination, settings)
        said = f"{len(job)} images in {destination.path}"
    # All processes sample, since the model may span them; one writes.
    if jax.process_index() == 0:
        print(said)
    return 0


def _check_flags(args: argparse.Namespace) -> Destination:
    """Raises UserError for a value out of range, or flags that do not fit each other."""
    if args.num is not None and args.num < 1:
        raise UserError(f"--num={args.num}: must be at least 1")
    # Seeds are 32 bits in the latents.
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed}: must be 0 to {2**32 - 1}; for one by chance, --seed=$RANDOM")
    check_truncation("--truncation", args.truncation)
    check_truncation("--global_truncation", args.global_truncation)
    if args.upsampler is None and (args.upsampler_noise or args.upsampler_text_path):
        raise UserError("--upsampler_noise and --upsampler_text_path are of an upsampler: name it by --upsampler")
    # Raises for an address: samples are written to a disk.
    cli.local_folder(args.out)
    destination = parse_destination(args.out, args.format, args.shard_size)
    if args.quality is not None:
        if not 1 <= args.quality <= 100:
            raise UserError(f"--quality={args.quality}: must be 1 to 100")
        # Not ignored: who sets it counts on smaller files.
        if destination.ending == ".png":
            raise UserError("--quality is of .jpg and .webp: PNG is lossless; leave it out, or choose --format=jpg")
    return destination


def _split_step(workdir: str, step: int | None) -> tuple[str, int | None]:
    """The workdir and the step of RUN/checkpoints/STEP, which is understood too."""
    found = re.fullmatch(rf"(.+?)/{CHECKPOINTS_FOLDER}(?:/(\d+))?/*", workdir)
    if found is None:
        return workdir, step
    # People copy the path that the log of training shows.
    named = int(found[2]) if found[2] else step
    if step is not None and named != step:
        raise UserError(
            f"--workdir={workdir} and --step={step} name two checkpoints: write --workdir={found[1]} --step={step}"
        )
    return found[1], named


if __name__ == "__main__":
    cli.main(verb)
