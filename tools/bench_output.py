"""What a bench writes: one JSON line a job, kept whatever happens next; the facts of the machine; figures with their spread."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from gigagan_jax.config import Config, config_digest

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu")
_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


class Lines:
    """JSON lines in a file. Each is on the disk when `write` returns, so that a killed bench keeps what was finished.

    Args:
      file: to begin anew; None for none.
    """

    def __init__(self, file: Path | None):
        self._file = None if file is None else file.open("w", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Adds one line."""
        if self._file is None:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, most and quartiles of measurements, and how many there are."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return {
        "median": middle,
        "min": min(values),
        "max": max(values),
        "quartiles": [low, high],  # type: ignore[dict-item]
        "runs": len(values),
    }


def versions() -> dict[str, str]:
    """Of Python and what computes; a package that is not installed is left out."""
    out = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_PLUGINS):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def facts(config: Config | None, commit: str | None = None) -> dict[str, Any]:
    """The first line: device, driver, versions, commit, flags, host, config.

    Args:
      config: what is measured.
      commit: of the code, where there is no git to ask.
    """
    device = jax.devices()[0]
    flags = ("JAX_", "XLA_", "LIBTPU_", "NVIDIA_TF32", "CUDA_VISIBLE")
    out = {
        "job": "facts",
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "runtime": device.client.platform_version,
        "driver": _nvidia() if device.platform in ("gpu", "cuda") else None,
        "versions": versions(),
        "commit": commit or _git("rev-parse", "HEAD"),
        "dirty": None if commit else is_dirty(),
        "flags": {k: v for k, v in sorted(os.environ.items()) if k.startswith(flags)},
        "host": {"cpu": _cpu_model(), "cores": os.cpu_count(), "usable": len(os.sched_getaffinity(0))},
    }
    if config is not None:
        out["config"] = {
            "name": config.name,
            "digest": config_digest(config),
            "dtype": config.dtype,
            "batch": config.batch_size,
        }
    return out


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_of(checkout: Path) -> str | None:
    """The commit of a checkout; None where there is no git to ask."""
    return _run("git", "-C", str(checkout), "rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    return _run("git", *arguments)


def is_dirty() -> bool | None:
    """Whether files of this checkout differ from its commit; None where there is no git to ask."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else bool(changed)


def _nvidia() -> dict[str, str] | None:
    wanted = ("driver_version", "name", "memory.total", "power.limit", "clocks.max.sm")
    said = _run("nvidia-smi", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader")
    if not said:
        return None
    return dict(zip(wanted, (x.strip() for x in said.splitlines()[0].split(",")), strict=False))


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return found[0] if found else platform.processor()
