"""Memory of a run: of this process and its workers on the host, and the devices' peak."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.hardware import memory_stats

HOST, WORKERS, DEVICE = "memory/host_gib", "memory/workers_gib", "memory/device_peak_gib"
_GIB = 2**30
_PROC = Path("/proc")


def resident_memory(process: int) -> int:
    """Bytes of a process that lie in memory, without the kernel's cache of files; 0 where that is not known."""
    try:
        # In pages: the whole address space, then what of it is in memory.
        return int((_PROC / str(process) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return _peak_of_this_process() if process == os.getpid() else 0


def _peak_of_this_process() -> int:
    """Where there is no /proc: the most that it has had."""
    with contextlib.suppress(ImportError):
        import resource

        # Bytes on macOS, KiB elsewhere.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return 0


def child_processes() -> list[int]:
    """Numbers of the worker processes that this one has started."""
    children: list[int] = []
    # Every thread has a list of its own: workers are started by several.
    for file in _PROC.glob(f"{os.getpid()}/task/*/children"):
        with contextlib.suppress(OSError):
            children += map(int, file.read_text().split())
    # Kernels may be built without these lists.
    return children or [p.pid for p in multiprocessing.active_children() if p.pid is not None]


def memory_metrics(devices: Sequence[Any], children: Sequence[int] | None = None) -> dict[str, float]:
    """Memory of this process in GiB, by the names of metrics; what is not known is left out.

    Args:
      devices: of this process; the largest peak of them counts.
      children: numbers of the workers; None for those that there are.
    """
    workers = sum(map(resident_memory, child_processes() if children is None else children))
    peaks = [(memory_stats(device) or {}).get("peak_bytes_in_use", 0) for device in devices]
    known = {HOST: resident_memory(os.getpid()), WORKERS: workers, DEVICE: max(peaks, default=0)}
    return {name: size / _GIB for name, size in known.items() if size}
