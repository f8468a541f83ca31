"""Compares the config of a run with a stored one: which settings may change within a workdir."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from gigagan_jax.config.config import Config
from gigagan_jax.config.serialization import to_dict

# Fields that may differ between machines of a run: paths, and how files are read. The identities of data and frozen
# weights are compared separately.
OWN_FIELDS = (
    "data.path",
    "data.index",
    "data.workers",
    "data.threads",
    "data.embeddings",
    "text.path",
    "clip.path",
    "vision_aided.path",
    "perceptual.path",
)
# Fields that may change between two runs in one workdir: they do not alter the meaning of the stored state.
FREE_FIELDS = (
    *OWN_FIELDS,
    "total_kimg",
    "batch_size",
    "checkpoint_kimg",
    "snapshot_kimg",
    "log_kimg",
    # A longer run keeps its ramps by it.
    "loss.ramp_kimg",
    "micro_batches",
    "remat",
    "evaluators",
    # Compared by training/data_settings.py, which names the first difference; earlier runs have none.
    "class_names",
    "mesh",
    "rules",
    "data.retry_seconds",
    "data.max_bad_fraction",
    "data.captions",
    "generator.adaptive_form",
    "checkpoint",
    "snapshot",
    "health",
)


# Fields that `train --accept=settings` lets change: parameters, moments, averages and counters keep their meaning, and each
# example still comes once an epoch.
SAFE_FIELDS = (
    # Decoupled decay has no state. Moments forget another beta within 1 / (1 - beta) steps.
    "g_optimizer",
    "d_optimizer",
    "v_optimizer",
    # The forms of the losses too: no loss has a parameter of its own but the vision-aided one, see `_SWITCHES`. Logits of D
    # then mean something else to the loss, which D learns within some thousand steps.
    "loss",
    "ema",
    # The mean w has no other state than itself.
    "generator.w_avg_decay",
    # What is drawn for an example depends on its position alone, and the order of examples on none of these.
    "data.crop",
    "data.flip",
    "data.caption_dropout",
    "data.resize_filter",
    "data.fast_decode",
    "data.clean_captions",
    "vision_aided.augment",
    "discriminator.augment",
    "upsampler.noise",
    "upsampler.downsample",
    "upsampler.degradation",
    "upsampler.degradation_strength",
    # Parameters are float32 whatever the computation is in.
    "dtype",
    "discriminator.float32_resolution",
    "name",
)
# Safe fields that may not go from zero to another value or back: a part of the state exists only where they are not zero.
_SWITCHES = ("loss.vision_aided", "g_optimizer.beta1", "d_optimizer.beta1", "v_optimizer.beta1")
# Fields that choose the examples: `train --accept=data` lets them change.
DATA_FIELDS = (
    "data.source",
    "data.mixture",
    "data.split",
    "data.image_key",
    "data.label_key",
    "data.caption_keys",
    "data.filters",
    "data.shapes",
)
# What `train --accept` takes.
ACCEPTED = ("data", "settings")


class FieldChange(NamedTuple):
    """A field that differs between a stored config and the current one.

    Attributes:
      name: of the field, "g_optimizer.learning_rate".
      stored, current: values; "(absent)" in a config of another version that lacks the field.
    """

    name: str
    stored: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.stored} -> {self.current}"

    @property
    def flag(self) -> str | None:
        """What --accept must name for this change; None where no run survives it."""
        if _is_among(self.name, DATA_FIELDS):
            return "data"
        # A field that one version lacks is no choice of the user's: its meaning is not known here.
        if _ABSENT in (self.stored, self.current) or not _is_among(self.name, SAFE_FIELDS):
            return None
        # From one value to another both states have the same parts.
        crosses = self.name in _SWITCHES and (not self.stored) != (not self.current)
        return None if crosses else "settings"


# None would not do: it may be a value.
_ABSENT = "(absent)"


def flatten_fields(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict, {"data.crop": "center", ...}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten_fields(value, name + ".")
        else:
            # JSON has no tuples: a stored config has lists.
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def _is_among(name: str, fields: Collection[str]) -> bool:
    # A name may be a whole group: "health" stands for "health.window" too.
    return any(name == f or name.startswith(f + ".") for f in fields)


def is_fixed(name: str) -> bool:
    """Whether a field ("loss.clip") must not change within a workdir."""
    return not _is_among(name, FREE_FIELDS)


def changed_fields(stored: Mapping[str, Any], current: Config) -> list[FieldChange]:
    """All fields that differ, in the order of their names."""
    a, b = flatten_fields(stored), flatten_fields(to_dict(current))
    changes = [FieldChange(k, a.get(k, _ABSENT), b.get(k, _ABSENT)) for k in sorted(a.keys() | b.keys())]
    return [change for change in changes if change.stored != change.current]


def fixed_differences(stored: Mapping[str, Any], current: Config, accept: Collection[str] = ()) -> list[FieldChange]:
    """The changes that are refused within a workdir.

    Args:
      stored: config of the workdir.
      current: config that is asked for.
      accept: of ACCEPTED, what the user lets change.
    """
    return [c for c in changed_fields(stored, current) if is_fixed(c.name) and c.flag not in accept]


def explain_differences(changes: Collection[FieldChange], file: str = "") -> str:
    """What `fixed_differences` found, and what mends it: "a: 1 -> 2; b: 3 -> 4): --accept=settings ...".

    Args:
      changes: that are refused.
      file: that holds the settings of the run, where --config can read it.
    """
    # Eight fields fit in a message.
    shown = "; ".join(str(change) for change in list(changes)[:8])
    more = f" and {len(changes) - 8} more" if len(changes) > 8 else ""
    never = [change.name for change in changes if change.flag is None]
    # One command must do: a user who names one flag and then meets the other has lost a start.
    flags = sorted({change.flag for change in changes if change.flag})
    if not never:
        mend = f"--accept={','.join(flags)} goes on with the new values; otherwise use"
    elif flags:
        mend = f"no flag lets {', '.join(never[:8])} change; use"
    else:
        mend = "use"
    # Defaults of a config file may be other ones after an update of this package.
    own = f"--config={file}, the settings it was started with" if file else "the settings it was started with"
    return f"({shown}{more}): {mend} another --workdir, or {own}"


def config_digest(config: Config) -> str:
    """A short hash of the whole config."""
    # Sorted keys: the order of fields in a file must not matter. 48 bits are enough to tell runs apart.
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]
