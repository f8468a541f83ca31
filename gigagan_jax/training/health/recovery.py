"""Acts on the findings of the health monitor: logs and reports them, stops the run, or rolls it back to a checkpoint."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import HEALTH_REPORT_FILE
from gigagan_jax.data.pipeline import Pipeline
from gigagan_jax.data.sampling import with_new_order
from gigagan_jax.parallel import communication
from gigagan_jax.telemetry.metrics import MetricLogger
from gigagan_jax.training.health.memory_growth import MemoryGrowth
from gigagan_jax.training.health.monitor import Finding, HealthMonitor
from gigagan_jax.training.health.step_statistics import HealthVector, StepStatistics
from gigagan_jax.training.state import GanState

_log = logging.getLogger(__name__)


class HealthGuard:
    """Observes the steps of a run, and rolls the run back if the monitor demands it.

    Args:
      config: config of the run.
      health_vector: layout of the statistics of a step.
      workdir: workdir of the run, which gets the report.
      data: the run's stream; without a checkpoint a rollback returns to its present position.

    Attributes:
      monitor: judges the steps.
      rollback: the finding that demands a rollback; None without one.
    """

    def __init__(self, config: Config, health_vector: HealthVector, workdir: Path, data: Pipeline):
        self.config, self.health_vector, self.workdir, self.data = config, health_vector, workdir, data
        self.monitor = HealthMonitor(config, health_vector.measures)
        self.rollback: Finding | None = None
        # Not in a checkpoint: a process that starts again has its memory back.
        self._memory = MemoryGrowth()
        # Position of the data at step 0 of a run without checkpoints.
        self._origin = data.state()
        self._reading: StepStatistics | None = None

    def checkpoint_position(self) -> dict[str, Any]:
        """Returns the state of data and monitor, which a checkpoint holds beside the train state."""
        return self.data.state() | {"health": self.monitor.state()}

    def log_values(self) -> dict[str, float]:
        """Returns the entries that the last observed step adds to a line of metrics."""
        return self.monitor.log_values() | ({} if self._reading is None else self._reading.measures())

    def observe(self, step: int, images: int, metrics: Mapping[str, jax.Array]) -> None:
        """Judges a step, and waits until its statistics are on the host.

        Args:
          step, images: numbers of steps and images, this step included
          metrics: metrics of the step, with "health"

        Raises:
          UserError: the policy is to stop.
        """
        # Steps after the finding were dispatched before it was known; the rollback discards them.
        if self.rollback is not None:
            return
        self._reading = self.health_vector.read(metrics["health"])
        # `images` counts this batch too: its row 0 is this example of the stream.
        first = images - self.config.batch_size
        losses = lambda: {k: float(v) for k, v in metrics.items() if k != "health"}
        found = self.monitor.observe(
            step, images, self._reading, losses, lambda row: self.data.example_name(first + row)
        )
        for finding in found:
            self._log_finding(finding)
            # The loop owns the state, and calls `roll_back`.
            if finding.action == "rollback":
                self.rollback = finding
        stop = next((f for f in found if f.action == "stop"), None)
        if found:
            self._write_report(stop)
        if stop is not None:
            self._raise_stop(stop)

    def observe_memory(self, step: int, images: int, gib: float, seconds: float) -> None:
        """Judges the memory of this process and its workers; never more than a warning.

        Args:
          step, images: numbers of steps and images
          gib: memory in GiB
          seconds: on a clock that does not go back
        """
        if self.config.health.memory == "off" or not self._memory.add_reading(gib, seconds):
            return
        self._log_finding(self.monitor.observe_memory(step, images, gib, self._memory.baseline or 0.0))
        self._write_report(None)

    def _log_finding(self, finding: Finding) -> None:
        message = f"step {finding.step} ({finding.kimg:.1f} kimg), {finding.name}: {finding.text}"
        _log.warning("health: %s [%s]", message, finding.action)

    def roll_back(
        self,
        state: GanState,
        checkpoints: Checkpoints,
        logger: MetricLogger,
        abstract: GanState,
        init: Callable[[], GanState],
    ) -> tuple[GanState, int]:
        """Restores the last checkpoint before the first sign of the finding, or the initial state without any checkpoint.

        From there on the data come in another order, and the learning rates are lower: an exact repetition would fail again.

        Args:
          state: state that is discarded; its memory is freed
          checkpoints: checkpoints of the run; those after the first sign are deleted
          logger: drops the lines of the discarded steps
          abstract: the state as ShapeDtypeStructs with shardings
          init: returns the initial state

        Returns:
          (state, step)

        Raises:
          UserError: all checkpoints were written after the first sign.
        """
        finding = self.rollback
        assert finding is not None
        # A save in progress may be the newest checkpoint.
        checkpoints.wait_until_finished()
        # Called for its effect: it moves damaged checkpoints aside.
        checkpoints.latest_valid_step()
        # All processes use the list of process 0: a network disk may show them different ones.
        steps, later = communication.broadcast_from_main(checkpoints.all_steps()), []
        # A step that is not finite is never applied: for that finding every checkpoint is good.
        while finding.name != "nonfinite" and steps:
            if self.monitor.precedes_finding(checkpoints.data_position(steps[-1]).get("health"), finding):
                break
            later.append(steps.pop())
        # Nothing is deleted before this: a run that cannot go back keeps its checkpoints.
        if later and not steps:
            self._write_report(finding)
            self._raise_stop(finding, " (there is no checkpoint from before it)")
        for step in later:
            _log.warning("health: removing checkpoint %d, written after the run went wrong", step)
            checkpoints.delete_step(step)
        # Steps in flight still read the buffers.
        jax.block_until_ready(state)
        # Freed before the restore: device memory may not hold two states.
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        restored = checkpoints.restore_latest_valid(abstract)
        step, state, position = (0, init(), self._origin) if restored is None else restored
        self.monitor.restore_after_rollback(position.get("health"))
        # Numbered by the rollback: each one gets an order that was not tried before.
        self.data.restore(with_new_order(position, self.monitor.rollbacks))
        logger.rewind_to(step)
        self.rollback, self._reading = None, None
        self._write_report(None)
        _log.warning(
            "health: back at %s, rollback %d of at most %d: learning rates x %g, another order of the data",
            f"checkpoint {step}" if step else "the start (there was no checkpoint)",
            self.monitor.rollbacks,
            self.config.health.max_rollbacks,
            self.monitor.lr_scale,
        )
        return state, step

    def _raise_stop(self, finding: Finding, why: str = "") -> None:
        done = f"{self.monitor.skipped} skipped, {self.monitor.rollbacks} rollbacks"
        raise UserError(
            f"training stopped at step {finding.step} ({finding.kimg:.1f} kimg), {finding.name} in {finding.module}{why}: "
            f"{finding.text}. So far {done}; see {self.workdir / HEALTH_REPORT_FILE}"
        )

    def _write_report(self, stopped: Finding | None) -> None:
        """Writes the findings and actions so far to the report."""
        # All processes have the same findings.
        if jax.process_index() != 0:
            return
        findings = [dataclasses.asdict(f) for f in self.monitor.findings]
        report = {
            "run": self.config.name,
            "stopped": None if stopped is None else dataclasses.asdict(stopped),
            "skipped": self.monitor.skipped,
            "rollbacks": self.monitor.rollbacks,
            "lr_scale": self.monitor.lr_scale,
            "findings": findings,
        }
        # Replaced whole: users and tools read it while the run continues.
        temporary = self.workdir / f"{HEALTH_REPORT_FILE}.tmp"
        try:
            temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
            os.replace(temporary, self.workdir / HEALTH_REPORT_FILE)
        # A full disk must not end a healthy run.
        except OSError as e:
            _log.warning("health: cannot write %s: %s", self.workdir / HEALTH_REPORT_FILE, e.strerror or e)
