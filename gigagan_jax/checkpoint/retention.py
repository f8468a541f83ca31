"""Which checkpoints of a run are kept: the newest, one of every so many images for ever, and the best by a metric."""

import dataclasses
import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.config import CheckpointConfig
from gigagan_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Made:
    """What is known of a checkpoint.

    step: of the run
    images: real images seen; None where that cannot be read
    metric: `best_metric` at that step; None where there is none
    """

    step: int
    images: int | None
    metric: float | None = None


def kept(made: Sequence[Made], settings: CheckpointConfig) -> set[int]:
    """Steps of the checkpoints that stay; the others are to be removed. What cannot be read stays.

    The same with every call: one that was kept as the first of its stretch of images is still its first later on.
    """
    made = sorted(made, key=lambda m: m.step)
    stay = {m.step for m in made[-settings.keep :]} | {m.step for m in made if m.images is None}
    if settings.keep_every_kimg:
        seen = {0}  # before the first multiple there is nothing to keep for ever
        for m in made:
            stretch = 0 if m.images is None else int(m.images // round(settings.keep_every_kimg * 1000))
            if stretch not in seen:
                seen.add(stretch)
                stay.add(m.step)
    if settings.keep_best:
        sign = 1 if settings.best_mode == "max" else -1
        judged = [(sign * m.metric, m.step) for m in made if m.metric is not None and math.isfinite(m.metric)]
        stay |= {step for _, step in sorted(judged)[-settings.keep_best :]}
    return stay


class Retention:
    """`kept` as a preservation policy of Orbax.

    Args:
      folder: of the checkpoints; each says in its item `measured` what it is judged by.
      settings: of the run.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig):
        self._folder, self._settings = folder, settings
        self._made: dict[int, Made] = {}

    def note(self, step: int, measured: Mapping[str, Any]) -> None:
        """Takes note of a checkpoint that is being written."""
        self._made[step] = self._judge(step, measured)

    def check(self, metrics: Collection[str]) -> None:
        """Raises UserError where `best_metric` is not among the metrics of the run."""
        name = self._settings.best_metric
        if self._settings.keep_best and name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=3, cutoff=0.3)
            raise UserError(
                f"config.checkpoint.best_metric={name!r} is no metric of this run"
                f"{': did you mean ' + ' or '.join(near) + '?' if near else ''}; metrics.jsonl has all of them"
            )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question."""
        stay = kept([self._read(c.step) for c in checkpoints], self._settings)
        return [c.step in stay for c in checkpoints]

    def _read(self, step: int) -> Made:
        if step not in self._made:
            try:
                text = (self._folder / str(step) / "measured" / "metadata").read_text(encoding="utf-8")
                self._made[step] = self._judge(step, json.loads(text))
            except FileNotFoundError:
                self._made[step] = Made(step, 0)  # written before there was such a choice: the newest are kept
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return Made(step, None)
        return self._made[step]

    def _judge(self, step: int, measured: Mapping[str, Any]) -> Made:
        metric = measured["metrics"].get(self._settings.best_metric)
        return Made(step, int(measured["images"]), None if metric is None else float(metric))
