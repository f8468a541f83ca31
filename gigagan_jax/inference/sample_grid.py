"""Samples in one file: a picture by itself, or a grid of prompts and seeds."""

from __future__ import annotations

import math

import jax
import numpy as np

from gigagan_jax.config import Config, needs_prompts
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.inference.image_encoding import ENDINGS, LONGEST_SIDE, save_image
from gigagan_jax.inference.images import GRID_BACKGROUND, draw_grid, lay_out_grid
from gigagan_jax.inference.sample_job import SampleJob, SampleSettings, make_batches
from gigagan_jax.inference.sample_outputs import Destination
from gigagan_jax.inference.text_to_image import TextToImage

# 200 MB in memory; a PNG of photographs takes half of it.
_MOST_PIXELS = 2**26
# Images in a row of a grid without prompts, at least.
_COLUMNS = 8


def check_grid(config: Config, job: SampleJob, destination: Destination, factor: int = 1) -> None:
    """Checks that one file can hold the images, before they are made.

    Args:
      config: of the model.
      job: the images.
      destination: of kind "file".
      factor: by which an upsampler enlarges them.

    Raises:
      UserError: the grid is too large.
    """
    rows, cols = _shape(config, job)
    side = config.resolution * factor
    if len(job) == 1:
        width = height = side
    else:
        # Labels of a few: the widest of many thousands takes long to find, and those are refused for their height.
        labels = [p.text for p in job.prompts[:1000]] if needs_prompts(config) else None
        layout = lay_out_grid(rows, cols, side, side, labels)
        width, height = layout.width, layout.height
    # Before the images are made: the encoder would refuse them, or the memory be used up, after the work.
    limit = LONGEST_SIDE[ENDINGS[destination.ending]]
    if max(width, height) > limit or width * height > _MOST_PIXELS:
        why = f"{destination.ending} holds {limit} a side" if max(width, height) > limit else "too many for one picture"
        raise UserError(
            f"--out={destination.path}: a grid of {len(job)} images would have {width} x {height} pixels, {why}; name a folder, "
            "which gets a file an image, or ask for fewer"
        )


def _shape(config: Config, job: SampleJob) -> tuple[int, int]:
    """(rows, columns) of the grid: a row a prompt; without prompts about a square."""
    if needs_prompts(config):
        return len(job.prompts), job.num
    cols = min(len(job), max(_COLUMNS, math.ceil(math.sqrt(len(job)))))
    return math.ceil(len(job) / cols), cols


def save_picture(model: TextToImage, job: SampleJob, destination: Destination, settings: SampleSettings) -> None:
    """Samples a job into one file: one image is the picture itself, several are a grid.

    Args:
      model: makes the images. With several processes each of them calls this; process 0 writes.
      job: the images; `check_grid` was called with them.
      destination: of kind "file".
      settings: the rest.

    Raises:
      UserError: the file cannot be written.
    """
    samples = list(job)
    full = len(job) > model.sampler.fewest
    # All in memory: `check_grid` has bounded them.
    progress, batches = ProgressBar("sampling", len(samples), " images", quiet=jax.process_index() != 0), []
    for batch in make_batches(model, samples, settings, full):
        batches.append(batch)
        progress.step(len(batch))
    images = np.concatenate(batches)
    if jax.process_index() != 0:
        return
    about = settings.describe(model)
    if needs_prompts(model.config):
        about["prompt"] = "\n".join(p.text for p in job.prompts)
    seeds = [s.seed for s in samples]
    # The seeds of a row, where all rows have the same.
    row = seeds[: job.num]
    alike = row == list(range(row[0], row[0] + job.num)) and seeds == row * len(job.prompts)
    about["seed"] = f"{row[0]}..{row[-1]}" if alike and job.num > 1 else ",".join(map(str, seeds))
    if len(samples) == 1:
        save_image(destination.path, images[0], about, settings.quality)
        return
    rows, cols = _shape(model.config, job)
    # The last row may have gaps.
    gaps = np.broadcast_to(np.array(GRID_BACKGROUND, np.uint8), (rows * cols - len(images), *images.shape[1:]))
    cells = np.concatenate([images, gaps]).reshape(rows, cols, *images.shape[1:])
    labels = [p.text for p in job.prompts] if needs_prompts(model.config) else None
    save_image(destination.path, draw_grid(cells, labels), about, settings.quality)
