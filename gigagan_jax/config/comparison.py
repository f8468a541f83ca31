"""Which settings may change within a workdir, and which did."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from gigagan_jax.config.config import Config
from gigagan_jax.config.serialization import to_dict

# What each machine of a run may have its own of: where things lie, and how they are read. That the data and the frozen
# weights are the same is checked by their identities.
OWN_FIELDS = (
    "data.path",
    "data.index",
    "data.workers",
    "data.threads",
    "data.embeddings",
    "text.path",
    "clip.path",
    "vision_aided.path",
)
# What may change between two runs in one workdir: it does not alter what the stored state means.
FREE_FIELDS = (
    *OWN_FIELDS,
    "total_kimg",
    "batch_size",
    "checkpoint_kimg",
    "snapshot_kimg",
    "log_kimg",
    "micro_batches",
    "remat",
    "evaluators",
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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data.crop": "center", ...}"""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= flatten(value, name + ".")
        else:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out


def is_fixed(name: str) -> bool:
    """Must a field ("loss.clip") stay as it is within a workdir?"""
    return not any(name == f or name.startswith(f + ".") for f in FREE_FIELDS)


def differences(stored: Mapping[str, Any], current: Config) -> list[str]:
    """Lines "field: stored -> current" for fields that must not change within a workdir."""
    a, b = flatten(stored), flatten(to_dict(current))
    keys = [k for k in sorted(a.keys() | b.keys()) if is_fixed(k)]
    missing = "(absent)"
    return [f"{k}: {a.get(k, missing)} -> {b.get(k, missing)}" for k in keys if a.get(k, missing) != b.get(k, missing)]


def digest(config: Config) -> str:
    """A short hash of the whole config."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]
