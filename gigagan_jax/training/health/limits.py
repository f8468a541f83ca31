"""The limits of the health measures, and the advice at the end of each message (docs/health.md)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from gigagan_jax.config import Config
from gigagan_jax.config.run import HealthConfig
from gigagan_jax.training.health.step_statistics import MARK, r1_measures

# R1 as it is paid over what the last exit alone would pay. Computed on the host, from two entries of the vector.
R1_RATIO = "r1_ratio"
# Below it, more than half of the last exit's own penalty is not paid.
_MIN_R1_RATIO = 0.5
# A mean over fewer readings of a step with R1 is noise.
_MIN_LAZY_WINDOW = 8

# Advice by the name of the finding, or by "finding:measure" where a measure has its own.
CURES = {
    "nonfinite": "a lower learning rate (config.g_optimizer.learning_rate, config.d_optimizer.learning_rate) or a larger "
    "config.loss.r1_gamma is the usual cure; mend the data where an input is named",
    "saturation": "a larger config.loss.r1_gamma, a lower config.d_optimizer.learning_rate or more data usually helps",
    "saturation:v_gap": "a larger config.loss.vision_r1_gamma, a lower config.v_optimizer.learning_rate or "
    "config.loss.vision_smoothing usually helps",
    "evasion": 'with config.loss.r1_exits="signs" and r1_levels="all", in a new workdir, no exit can pay for another; where '
    "they are set, a larger config.loss.r1_gamma usually helps",
    "drift": 'a larger config.loss.r1_gamma, config.loss.r1_exits="signs" or a lower learning rate usually helps',
    "penalty": "a lower config.d_optimizer.learning_rate usually helps; single spikes pass",
    "collapse": "a larger config.loss.r1_gamma, a larger batch or config.discriminator.minibatch_std=4 usually helps",
    "levels": "config.loss.level_weights that give the level more, or a larger config.generator.rgb_gain usually helps",
    "memory": "fewer config.data.workers or config.data.threads usually help; the same command, run again, resumes with what it "
    "needs at the start",
    "updates": "look at the learning rates and at the gradient norms of the network (grad_norm/...)",
}


# (finding, field of the limit, whether values above it are the problem, message) of measures of which there are several, or
# that only some runs have, by the start of their names.
_FAMILIES = {
    "d_gap/": ("saturation", "max_gap", True, "D tells real from generated images of {which} px by {value:.3f} of 1"),
    "v_gap": ("saturation", "max_gap", True, "V tells real from generated images by {value:.3f} of 1"),
    "level/": ("levels", "min_level", False, "level {which} adds {value:.4f} of the image"),
    "exit/": (
        *("levels", "min_exit", False),
        "the exit of D at {which} px says the same of all images (deviation {value:.2g})",
    ),
    # Measured at learning rate 1: a low rate alone must not look like vanishing updates.
    "direction/": ("updates", "min_update", False, "the updates of {which} vanish (root mean square {value:.2g})"),
    "update/": ("updates", "max_update", True, "{which} changes by {value:.2g} of its parameters' norm a step"),
}


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit for the running mean of a measure.

    finding: name of the finding beyond the limit
    measure: name of the measure
    limit: field of HealthConfig that holds the limit, or the limit itself
    above: whether values above the limit are the problem
    words: message with a placeholder for the value
    is_lazy: whether only a step with R1 has the measure
    """

    finding: str
    measure: str
    limit: str | float
    above: bool
    words: str
    is_lazy: bool = False

    @property
    def entry(self) -> str:
        """The measure's name among the statistics of a step."""
        return self.measure if self.measure.startswith("r1/") else f"{MARK}{self.measure}"

    def threshold(self, config: HealthConfig) -> float:
        """Returns the limit itself."""
        return float(getattr(config, self.limit)) if isinstance(self.limit, str) else self.limit

    def durations(self, config: Config) -> tuple[int, int]:
        """Returns (window of the running mean, patience), both counted in readings of the measure."""
        window, patience = config.health.window, config.health.patience
        if not self.is_lazy:
            return window, patience
        # One reading in so many steps: both keep their length in steps, as far as the mean allows.
        interval = config.loss.r1_interval
        return max(_MIN_LAZY_WINDOW, math.ceil(window / interval)), math.ceil(patience / interval)


def make_limits(config: Config, measures: Sequence[str]) -> list[Limit]:
    """Returns the limits of a run.

    Args:
      config: config of the run.
      measures: names of the measures of a step (`HealthVector.measures`).
    """
    limits = [
        Limit("saturation", "d_gap", "max_gap", True, "D tells real from generated images by {value:.3f} of 1"),
        Limit("collapse", "diversity", "min_diversity", False, "images vary by {value:.3f} of what real ones do"),
        Limit("collapse", "diversity_low", "min_diversity", False, "8 px averages vary by {value:.3f} of real ones"),
        Limit("collapse", "diversity_z", "min_diversity_z", False, "images of one caption differ by {value:.3f} only"),
    ]
    for measure in (m.removeprefix(MARK) for m in measures):
        kind, slash, which = measure.partition("/")
        if kind + slash in _FAMILIES:
            finding, limit, above, words = _FAMILIES[kind + slash]
            # A network's name is one letter; a resolution has no capitals.
            limits.append(Limit(finding, measure, limit, above, words.replace("{which}", which.upper())))
    return limits + _make_evasion_limits(config)


def _make_evasion_limits(config: Config) -> list[Limit]:
    words = "R1 is {value:.2f} of what D's last exit alone would pay"
    limits = [Limit("evasion", R1_RATIO, _MIN_R1_RATIO, False, words, is_lazy=True)]
    for measure in r1_measures(config):
        if measure.startswith("r1/cosine/"):
            resolution = measure.removeprefix("r1/cosine/")
            words = f"the gradients of D's exits by images of {resolution} px cancel each other (cosine {{value:.2f}})"
            limits.append(Limit("evasion", measure, "min_cosine", False, words, is_lazy=True))
    return limits


def measure_r1_ratio(values: Mapping[str, float]) -> float:
    """Returns R1 as it is paid over R1 of D's last exit alone; NaN in a step without R1.

    Args:
      values: entries of the health vector by name.
    """
    own = values["r1/last_exit"]
    return values["loss/r1"] / own if own > 0 else math.nan
