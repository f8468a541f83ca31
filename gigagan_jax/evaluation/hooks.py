"""Hooks of the training loop that draw and judge samples: grids of fixed prompts, and the digits' judge."""

import logging
from pathlib import Path

import jax
import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.data.sources.digits import digit_captions
from gigagan_jax.data.transforms import resize_and_crop
from gigagan_jax.evaluation.digits import IMAGES_PER_DIGIT, DigitsJudge
from gigagan_jax.inference.images import grid, save_png, side_by_side
from gigagan_jax.inference.text_to_image import TextToImage, rows_and_seeds
from gigagan_jax.telemetry.metrics import MetricLogger
from gigagan_jax.training.loop import Hook
from gigagan_jax.training.state import GanState

_log = logging.getLogger(__name__)


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
        judged = DigitsJudge(resize).judge(images, np.repeat(np.arange(10), IMAGES_PER_DIGIT))
        if jax.process_index() == 0:
            figures = {"accuracy": judged.accuracy, "worst_digit_accuracy": judged.worst_digit_accuracy}
            figures |= {"variance_ratio": judged.variance_ratio, "frechet": judged.frechet}
            logger.scalars(int(state.step), kimg, {f"digits/{k}": v for k, v in figures.items()})
            print(judged.table(), flush=True)

    return judge


_FRESH_SEEDS = 1_000_000  # far from those of the snapshots
EVALUATORS = {"digits": digits_hook}
