"""The devices of a run: what they are, an accelerator that is there and not used, and JAX's refusal of a platform."""

import contextlib
import glob
import importlib.metadata
import importlib.util
import logging
import os
import re

import jax

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.hardware import memory_stats
from gigagan_jax.core.processes import count_cores
from gigagan_jax.parallel.communication import import_private_module

_log = logging.getLogger(__name__)
# Files that the driver of an NVIDIA card makes; the last one is that of Windows' subsystem for Linux.
_NVIDIA_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")
_TPU_FILES = ("/dev/accel0", "/dev/vfio/0")
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# Google's number among the makers of PCI devices.
_GOOGLE = "0x1ae0"


def describe_devices() -> str:
    """One line: number and kind of all devices, and cores and memory of this host.

    "devices: 8 x NVIDIA H100 80GB HBM3, 59.5 GiB usable each; host: 16 cores, 120 GiB"
    """
    devices = jax.devices()
    cores, memory = count_cores(), host_memory()
    host = f"{cores} cores" + (f", {_gib(memory)}" if memory else "")
    if devices[0].platform == "cpu":
        several = f"{len(devices)} devices on " if len(devices) > 1 else ""
        return f"devices: CPU ({several}{host})"
    usable = (memory_stats(jax.local_devices()[0]) or {}).get("bytes_limit")
    each = f", {_gib(usable)} usable each" if usable else ""
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"devices: {len(devices)} x {devices[0].device_kind}{each}{hosts}; host: {host}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def log_devices() -> None:
    """Logs the devices, and warns where an accelerator of this machine is not used."""
    _log.info(describe_devices())
    unused = find_unused_accelerator()
    if unused:
        # A block of its own: among other lines of a start it would not be seen for days.
        frame = "!" * 100
        _log.warning("\n%s\n%s\n%s", frame, unused, frame)


def find_unused_accelerator() -> str:
    """What is there and not used, with the command that mends it; "" where JAX runs on an accelerator, or was told not to."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS", "").strip().lower() == "cpu":
        return ""
    slow = "this run is on the CPU, which is many times slower"
    card = next((file for file in _NVIDIA_FILES if os.path.exists(file)), "")
    # CUDA itself takes an empty list for "no card", and so does who sets it.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if card and not hidden:
        return f"an NVIDIA card is here ({card}) and not used: {slow}\n{_cuda_remedy()}"
    tpu = next((file for file in _TPU_FILES if os.path.exists(file)), "")
    # Virtual machines pass other devices through the second one.
    if tpu and (tpu == _TPU_FILES[0] or _has_google_chip()):
        return f"a TPU is here ({tpu}) and not used: {slow}\n{_tpu_remedy()}"
    return ""


def _has_google_chip() -> bool:
    for file in glob.glob("/sys/bus/pci/devices/*/vendor"):
        with contextlib.suppress(OSError), open(file) as opened:
            if opened.read().strip() == _GOOGLE:
                return True
    return False


def _cuda_remedy() -> str:
    if not any(map(importlib.util.find_spec, _CUDA_PLUGINS)):
        return f"JAX was installed without CUDA; mend it by: {_install('cuda')}"
    return (
        f"JAX's CUDA plugin is installed, and could not start{_reason('cuda')}; `nvidia-smi` must list the card, and CUDA 13 "
        f"needs a driver of version 580 or later; to install the plugin again: {_install('cuda')}"
    )


def _tpu_remedy() -> str:
    if importlib.util.find_spec("libtpu") is None:
        return f"JAX was installed without libtpu; mend it by: {_install('tpu')}"
    return f"libtpu is installed, and could not start{_reason('tpu')}; does another process hold the TPU?"


def _install(extra: str) -> str:
    """The command that installs an extra, with what it stands for."""
    command = f"pip install -e '.[{extra}]'"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        needs = importlib.metadata.requires("gigagan-jax") or []
        found = [
            need.partition(";")[0].strip() for need in needs if need.replace("'", '"').endswith(f'extra == "{extra}"')
        ]
        if found:
            return f"{command} (which installs {', '.join(found)})"
    return command


def _reason(platform: str) -> str:
    # Private: JAX logs why a platform that nobody asked for did not start, at a level that is not shown.
    errors = getattr(import_private_module("jax._src.xla_bridge"), "_backend_errors", None) or {}
    said = str(errors.get(platform, "")).strip()
    return f" ({said.splitlines()[0][:200]})" if said else ""


# ---------------------------------------------------------------- JAX_PLATFORMS


def platform_error(error: BaseException) -> UserError | None:
    """The one line of an exception that JAX raised because a platform could not be started; None for any other."""
    message = str(error)
    if not (isinstance(error, RuntimeError) and message.startswith("Unable to initialize backend")):
        # Without a card, JAX passes "cuda" over and ends with an assertion that says nothing.
        if not (isinstance(error, AssertionError) and _raised_by(error, "xla_bridge.py")):
            return None
        message = ""
    asked = os.environ.get("JAX_PLATFORMS", "")
    names = {name.strip().lower() for name in asked.split(",")}
    # JAX ends its line with advice of its own in parentheses.
    first = (message.splitlines() or [""])[0]
    why = re.split(r" \((?:set JAX_PLATFORMS|you may need)", first)[0][:240] or "no such device is here"
    if names & {"cuda", "gpu"}:
        remedy = "" if any(map(importlib.util.find_spec, _CUDA_PLUGINS)) else f"; for NVIDIA cards: {_install('cuda')}"
        card = any(map(os.path.exists, _NVIDIA_FILES))
        why = why if card else "no NVIDIA card is here"
    elif "tpu" in names and importlib.util.find_spec("libtpu") is None:
        remedy = f"; for TPUs: {_install('tpu')}"
    else:
        remedy = ""
    if not asked:
        return UserError(f"JAX cannot start: {why}; JAX_PLATFORMS=cpu does without it")
    return UserError(
        f"JAX_PLATFORMS={asked} cannot start: {why}{remedy}; without JAX_PLATFORMS JAX takes what is here, and the CPU at last"
    )


def _raised_by(error: BaseException, file: str) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.endswith(file)


def memory_error(error: BaseException) -> UserError | None:
    """The one line of an exception that XLA raised because a device's memory was full; None for any other."""
    message = str(error)
    # XLA names the status on GPUs and TPUs, and says it in words on CPUs.
    full = "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()
    if not (isinstance(error, jax.errors.JaxRuntimeError) and full):
        return None
    size = re.search(r"allocat\w* (\d+) bytes", message)
    asked = f" ({int(size[1]) / 2**30:,.1f} GiB were asked for at once)" if size else ""
    return UserError(
        f"a device's memory is full{asked}: use smaller images, or fewer at once; in training a smaller config.batch_size, "
        "parts of it by config.micro_batches=8, config.remat=true, or a smaller config (--dry_run says what one takes)"
    )


# ---------------------------------------------------------------- sizes


def host_memory() -> int:
    """Bytes of memory of this host, or of its container; 0 where that is not known."""
    total = 0
    with contextlib.suppress(OSError, ValueError, AttributeError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # "max" where the container has no limit.
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        total = min(total or 2**63, int(file.read()))
    return total
