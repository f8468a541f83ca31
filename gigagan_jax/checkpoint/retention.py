"""Retention of checkpoints: the newest, one per `keep_every_kimg` of images, and the best by a metric."""

import dataclasses
import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gigagan_jax.checkpoint.step_folders import StepFolders
from gigagan_jax.config import CheckpointConfig
from gigagan_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """The values by which a checkpoint is kept or deleted.

    step: step of the run
    images: number of real images seen; None if it cannot be read
    metric: `best_metric` at that step; None without one
    """

    step: int
    images: int | None
    metric: float | None = None


def checkpoints_to_keep(infos: Sequence[CheckpointInfo], settings: CheckpointConfig) -> set[int]:
    """Returns the steps of the checkpoints to keep; the caller deletes the others.

    The choice is stable: a checkpoint that is the first of its interval of images stays the first in every later call.
    """
    infos = sorted(infos, key=lambda m: m.step)
    # An unreadable checkpoint stays: its file system may only be away for a moment.
    kept = {m.step for m in infos[-settings.keep :]} | {m.step for m in infos if m.images is None}
    if settings.keep_every_kimg:
        # Interval 0 ends at the first multiple: before it there is nothing to keep forever.
        seen_intervals = {0}
        for m in infos:
            # Rounded down: the first checkpoint at or after a multiple is the one that stays.
            interval = 0 if m.images is None else int(m.images // round(settings.keep_every_kimg * 1000))
            if interval not in seen_intervals:
                seen_intervals.add(interval)
                kept.add(m.step)
    if settings.keep_best:
        sign = 1 if settings.best_mode == "max" else -1
        # NaN compares with nothing and would make the sort arbitrary.
        ranked = [(sign * m.metric, m.step) for m in infos if m.metric is not None and math.isfinite(m.metric)]
        kept |= {step for _, step in sorted(ranked)[-settings.keep_best :]}
    return kept


class Retention:
    """`checkpoints_to_keep` as a preservation policy of Orbax.

    Args:
      steps: the checkpoints; their item `measured` holds images and metrics.
      settings: checkpoint settings of the run.
    """

    def __init__(self, steps: StepFolders, settings: CheckpointConfig):
        self._steps, self._settings = steps, settings
        self._infos: dict[int, CheckpointInfo] = {}

    def record_checkpoint(self, step: int, measured: Mapping[str, Any]) -> None:
        """Records a checkpoint that is being written."""
        # Orbax asks for the decision before the new checkpoint can be read.
        self._infos[step] = self._make_info(step, measured)

    def check_metric(self, metrics: Collection[str]) -> None:
        """Raises UserError if `best_metric` is not among the metrics of the run."""
        name = self._settings.best_metric
        # A misspelled name would silently keep no best checkpoint.
        if self._settings.keep_best and name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=3, cutoff=0.3)
            raise UserError(
                f"config.checkpoint.best_metric={name!r} is no metric of this run"
                f"{': did you mean ' + ' or '.join(near) + '?' if near else ''}; metrics.jsonl has all of them"
            )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Implements Orbax's PreservationPolicy."""
        kept = checkpoints_to_keep([self._read_info(c.step) for c in checkpoints], self._settings)
        return [c.step in kept for c in checkpoints]

    def steps_to_delete(self, steps: Collection[int]) -> list[int]:
        """Of all checkpoints, those that no rule keeps."""
        kept = checkpoints_to_keep([self._read_info(step) for step in set(steps)], self._settings)
        return sorted(set(steps) - kept)

    def _read_info(self, step: int) -> CheckpointInfo:
        if step not in self._infos:
            # JsonSave writes one file; reading it directly avoids a restore by Orbax.
            try:
                text = self._steps.read_text(step, "measured/metadata")
                self._infos[step] = self._make_info(step, json.loads(text))
            except FileNotFoundError:
                # Earlier versions wrote no such item: only the newest of those checkpoints are kept.
                self._infos[step] = CheckpointInfo(step, 0)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
                # Not cached: the next call may be able to read it.
                return CheckpointInfo(step, None)
        return self._infos[step]

    def _make_info(self, step: int, measured: Mapping[str, Any]) -> CheckpointInfo:
        metric = measured["metrics"].get(self._settings.best_metric)
        return CheckpointInfo(step, int(measured["images"]), None if metric is None else float(metric))
