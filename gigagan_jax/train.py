"""Trains a model: `python -m gigagan_jax.train --config=configs/digits.py --workdir=DIR [--config.key=value] [--dry_run]`.

The same command again goes on from the newest checkpoint.
"""

import logging
import signal
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from gigagan_jax import cli, compilation, distributed, maintenance
from gigagan_jax.config import Config
from gigagan_jax.data.sources.digits import digit_captions
from gigagan_jax.data.transforms import resize_and_crop
from gigagan_jax.evaluation.digits import IMAGES_PER_DIGIT, DigitsJudge
from gigagan_jax.inference.images import grid, save_png, side_by_side
from gigagan_jax.inference.pipeline import TextToImage, rows_and_seeds
from gigagan_jax.training import dry_run, report
from gigagan_jax.training.goodput import process_began
from gigagan_jax.training.logging import MetricLogger, configure
from gigagan_jax.training.loop import Hook, Interrupted, Run
from gigagan_jax.training.profiling import parse_steps
from gigagan_jax.training.state import GanState
from gigagan_jax.training.workdir import as_begun

_log = logging.getLogger(__name__)
_FRESH_SEEDS = 1_000_000  # far from those of the snapshots


def snapshot_hook(config: Config, sampler: TextToImage, workdir: Path) -> Hook:
    """Draws the grid of fixed prompts (rows) and seeds (columns), one for each truncation, side by side."""
    s = config.snapshot

    def draw(state: GanState, kimg: float, logger: MetricLogger) -> None:
        pictures = []
        prompts, seeds = rows_and_seeds(s.prompts, s.seeds, 0)
        for psi in s.truncations:
            images = sampler(state.g_ema, state.w_avg, prompts, seeds, truncation=psi)
            pictures.append(grid(images.reshape(len(s.prompts), s.seeds, *images.shape[1:]), s.prompts))
        titles = [f"{kimg:.0f} kimg, truncation {psi:g}" for psi in s.truncations]
        picture = side_by_side(pictures, titles)
        if jax.process_index() == 0:
            path = workdir / "snapshots" / f"{kimg:010.3f}kimg.png"
            save_png(path, picture, {"kimg": f"{kimg:.3f}", "config": config.name})
            logger.image("samples", int(state.step), np.asarray(picture.convert("RGB")))
            _log.info("samples: %s", path)

    return draw


def digits_hook(config: Config, sampler: TextToImage, workdir: Path) -> Hook:
    """Judges the digits of fresh seeds by an SVM trained on real ones, and prints and logs the figures."""

    def judge(state: GanState, kimg: float, logger: MetricLogger) -> None:
        resize = lambda x: resize_and_crop(x, config.resolution, crop="center", filter=config.data.resize_filter)
        captions = [digit_captions(d)[i % len(digit_captions(d))] for d in range(10) for i in range(IMAGES_PER_DIGIT)]
        seeds = [_FRESH_SEEDS + i for i in range(len(captions))]
        images = sampler(state.g_ema, state.w_avg, captions, seeds)
        report = DigitsJudge(resize).judge(images, np.repeat(np.arange(10), IMAGES_PER_DIGIT))
        if jax.process_index() == 0:
            figures = {"accuracy": report.accuracy, "worst_digit_accuracy": report.worst_digit_accuracy}
            figures |= {"variance_ratio": report.variance_ratio, "frechet": report.frechet}
            logger.scalars(int(state.step), kimg, {f"digits/{k}": v for k, v in figures.items()})
            print(report.table(), flush=True)

    return judge


EVALUATORS = {"digits": digits_hook}


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(prog="python -m gigagan_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py[:variant]; fields by --config.key=value")
    parser.add_argument("--workdir", type=cli.local_folder, help="where the run lives; needed unless --dry_run")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="build abstractly, print sizes and shardings"
    )
    parser.add_argument("--devices", type=int, help="with --dry_run: plan for so many devices instead of those here")
    parser.add_argument("--profile_steps", default="", help="FIRST:LAST steps to take a trace of; see docs/seeing.md")
    for flags in (distributed, maintenance, compilation):
        flags.add_flags(parser)
    args, unknown = parser.parse_known_args(argv)
    if args.devices is not None and args.devices < 1:
        raise cli.UserError(f"--devices={args.devices}: must be at least 1")
    profile_steps = parse_steps(args.profile_steps) if args.profile_steps else None
    config = cli.load_config(args.config, cli.config_overrides(unknown))
    if not args.dry_run:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the profiler listens: a request must not end the process
    distributed.join(args)
    configure(process_index=jax.process_index())
    if args.dry_run:
        print(dry_run.report(config, args.devices or jax.device_count(), args.workdir))
        return 0
    if args.workdir is None:
        raise cli.UserError("--workdir=DIR is needed: the run's checkpoints, metrics and images go there")
    if args.devices:
        raise cli.UserError("--devices goes with --dry_run")
    config = as_begun(args.workdir, config)
    compilation.keep_programs(args.compilation_cache, args.workdir)
    run = Run(config, args.workdir)
    run.began = process_began()
    run.profile_steps = profile_steps
    sampler = TextToImage(config, run.mesh, frozen=lambda: run.frozen[0])
    run.snapshot = snapshot_hook(config, sampler, args.workdir)
    run.finish = [EVALUATORS[name](config, sampler, args.workdir) for name in config.evaluators]
    if jax.process_index() == 0:
        print(dry_run.summary(run.networks, run.mesh), flush=True)
    try:
        with (
            report.at_the_end(args.workdir, enabled=jax.process_index() == 0),
            maintenance.watch(args.maintenance_url),
            distributed.steps_timed(args.stall_seconds),
        ):
            run.train()
    except Interrupted as e:
        _log.info("%s; run the same command again to go on", e)
        code = cli.RESTART if e.number == signal.SIGTERM else cli.INTERRUPTED
        if not e.agreed:
            distributed.fail(f"{e} while it was not training", code)
            distributed.leave(code)
        return code
    return 0


if __name__ == "__main__":
    cli.main(verb)
