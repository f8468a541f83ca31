"""Hooks of a training run: grids of fixed prompts and seeds, and the judges of its evaluators."""

import logging

import jax
import numpy as np

from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.config import Config, needs_prompts
from gigagan_jax.core.workdir_files import SNAPSHOTS_FOLDER
from gigagan_jax.evaluation.judges import Judge, make_judge
from gigagan_jax.evaluation.upsampler_snapshots import make_snapshot_hook
from gigagan_jax.inference.images import draw_grid, save_png, side_by_side
from gigagan_jax.inference.sampler import Sampler, prompts_and_seeds
from gigagan_jax.telemetry.metrics import MetricLogger
from gigagan_jax.training.loop import Hook, Hooks, Run
from gigagan_jax.training.state import GanState

_log = logging.getLogger(__name__)

_UNCONDITIONAL_ROWS = 8


def snapshot_hook(config: Config, sampler: Sampler, place: RunFolder) -> Hook:
    """Returns a hook that draws grids of fixed prompts (rows) and seeds (columns), one grid for each truncation."""
    s = config.snapshot
    # Without a condition a grid of one prompt: rows are further seeds, as many as columns, up to eight.
    rows = len(s.prompts) if needs_prompts(config) else min(s.seeds, _UNCONDITIONAL_ROWS)
    labels = s.prompts if needs_prompts(config) else None
    prompts, seeds = prompts_and_seeds(s.prompts, s.seeds * rows // len(s.prompts), 0)

    def draw_snapshot(state: GanState, kimg: float, logger: MetricLogger) -> None:
        # A grid has the same prompts and seeds in every snapshot: only the generator differs.
        pictures = []
        for psi in s.truncations:
            images = sampler(state.g_ema, state.w_avg, prompts, seeds, truncation=psi)
            pictures.append(draw_grid(images.reshape(rows, s.seeds, *images.shape[1:]), labels))
        # Every process samples, since the sampler is a program of the whole mesh; one writes.
        titles = [f"{kimg:.0f} kimg, truncation {psi:g}" for psi in s.truncations]
        picture = side_by_side(pictures, titles)
        if jax.process_index() == 0:
            # Zero-padded: the names sort by time.
            path = place.folder / SNAPSHOTS_FOLDER / f"{kimg:010.3f}kimg.png"
            save_png(path, picture, {"kimg": f"{kimg:.3f}", "config": config.name})
            logger.log_image("samples", int(state.step), np.asarray(picture.convert("RGB")))
            _log.info("samples: %s", place.show(path))

    return draw_snapshot


def judge_hook(judge: Judge, sampler: Sampler) -> Hook:
    """Returns a hook that lets a judge (judges.py) see pictures of its captions, and prints and logs its figures."""

    def judge_pictures(state: GanState, kimg: float, logger: MetricLogger) -> None:
        draws = [sampler(state.g_ema, state.w_avg, judge.captions, judge.seeds(k)) for k in range(judge.draws)]
        # Every process samples, since the sampler is a program of the whole mesh; one judges.
        if jax.process_index() == 0:
            figures, table = judge.verdict(draws)
            logger.log_scalars(int(state.step), kimg, {f"{judge.name}/{k}": v for k, v in figures.items()})
            print(table, flush=True)

    return judge_pictures


def make_hooks(run: Run) -> Hooks:
    """The hooks that a run's config asks for; they share one sampler, which takes the run's frozen networks."""
    config = run.config
    if config.is_upsampler:
        return Hooks(make_snapshot_hook(run))
    sampler = Sampler(config, run.mesh, frozen=lambda: run.frozen[0])
    # Judges are made at the start: a run of hours must not end with pictures that they lack.
    finish = [judge_hook(make_judge(name, config, run.workdir), sampler) for name in config.evaluators]
    return Hooks(snapshot_hook(config, sampler, run.place), finish)
