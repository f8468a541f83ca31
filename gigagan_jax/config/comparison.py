"""Compares the config of a run with a stored one: which settings may change within a workdir."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

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
    # Compared by training/data_classes.py, which names the first difference; earlier runs have none.
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


def is_fixed(name: str) -> bool:
    """Whether a field ("loss.clip") must not change within a workdir."""
    # A name in FREE_FIELDS may be a whole group: "health" frees "health.window".
    return not any(name == f or name.startswith(f + ".") for f in FREE_FIELDS)


def fixed_differences(stored: Mapping[str, Any], current: Config) -> list[str]:
    """Lines "field: stored -> current" for fields that must not change within a workdir."""
    a, b = flatten_fields(stored), flatten_fields(to_dict(current))
    keys = [k for k in sorted(a.keys() | b.keys()) if is_fixed(k)]
    # Configs of other versions lack fields. None would not do: it may be a value.
    missing = "(absent)"
    return [f"{k}: {a.get(k, missing)} -> {b.get(k, missing)}" for k in keys if a.get(k, missing) != b.get(k, missing)]


def config_digest(config: Config) -> str:
    """A short hash of the whole config."""
    # Sorted keys: the order of fields in a file must not matter. 48 bits are enough to tell runs apart.
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]
