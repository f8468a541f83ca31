"""Evaluators of a training run: grids of fixed prompts and seeds, and the judges of digits, shapes and emoji."""

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import SNAPSHOTS_FOLDER
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.digits import digit_captions
from gigagan_jax.data.storage import is_local
from gigagan_jax.data.transforms import resize_and_crop
from gigagan_jax.evaluation.digits import IMAGES_PER_DIGIT, DigitsJudge
from gigagan_jax.evaluation.emoji import EmojiJudge, read_cells
from gigagan_jax.evaluation.shapes import ShapesJudge
from gigagan_jax.inference.images import draw_grid, save_png, side_by_side
from gigagan_jax.inference.sampler import Sampler, prompts_and_seeds
from gigagan_jax.telemetry.metrics import MetricLogger
from gigagan_jax.training.loop import Hook, Hooks, Run
from gigagan_jax.training.state import GanState

_log = logging.getLogger(__name__)


def snapshot_hook(config: Config, sampler: Sampler, workdir: Path) -> Hook:
    """Returns a hook that draws grids of fixed prompts (rows) and seeds (columns), one grid for each truncation."""
    s = config.snapshot

    def draw_snapshot(state: GanState, kimg: float, logger: MetricLogger) -> None:
        # A grid has the same prompts and seeds in every snapshot: only the generator differs.
        pictures = []
        prompts, seeds = prompts_and_seeds(s.prompts, s.seeds, 0)
        for psi in s.truncations:
            images = sampler(state.g_ema, state.w_avg, prompts, seeds, truncation=psi)
            pictures.append(draw_grid(images.reshape(len(s.prompts), s.seeds, *images.shape[1:]), s.prompts))
        # Every process samples, since the sampler is a program of the whole mesh; one writes.
        titles = [f"{kimg:.0f} kimg, truncation {psi:g}" for psi in s.truncations]
        picture = side_by_side(pictures, titles)
        if jax.process_index() == 0:
            # Zero-padded: the names sort by time.
            path = workdir / SNAPSHOTS_FOLDER / f"{kimg:010.3f}kimg.png"
            save_png(path, picture, {"kimg": f"{kimg:.3f}", "config": config.name})
            logger.log_image("samples", int(state.step), np.asarray(picture.convert("RGB")))
            _log.info("samples: %s", path)

    return draw_snapshot


def digits_hook(config: Config, sampler: Sampler, workdir: Path) -> Hook:
    """Returns a hook that evaluates digits of fresh seeds with an SVM (digits.py), and prints and logs the metrics."""

    def judge_digits(state: GanState, kimg: float, logger: MetricLogger) -> None:
        # The judge sees real digits as training sees them.
        resize = lambda x: resize_and_crop(x, config.resolution, crop="center", filter=config.data.resize_filter)
        # Training knows several captions for a digit: they are used in turn.
        captions = [digit_captions(d)[i % len(digit_captions(d))] for d in range(10) for i in range(IMAGES_PER_DIGIT)]
        seeds = [FIRST_FRESH_SEED + i for i in range(len(captions))]
        images = sampler(state.g_ema, state.w_avg, captions, seeds)
        judged = DigitsJudge(resize).judge_images(images, np.repeat(np.arange(10), IMAGES_PER_DIGIT))
        if jax.process_index() == 0:
            figures = {"accuracy": judged.accuracy, "worst_digit_accuracy": judged.worst_digit_accuracy}
            figures |= {"variance_ratio": judged.variance_ratio, "frechet": judged.frechet}
            logger.log_scalars(int(state.step), kimg, {f"digits/{k}": v for k, v in figures.items()})
            print(judged.format_table(), flush=True)

    return judge_digits


def shapes_hook(config: Config, sampler: Sampler, workdir: Path) -> Hook:
    """Returns a hook that reads drawn shapes back from pictures of fresh seeds (shapes.py), and prints and logs the shares."""

    def judge_shapes(state: GanState, kimg: float, logger: MetricLogger) -> None:
        judge = ShapesJudge(config.data.shapes.max_objects)
        first, second = (
            sampler(state.g_ema, state.w_avg, judge.captions, [start + i for i in range(len(judge.captions))])
            for start in (FIRST_FRESH_SEED, 2 * FIRST_FRESH_SEED)
        )
        if jax.process_index() == 0:
            # Every process samples; one reads, which takes a minute.
            report = judge.judge_images(first, again=second)
            logger.log_scalars(int(state.step), kimg, {f"shapes/{k}": v for k, v in report.to_dict().items()})
            print(report.format_table(), flush=True)

    return judge_shapes


def emoji_hook(config: Config, sampler: Sampler, workdir: Path) -> Hook:
    """Returns a hook that finds the real emoji nearest to pictures of fresh seeds (emoji.py), and prints and logs the shares.

    The cells that are held out lie in the folder held_out beside that of data.path, as tools/prepare_data.py emoji writes them.
    """
    path = config.data.path
    hidden = Path(path if Path(path).is_dir() else Path(path).parent).parent / "held_out"
    # At the start: a run of hours must not end with this.
    if not path or not is_local(path) or not hidden.is_dir():
        where = f" in {hidden}" if path else ""
        raise UserError(
            f"config.evaluators: 'emoji' needs the held-out pictures{where}, beside the folder of config.data.path ({path!r}): "
            "tools/prepare_data.py emoji writes both; or set --config.evaluators=()"
        )
    train, held_out = (
        make_source(dataclasses.replace(config.data, path=where), condition=config.condition, workdir=workdir)
        for where in (path, str(hidden))
    )
    judge = EmojiJudge(read_cells(train, held_out))

    def judge_emoji(state: GanState, kimg: float, logger: MetricLogger) -> None:
        asked = np.tile(np.arange(len(judge.cells.captions)), EMOJI_IMAGES)
        captions = [judge.cells.captions[i] for i in asked]
        images = sampler(state.g_ema, state.w_avg, captions, [FIRST_FRESH_SEED + i for i in range(len(asked))])
        if jax.process_index() == 0:
            report = judge.judge_images(images, asked)
            logger.log_scalars(int(state.step), kimg, {f"emoji/{k}": v for k, v in report.to_dict().items()})
            print(report.format_table(), flush=True)

    return judge_emoji


# Far above the seeds of the snapshots.
FIRST_FRESH_SEED = 1_000_000
# Pictures of each cell that the judge of emoji sees.
EMOJI_IMAGES = 4
# Names for config.evaluators.
EVALUATORS = {"digits": digits_hook, "shapes": shapes_hook, "emoji": emoji_hook}


def make_hooks(run: Run) -> Hooks:
    """The hooks that a run's config asks for; they share one sampler, which takes the run's frozen networks."""
    config = run.config
    sampler = Sampler(config, run.mesh, frozen=lambda: run.frozen[0])
    finish = [EVALUATORS[name](config, sampler, run.workdir) for name in config.evaluators]
    return Hooks(snapshot_hook(config, sampler, run.workdir), finish)
