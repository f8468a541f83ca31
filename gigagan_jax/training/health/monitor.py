"""What is wrong with a GAN in training, judged on the host from what each step says of itself (docs/health.md).

All processes see the same numbers and so judge alike; no clock is asked. What the judgement remembers is in the checkpoint.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gigagan_jax.config import Config
from gigagan_jax.training.health.step_statistics import MARK, Reading

_PENALTIES = 32  # values of R1 that its median is taken over
_PENALTIES_LEAST = 8
_KEPT = 100  # findings in the report
_WHAT = {"image": "image", "features": "caption embedding (features)", "clip_text": "caption embedding (clip_text)"}
_CURES = {
    "nonfinite": "a lower learning rate (config.g_optimizer.learning_rate, config.d_optimizer.learning_rate) or a larger "
    "config.loss.r1_gamma is the usual cure; mend the data where an input is named",
    "saturation": "a larger config.loss.r1_gamma, a lower config.d_optimizer.learning_rate or more data usually helps",
    "penalty": "a lower config.d_optimizer.learning_rate usually helps; single spikes pass",
    "collapse": "a larger config.loss.r1_gamma, a larger batch or config.discriminator.minibatch_std=4 usually helps",
    "levels": "config.loss.level_weights that give the level more, or a larger config.generator.rgb_gain usually helps",
    "updates": "look at the learning rates and at the gradient norms of the network (grad_norm/...)",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and what is done about it.

    step, kimg: when it was found
    name: "nonfinite", "saturation", "penalty", "collapse", "levels" or "updates"
    module: where: a module of a network, an input, a loss or a measure
    value, threshold: what was measured and its limit; None where there is no such number
    action: "warn", "skip", "rollback" or "stop"
    text: all of it in plain words
    """

    step: int
    kimg: float
    name: str
    module: str
    value: float | None
    threshold: float | None
    action: str
    text: str


@dataclasses.dataclass(frozen=True)
class _Limit:
    """A measure whose running mean must stay on one side of a limit."""

    finding: str
    measure: str
    field: str  # of HealthConfig
    above: bool  # is it wrong above the limit?
    words: str


def _limits(measures: Sequence[str]) -> list[_Limit]:
    out = [
        _Limit("saturation", "d_gap", "max_gap", True, "D tells real from generated images by {value:.3f} of 1"),
        _Limit("collapse", "diversity", "min_diversity", False, "images vary by {value:.3f} of what real ones do"),
        _Limit("collapse", "diversity_low", "min_diversity", False, "8 px averages vary by {value:.3f} of real ones"),
        _Limit("collapse", "diversity_z", "min_diversity_z", False, "images of one caption differ by {value:.3f} only"),
    ]
    for measure in (m.removeprefix(MARK) for m in measures):
        kind, _, which = measure.partition("/")
        net = which.upper()
        if kind == "level":
            words = f"level {which} adds {{value:.4f}} of the image"
            out.append(_Limit("levels", measure, "min_level", False, words))
        elif kind == "exit":
            words = f"the exit of D at {which} px says the same of all images (deviation {{value:.2g}})"
            out.append(_Limit("levels", measure, "min_exit", False, words))
        elif kind == "direction":
            words = f"the updates of {net} vanish (root mean square {{value:.2g}})"
            out.append(_Limit("updates", measure, "min_update", False, words))
        elif kind == "update":
            words = f"{net} changes by {{value:.2g}} of its parameters' norm a step"
            out.append(_Limit("updates", measure, "max_update", True, words))
    return out


class HealthMonitor:
    """Judges the steps of a run one after the other.

    Args:
      config: of the run; `config.health` has the limits and what is done.
      measures: names of the measures that steps come with (`Probe.measures`).

    Attributes:
      lr_scale: factor of all learning rates.
      skipped: steps that were not applied, or by half, over the run.
      rollbacks: times that the run went back to a checkpoint.
      findings: the newest of them, oldest first.
    """

    def __init__(self, config: Config, measures: Sequence[str]):
        self.config, self.limits = config, _limits(measures)
        self.lr_scale, self.skipped, self.rollbacks = 1.0, 0, 0
        self.findings: list[Finding] = []
        self._in_a_row = 0  # steps not applied
        self._means: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._held: dict[str, int] = {}  # steps in a row that a mean is beyond its limit
        self._penalties: list[float] = []

    # -- the checkpoint

    def state(self) -> dict[str, Any]:
        """All that the judgement remembers, ready for JSON."""
        return {
            "lr_scale": self.lr_scale,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "in_a_row": self._in_a_row,
            "means": dict(self._means),
            "counts": dict(self._counts),
            "held": dict(self._held),
            "penalties": list(self._penalties),
            "findings": [dataclasses.asdict(f) for f in self.findings],
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from `state`; from nothing where a checkpoint has none (of a version that did not judge)."""
        fresh = HealthMonitor(self.config, ())
        state = fresh.state() | dict(state or {})
        self.lr_scale, self.skipped = float(state["lr_scale"]), int(state["skipped"])
        self.rollbacks, self._in_a_row = int(state["rollbacks"]), int(state["in_a_row"])
        self._means, self._counts, self._held = (dict(state[k]) for k in ("means", "counts", "held"))
        self._penalties = list(state["penalties"])
        self.findings = [Finding(**f) for f in state["findings"]]

    def went_back(self, state: Mapping[str, Any] | None) -> None:
        """The run is at an earlier checkpoint again, which has this state: counters and history go on, the rest is as then."""
        kept = (self.lr_scale * self.config.health.rollback_lr, self.skipped, self.rollbacks + 1, self.findings)
        self.restore(state)
        self.lr_scale, self.skipped, self.rollbacks, self.findings = kept
        self._in_a_row = 0

    @staticmethod
    def good(state: Mapping[str, Any] | None, finding: Finding) -> bool:
        """Was a checkpoint with this state of the monitor written before there was any sign of the finding?"""
        held = (state or {}).get("held", {})
        return not any(k.startswith(f"{finding.name}:") and n for k, n in held.items())

    def logged(self) -> dict[str, float]:
        """What a line of metrics says of it."""
        out = {"skipped": self.skipped, "rollbacks": self.rollbacks, "lr_scale": self.lr_scale}
        *before, last = self._penalties or [math.nan]
        if len(before) >= _PENALTIES_LEAST:
            out["penalty"] = last / (statistics.median(before) or math.inf)
        return {f"{MARK}{name}": value for name, value in out.items()}

    # -- judging

    def observe(
        self,
        step: int,
        images: int,
        reading: Reading,
        losses: Callable[[], Mapping[str, float]] = dict,
        example: Callable[[int], str] = str,
    ) -> list[Finding]:
        """What is wrong, after one more step.

        Args:
          step, images: taken and seen with this step
          reading: what it said
          losses: gives its metrics; asked only where something is not finite
          example: gives the name of an example of the batch by its row; likewise
        """
        found = []
        if not reading.applied:
            found = self._nonfinite(step, images, reading, losses(), example)
        else:
            self._in_a_row = 0
            if step > self.config.health.grace:
                found = self._beyond_limits(step, images, reading.values)
        self.findings = [*self.findings, *found][-_KEPT:]
        return found

    def _nonfinite(
        self,
        step: int,
        images: int,
        reading: Reading,
        losses: Mapping[str, float],
        example: Callable[[int], str],
    ) -> list[Finding]:
        c = self.config.health
        self._in_a_row += 1
        self.skipped += 1
        words, where = [], []
        for name, (count, row) in reading.bad_inputs().items():
            more = f" and of {count - 1} more" if count > 1 else ""
            words.append(f"the {_WHAT[name]} of {example(row)}, number {row} of the batch{more}")
            where.append(name)
        bad = [k for k, v in losses.items() if k.startswith("loss/") and not math.isfinite(v)]
        words += [", ".join(bad)] if bad else []
        modules = reading.bad_modules()
        for net, (names, of) in modules.items():
            few = len(names) <= 3
            words.append("gradients of " + (", ".join(names) if few else f"{len(names)} of {of} modules of the {net}"))
        where = where or [name for names, _ in modules.values() for name in names] or bad or ["grad_norm"]
        words = words or ["a norm of gradients, too large for float32"]
        action = "warn"
        if c.nonfinite != "warn":
            action = "skip" if self._in_a_row <= c.max_skips else self._beyond_skipping(c.nonfinite)
        half = "G's half of the step" if reading.values["applied/d"] else "the step"
        limit = "" if c.nonfinite == "warn" else f" of at most {c.max_skips}"
        text = f"not finite: {'; '.join(words)}. {half} was not applied (number {self._in_a_row}{limit} in a row)"
        count = sum(len(names) for names, _ in modules.values())
        finding = self._finding(step, images, "nonfinite", ", ".join(where[:4]), float(count), None, action, text)
        # Each is an action, but a run that goes on for ever so must not fill the disk with its log.
        power = self._in_a_row & (self._in_a_row - 1) == 0
        return [finding] if action != "warn" or power else []

    def _beyond_limits(self, step: int, images: int, values: Mapping[str, float]) -> list[Finding]:
        c = self.config.health
        found = []
        for limit in self.limits:
            policy, value = getattr(c, limit.finding), values[f"{MARK}{limit.measure}"]
            if policy == "off" or not math.isfinite(value):
                continue
            n = self._counts[limit.measure] = min(self._counts.get(limit.measure, 0) + 1, c.window)
            mean = self._means.get(limit.measure, 0.0)
            mean = self._means[limit.measure] = mean + (value - mean) / n
            threshold = getattr(c, limit.field)
            key = f"{limit.finding}:{limit.measure}"
            beyond = n >= c.window and (mean > threshold if limit.above else mean < threshold)
            self._held[key] = self._held.get(key, 0) + 1 if beyond else 0
            if self._held[key] == c.patience:
                side = "more" if limit.above else "less"
                text = f"{limit.words.format(value=mean)}, {side} than {threshold:g} for {c.patience} steps"
                action = self._act(policy)
                module = limit.measure
                found.append(self._finding(step, images, limit.finding, module, mean, threshold, action, text))
        return found + self._penalty(step, images, values["loss/r1"])

    def _penalty(self, step: int, images: int, value: float) -> list[Finding]:
        c = self.config.health
        if c.penalty == "off" or not math.isfinite(value):
            return []
        enough = len(self._penalties) >= _PENALTIES_LEAST
        median = (statistics.median(self._penalties) if enough else 0.0) or math.inf
        self._penalties = [*self._penalties, value][-_PENALTIES:]
        beyond = value > c.max_penalty * median
        self._held["penalty:r1"] = self._held.get("penalty:r1", 0) + 1 if beyond else 0
        if self._held["penalty:r1"] != 1:
            return []
        text = f"R1 is {value:.3g}, {value / median:.0f} times its median of {median:.3g} (limit {c.max_penalty:g})"
        action = self._act(c.penalty)
        return [self._finding(step, images, "penalty", "loss/r1", value, c.max_penalty * median, action, text)]

    def _act(self, policy: str) -> str:
        return policy if policy == "warn" else self._beyond_skipping(policy)

    def _beyond_skipping(self, policy: str) -> str:
        if policy == "rollback" and self.rollbacks < self.config.health.max_rollbacks:
            return "rollback"
        return "stop"

    def _finding(
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
        return Finding(step, images / 1000, name, module, value, threshold, action, f"{text}; {_CURES[name]}")
