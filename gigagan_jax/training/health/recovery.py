"""What is done about the findings of health.py: said, written down, and where it must be, back to the last good checkpoint."""

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
from gigagan_jax.data.pipeline import Pipeline
from gigagan_jax.data.sampling import reordered
from gigagan_jax.parallel import communication
from gigagan_jax.telemetry.metrics import MetricLogger
from gigagan_jax.training.health.monitor import Finding, HealthMonitor
from gigagan_jax.training.health.step_statistics import Probe, Reading
from gigagan_jax.training.state import GanState

_log = logging.getLogger(__name__)

REPORT_FILE = "health_report.json"


class Guard:
    """Watches a run for its loop.

    Args:
      config: of the run.
      probe: of its steps.
      workdir: gets the report.
      data: the run's stream; where it stands now is where the run starts without a checkpoint.

    Attributes:
      monitor: the judge.
      rollback: the finding for which the run must go back; None for none.
    """

    def __init__(self, config: Config, probe: Probe, workdir: Path, data: Pipeline):
        self.config, self.probe, self.workdir, self.data = config, probe, workdir, data
        self.monitor = HealthMonitor(config, probe.measures)
        self.rollback: Finding | None = None
        self._origin = data.state()
        self._reading: Reading | None = None

    def position(self) -> dict[str, Any]:
        """Where data and judgement stand: what a checkpoint holds beside the train state."""
        return self.data.state() | {"health": self.monitor.state()}

    def values(self) -> dict[str, float]:
        """What the last step that was looked at adds to a line of metrics."""
        return self.monitor.logged() | ({} if self._reading is None else self._reading.measures())

    def look(self, step: int, images: int, metrics: Mapping[str, jax.Array]) -> None:
        """Judges a step, waiting until it is done.

        Args:
          step, images: taken and seen with it
          metrics: its own, with "health"

        Raises:
          UserError: the policy is to stop.
        """
        if self.rollback is not None:
            return  # of steps that will be taken back
        self._reading = self.probe.read(metrics["health"])
        first = images - self.config.batch_size
        losses = lambda: {k: float(v) for k, v in metrics.items() if k != "health"}
        found = self.monitor.observe(step, images, self._reading, losses, lambda row: self.data.name(first + row))
        for finding in found:
            said = f"step {step} ({finding.kimg:.1f} kimg), {finding.name}: {finding.text}"
            _log.warning("health: %s [%s]", said, finding.action)
            if finding.action == "rollback":
                self.rollback = finding
        stop = next((f for f in found if f.action == "stop"), None)
        if found:
            self._report(stop)
        if stop is not None:
            self._stop(stop)

    def go_back(
        self,
        state: GanState,
        checkpoints: Checkpoints,
        logger: MetricLogger,
        abstract: GanState,
        init: Callable[[], GanState],
    ) -> tuple[GanState, int]:
        """(state, step) of the last good checkpoint, or of the start where none was written; from there on data come in
        another order, and the learning rates are lower.

        Args:
          state: what is given up; its memory is freed
          checkpoints: of the run; those written since it went wrong are deleted
          logger: forgets the lines of steps that are taken back
          abstract: the state as ShapeDtypeStructs with shardings
          init: makes the initial state

        Raises:
          UserError: all checkpoints were written after it went wrong.
        """
        finding = self.rollback
        assert finding is not None
        checkpoints.wait()
        checkpoints.newest()  # puts damaged ones aside
        # All go by the list of process 0: a network disk may show another one elsewhere.
        steps, later = communication.from_zero(checkpoints.steps()), []
        # What is not finite never reaches a checkpoint: for that, each of them is good.
        while finding.name != "nonfinite" and steps:
            if self.monitor.good(checkpoints.position(steps[-1]).get("health"), finding):
                break
            later.append(steps.pop())
        if later and not steps:
            self._report(finding)
            self._stop(finding, " (there is no checkpoint from before it)")
        for step in later:
            _log.warning("health: removing checkpoint %d, written after the run went wrong", step)
            checkpoints.remove(step)
        jax.block_until_ready(state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # two states might not fit
        restored = checkpoints.restore_newest(abstract)
        step, state, position = (0, init(), self._origin) if restored is None else restored
        self.monitor.went_back(position.get("health"))
        self.data.restore(reordered(position, self.monitor.rollbacks))
        logger.rewind(step)
        self.rollback, self._reading = None, None
        self._report(None)
        _log.warning(
            "health: back at %s, rollback %d of at most %d: learning rates x %g, another order of the data",
            f"checkpoint {step}" if step else "the start (there was no checkpoint)",
            self.monitor.rollbacks,
            self.config.health.max_rollbacks,
            self.monitor.lr_scale,
        )
        return state, step

    def _stop(self, finding: Finding, why: str = "") -> None:
        done = f"{self.monitor.skipped} skipped, {self.monitor.rollbacks} rollbacks"
        raise UserError(
            f"training stopped at step {finding.step} ({finding.kimg:.1f} kimg), {finding.name} in {finding.module}{why}: "
            f"{finding.text}. So far {done}; see {self.workdir / REPORT_FILE}"
        )

    def _report(self, stopped: Finding | None) -> None:
        """Writes down what was found and done so far."""
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
        temporary = self.workdir / f"{REPORT_FILE}.tmp"
        try:
            temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
            os.replace(temporary, self.workdir / REPORT_FILE)
        except OSError as e:
            _log.warning("health: cannot write %s: %s", self.workdir / REPORT_FILE, e.strerror or e)
