"""Judges the health of a GAN in training, on the host, from the statistics of each step (docs/health.md).

All processes see the same numbers and use no clock, and therefore reach the same decisions. The state of the monitor is
part of each checkpoint.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gigagan_jax.config import Config
from gigagan_jax.training.health.drift import DriftMeter
from gigagan_jax.training.health.limits import CURES, R1_RATIO, make_limits, measure_r1_ratio
from gigagan_jax.training.health.step_statistics import MARK, StepStatistics

# R1 is compared with the median of its last values: a mean would follow the spike that it must detect.
_PENALTY_WINDOW = 32
_MIN_PENALTIES = 8
# Findings in the report and in a checkpoint.
_MAX_FINDINGS = 100
_INPUT_NAMES = {
    "image": "image",
    "features": "caption embedding (features)",
    "clip_text": "caption embedding (clip_text)",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem of the training, and the action taken.

    step, kimg: time of the detection
    name: "nonfinite", "saturation", "evasion", "drift", "penalty", "collapse", "levels", "updates" or "memory"
    module: location: a module of a network, an input, a loss or a measure
    value, threshold: the measured value and its limit; None without such a number
    action: "warn", "skip", "rollback" or "stop"
    text: the finding as a message
    """

    step: int
    kimg: float
    name: str
    module: str
    value: float | None
    threshold: float | None
    action: str
    text: str


class HealthMonitor:
    """Judges the steps of a run in order.

    Args:
      config: config of the run; `config.health` holds the limits and the policies.
      measures: names of the measures of a step (`HealthVector.measures`).

    Attributes:
      lr_scale: factor of all learning rates.
      skipped: number of steps of the run that were not applied, or only by half.
      rollbacks: number of times that the run returned to a checkpoint.
      findings: the newest findings, oldest first.
    """

    def __init__(self, config: Config, measures: Sequence[str]):
        self.config, self.limits = config, make_limits(config, measures)
        self.lr_scale, self.skipped, self.rollbacks = 1.0, 0, 0
        self.findings: list[Finding] = []
        # Skipped steps since the last applied one.
        self._in_a_row = 0
        # Running mean of each measure, and the number of its values up to the window.
        self._means: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        # Consecutive steps with a mean beyond its limit, by "finding:measure".
        self._held: dict[str, int] = {}
        self._penalties: list[float] = []
        # By network.
        self._drift: dict[str, DriftMeter] = {}

    # ---------------------------------------------------------------- checkpoint

    def state(self) -> dict[str, Any]:
        """Returns the state of the monitor as JSON values."""
        return {
            "lr_scale": self.lr_scale,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "in_a_row": self._in_a_row,
            "means": dict(self._means),
            "counts": dict(self._counts),
            "held": dict(self._held),
            "penalties": list(self._penalties),
            "drift": {net: meter.state() for net, meter in self._drift.items()},
            "findings": [dataclasses.asdict(f) for f in self.findings],
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Restores `state`; None resets the monitor."""
        # A checkpoint of an earlier version lacks the state or some of its entries.
        fresh = HealthMonitor(self.config, ())
        state = fresh.state() | dict(state or {})
        self.lr_scale, self.skipped = float(state["lr_scale"]), int(state["skipped"])
        self.rollbacks, self._in_a_row = int(state["rollbacks"]), int(state["in_a_row"])
        self._means, self._counts, self._held = (dict(state[k]) for k in ("means", "counts", "held"))
        self._penalties = list(state["penalties"])
        self._drift = {net: self._make_meter(of_net) for net, of_net in state["drift"].items()}
        self.findings = [Finding(**f) for f in state["findings"]]

    def restore_after_rollback(self, state: Mapping[str, Any] | None) -> None:
        """Restores the state of the checkpoint that a rollback returns to, but keeps counters, findings and rates."""
        # Otherwise a run that fails again and again would roll back without end.
        kept = (self.lr_scale * self.config.health.rollback_lr, self.skipped, self.rollbacks + 1, self.findings)
        self.restore(state)
        self.lr_scale, self.skipped, self.rollbacks, self.findings = kept
        self._in_a_row = 0

    @staticmethod
    def precedes_finding(state: Mapping[str, Any] | None, finding: Finding) -> bool:
        """Returns whether a checkpoint with this state was written before any sign of the finding."""
        # Not the finding but its first sign: a mean can be beyond its limit for `patience` steps before it is reported.
        held = (state or {}).get("held", {})
        return not any(k.startswith(f"{finding.name}:") and n for k, n in held.items())

    def log_values(self) -> dict[str, float]:
        """Returns the monitor's entries of a line of metrics."""
        values = {"skipped": self.skipped, "rollbacks": self.rollbacks, "lr_scale": self.lr_scale}
        # The last R1 over the median of those before it, as the monitor judged it.
        *before, last = self._penalties or [math.nan]
        if len(before) >= _MIN_PENALTIES:
            values["penalty"] = last / (statistics.median(before) or math.inf)
        if R1_RATIO in self._means:
            values[R1_RATIO] = self._means[R1_RATIO]
        factors = {f"drift/{net}": meter.factor for net, meter in self._drift.items()}
        values |= {name: factor for name, factor in factors.items() if math.isfinite(factor)}
        return {f"{MARK}{name}": value for name, value in values.items()}

    # ---------------------------------------------------------------- judgement

    def observe(
        self,
        step: int,
        images: int,
        reading: StepStatistics,
        losses: Callable[[], Mapping[str, float]] = dict,
        example: Callable[[int], str] = str,
    ) -> list[Finding]:
        """Judges one more step, and returns its findings.

        Args:
          step, images: numbers of steps and images, this step included
          reading: statistics of the step
          losses: returns the metrics of the step; called only for a step that is not finite
          example: returns the name of an example of the batch by its row; called only for such a step
        """
        found = []
        if not reading.applied:
            found = self._judge_nonfinite(step, images, reading, losses(), example)
        else:
            self._in_a_row = 0
            # The first steps of a GAN are far from any limit that holds later.
            if step > self.config.health.grace:
                found = self._judge_limits(step, images, reading)
                found += self._judge_penalty(step, images, reading.values["loss/r1"])
                found += self._judge_drift(step, images, reading)
        self.findings = [*self.findings, *found][-_MAX_FINDINGS:]
        return found

    def _judge_nonfinite(
        self,
        step: int,
        images: int,
        reading: StepStatistics,
        losses: Mapping[str, float],
        example: Callable[[int], str],
    ) -> list[Finding]:
        c = self.config.health
        self._in_a_row += 1
        self.skipped += 1
        words, where = [], []
        # The inputs come first: a bad input explains everything after it.
        for name, (count, row) in reading.bad_inputs().items():
            more = f" and of {count - 1} more" if count > 1 else ""
            words.append(f"the {_INPUT_NAMES[name]} of {example(row)}, number {row} of the batch{more}")
            where.append(name)
        bad = [k for k, v in losses.items() if k.startswith("loss/") and not math.isfinite(v)]
        words += [", ".join(bad)] if bad else []
        modules = reading.bad_modules()
        for net, (names, of) in modules.items():
            # One NaN spreads through a whole network: its hundreds of modules would hide the message.
            few = len(names) <= 3
            words.append("gradients of " + (", ".join(names) if few else f"{len(names)} of {of} modules of the {net}"))
        # The most specific location: inputs, then modules, then losses.
        where = where or [name for names, _ in modules.values() for name in names] or bad or ["grad_norm"]
        # Every gradient is finite, but the sum of their squares overflows.
        words = words or ["a norm of gradients, too large for float32"]
        action = "warn"
        if c.nonfinite != "warn":
            # The step was skipped already, inside the compiled program: this decides whether to go on.
            action = "skip" if self._in_a_row <= c.max_skips else self._rollback_or_stop(c.nonfinite)
        half = "G's half of the step" if reading.values["applied/d"] else "the step"
        limit = "" if c.nonfinite == "warn" else f" of at most {c.max_skips}"
        text = f"not finite: {'; '.join(words)}. {half} was not applied (number {self._in_a_row}{limit} in a row)"
        count = sum(len(names) for names, _ in modules.values())
        finding = self._make_finding(step, images, "nonfinite", ", ".join(where[:4]), float(count), None, action, text)
        # A warning is logged at counts 1, 2, 4, 8, ...: a run that continues like this must not fill the disk.
        power = self._in_a_row & (self._in_a_row - 1) == 0
        return [finding] if action != "warn" or power else []

    def _judge_limits(self, step: int, images: int, reading: StepStatistics) -> list[Finding]:
        c = self.config.health
        values = {**reading.values, f"{MARK}{R1_RATIO}": measure_r1_ratio(reading.values)}
        found = []
        for limit in self.limits:
            policy, value = getattr(c, limit.finding), values[limit.entry]
            if policy == "off" or not math.isfinite(value):
                continue
            window, patience = limit.durations(self.config)
            # A plain mean until the window is full, then an exponential one with that time constant.
            n = self._counts[limit.measure] = min(self._counts.get(limit.measure, 0) + 1, window)
            mean = self._means.get(limit.measure, 0.0)
            mean = self._means[limit.measure] = mean + (value - mean) / n
            threshold = limit.threshold(c)
            beyond = n >= window and (mean > threshold if limit.above else mean < threshold)
            # Equal, not greater: one finding each time that the mean leaves its range.
            if self._count_held(limit.finding, limit.measure, beyond) == patience:
                side = "more" if limit.above else "less"
                steps = patience * (self.config.loss.r1_interval if limit.is_lazy else 1)
                text = f"{limit.words.format(value=mean)}, {side} than {threshold:g} for {steps} steps"
                action = self._choose_action(policy)
                module = limit.measure
                found.append(self._make_finding(step, images, limit.finding, module, mean, threshold, action, text))
        return found

    def _judge_drift(self, step: int, images: int, reading: StepStatistics) -> list[Finding]:
        c = self.config.health
        if c.drift == "off":
            return []
        found = []
        # A lazy penalty is paid in one step of many, at a size of its own, which grows with its weight.
        has_penalty = self.config.loss.r1_interval > 1 and reading.has_r1
        for net, norm in reading.gradient_norms().items():
            meter = self._drift.setdefault(net, self._make_meter())
            if net == "g" or not has_penalty:
                # D judges for G too: a D that is sure of everything is flat around the images.
                held = self._held.get("saturation:v_gap" if net == "v" else "saturation:d_gap", 0)
                # The count stands still while the policy is "off".
                meter.add_norm(norm, is_saturated=c.saturation != "off" and held > 0)
            if self._count_held("drift", f"drift/{net}", meter.factor > c.max_drift) == c.patience:
                text = (
                    f"the gradient norm of {net.upper()} is {meter.factor:.3g} times the lowest level that it kept, "
                    f"more than {c.max_drift:g} for {c.patience} steps"
                )
                action, module = self._choose_action(c.drift), f"drift/{net}"
                found.append(self._make_finding(step, images, "drift", module, meter.factor, c.max_drift, action, text))
        return found

    def _judge_penalty(self, step: int, images: int, value: float) -> list[Finding]:
        c = self.config.health
        # NaN on the steps without R1 (lazy regularization).
        if c.penalty == "off" or not math.isfinite(value):
            return []
        enough = len(self._penalties) >= _MIN_PENALTIES
        median = (statistics.median(self._penalties) if enough else 0.0) or math.inf
        self._penalties = [*self._penalties, value][-_PENALTY_WINDOW:]
        beyond = value > c.max_penalty * median
        # At the first value of a spike, without the patience of the other limits.
        if self._count_held("penalty", "r1", beyond) != 1:
            return []
        text = f"R1 is {value:.3g}, {value / median:.0f} times its median of {median:.3g} (limit {c.max_penalty:g})"
        action = self._choose_action(c.penalty)
        return [self._make_finding(step, images, "penalty", "loss/r1", value, c.max_penalty * median, action, text)]

    def observe_memory(self, step: int, images: int, gib: float, baseline: float) -> Finding:
        """Records that the host's memory grows without end, which is a matter of this process alone."""
        text = f"the memory of the host has grown from {baseline:.1f} to {gib:.1f} GiB, and still grows"
        finding = self._make_finding(step, images, "memory", "memory/host_gib", gib, baseline, "warn", text)
        self.findings = [*self.findings, finding][-_MAX_FINDINGS:]
        return finding

    def _count_held(self, finding: str, measure: str, beyond: bool) -> int:
        """Counts consecutive readings of a measure beyond its limit."""
        key = f"{finding}:{measure}"
        self._held[key] = self._held.get(key, 0) + 1 if beyond else 0
        return self._held[key]

    def _make_meter(self, state: Mapping[str, Any] | None = None) -> DriftMeter:
        return DriftMeter(self.config.health.window, self.config.health.patience, state)

    def _choose_action(self, policy: str) -> str:
        return policy if policy == "warn" else self._rollback_or_stop(policy)

    def _rollback_or_stop(self, policy: str) -> str:
        # A run that needs ever more rollbacks does not recover by itself.
        if policy == "rollback" and self.rollbacks < self.config.health.max_rollbacks:
            return "rollback"
        return "stop"

    def _make_finding(
        self,
        step: int,
        images: int,
        name: str,
        module: str,
        value: float | None,
        threshold: float | None,
        action: str,
        text: str,
    ) -> Finding:
        cure = CURES.get(f"{name}:{module}", CURES[name])
        return Finding(step, images / 1000, name, module, value, threshold, action, f"{text}; {cure}")
