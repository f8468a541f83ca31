"""The judges of `config.evaluators`: captions to draw, and what the pictures of them are worth."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.digits import digit_captions
from gigagan_jax.data.storage import is_local
from gigagan_jax.data.transforms import resize_and_crop
from gigagan_jax.evaluation.digits import IMAGES_PER_DIGIT, DigitsJudge
from gigagan_jax.evaluation.emoji import EmojiJudge, read_cells
from gigagan_jax.evaluation.shapes import ShapesJudge

# Far above the seeds of the snapshots.
_FIRST_FRESH_SEED = 1_000_000
# Pictures of each cell that the judge of emoji sees.
_IMAGES_PER_CELL = 4


@dataclasses.dataclass(frozen=True)
class Judge:
    """What an evaluator asks for, and its verdict.

    Attributes:
      name: of the evaluator; metrics are `NAME/figure`.
      captions: one a picture.
      draws: sets of pictures, each with seeds of its own.
      verdict: sets of uint8 [N, R, R, 3] -> (figures, table for people).
    """

    name: str
    captions: Sequence[str]
    draws: int
    verdict: Callable[[Sequence[np.ndarray]], tuple[dict[str, float], str]]

    def seeds(self, draw: int = 0) -> list[int]:
        """One for each caption; no two draws share any."""
        return [(draw + 1) * _FIRST_FRESH_SEED + i for i in range(len(self.captions))]

    def evaluate(self, sample: Callable[[Sequence[str], Sequence[int]], np.ndarray]) -> dict[str, float]:
        """The figures of a model that draws captions with seeds."""
        return self.verdict([sample(self.captions, self.seeds(draw)) for draw in range(self.draws)])[0]


def make_judge(name: str, config: Config, workdir: Path | None = None) -> Judge:
    """The judge of an evaluator.

    Args:
      name: of JUDGES.
      config: of the run.
      workdir: takes the index of tars that lie where it cannot be written.

    Raises:
      UserError: the judge's pictures are missing or damaged.
    """
    return JUDGES[name](config, workdir)


def _digits(config: Config, workdir: Path | None) -> Judge:
    # Training knows several captions for a digit: they are used in turn.
    captions = [digit_captions(d)[i % len(digit_captions(d))] for d in range(10) for i in range(IMAGES_PER_DIGIT)]
    # The judge sees real digits as training sees them.
    resize = lambda x: resize_and_crop(x, config.resolution, crop="center", filter=config.data.resize_filter)
    # Fitted when it is first needed: a run's start does not wait for scikit-learn.
    fitted = functools.cache(lambda: DigitsJudge(resize))

    def verdict(draws: Sequence[np.ndarray]) -> tuple[dict[str, float], str]:
        report = fitted().judge_images(draws[0], np.repeat(np.arange(10), IMAGES_PER_DIGIT))
        figures = {"accuracy": report.accuracy, "worst_digit_accuracy": report.worst_digit_accuracy}
        figures |= {"variance_ratio": report.variance_ratio, "frechet": report.frechet}
        return figures, report.format_table()

    return Judge("digits", captions, 1, verdict)


def _shapes(config: Config, workdir: Path | None) -> Judge:
    judge = ShapesJudge(config.data.shapes.max_objects)

    def verdict(draws: Sequence[np.ndarray]) -> tuple[dict[str, float], str]:
        report = judge.judge_images(draws[0], again=draws[1])
        return report.to_dict(), report.format_table()

    return Judge("shapes", judge.captions, 2, verdict)


def _emoji(config: Config, workdir: Path | None) -> Judge:
    # The cells that are held out lie beside the others, as tools/prepare_data.py emoji writes them.
    path = config.data.path
    hidden = Path(path if Path(path).is_dir() else Path(path).parent).parent / "held_out"
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
    asked = np.tile(np.arange(len(judge.cells.captions)), _IMAGES_PER_CELL)

    def verdict(draws: Sequence[np.ndarray]) -> tuple[dict[str, float], str]:
        report = judge.judge_images(draws[0], asked)
        return report.to_dict(), report.format_table()

    return Judge("emoji", [judge.cells.captions[i] for i in asked], 1, verdict)


# Names for config.evaluators.
JUDGES = {"digits": _digits, "shapes": _shapes, "emoji": _emoji}
