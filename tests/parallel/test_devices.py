"""The devices of a run: what the first line says, an accelerator that is there and not used, a platform that JAX refuses."""

import logging
import os
import types

import jax
import pytest

from gigagan_jax import cli
from gigagan_jax.parallel import devices


def device(kind, platform="gpu", stats=None):
    return types.SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)


@pytest.fixture
def machine(monkeypatch):
    """machine(*devices): a host of 16 cores and 120 GiB with these."""
    monkeypatch.setattr(devices, "count_cores", lambda: 16)
    monkeypatch.setattr(devices, "host_memory", lambda: 120 << 30)

    def make(*found):
        monkeypatch.setattr(jax, "devices", lambda: list(found))
        monkeypatch.setattr(jax, "local_devices", lambda: list(found))

    return make


def test_the_first_line(machine):
    machine(*8 * [device("NVIDIA H100 80GB HBM3", stats={"bytes_limit": 60 << 30})])
    assert devices.describe_devices() == (
        "devices: 8 x NVIDIA H100 80GB HBM3, 60 GiB usable each; host: 16 cores, 120 GiB"
    )
    machine(device("cpu", "cpu"))
    assert devices.describe_devices() == "devices: CPU (16 cores, 120 GiB)"
    machine(*4 * [device("cpu", "cpu")])
    assert devices.describe_devices() == "devices: CPU (4 devices on 16 cores, 120 GiB)"


def test_sizes_of_this_host():
    assert 1 <= devices.count_cores() <= os.cpu_count()
    assert devices.host_memory() > 1 << 28
    assert devices.memory_stats(jax.devices()[0]) is None


@pytest.fixture
def unset(monkeypatch):
    """Nobody has chosen a platform."""
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def with_plugins(monkeypatch, *names):
    found = lambda name, *rest: object() if name in names else None
    monkeypatch.setattr(devices.importlib.util, "find_spec", found)


def test_a_card_that_is_not_used(unset, caplog):
    with_plugins(unset)
    # As one who simulates a card does.
    unset.setattr(os.path, "exists", lambda path: path == "/dev/nvidia0")
    with caplog.at_level(logging.INFO):
        devices.log_devices()
    info, warning = caplog.records
    assert info.getMessage().startswith("devices: CPU (")
    assert warning.levelno == logging.WARNING
    for words in ("an NVIDIA card is here (/dev/nvidia0) and not used", "pip install -e '.[cuda]'", "jax[cuda13]"):
        assert words in warning.getMessage()
    with_plugins(unset, "jax_cuda13_plugin")
    assert "`nvidia-smi` must list the card" in devices.find_unused_accelerator()
    # Who hides the card, or asks for the CPU, knows.
    unset.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.find_unused_accelerator() == ""
    unset.delenv("CUDA_VISIBLE_DEVICES")
    unset.setenv("JAX_PLATFORMS", "cpu")
    assert devices.find_unused_accelerator() == ""


def test_a_tpu_that_is_not_used(unset):
    there = lambda *files: unset.setattr(os.path, "exists", lambda path: path in files)
    with_plugins(unset)
    there("/dev/accel0")
    said = devices.find_unused_accelerator()
    assert "a TPU is here (/dev/accel0) and not used" in said
    assert "pip install -e '.[tpu]'" in said
    # Virtual machines pass other devices through as well.
    unset.setattr(devices, "_has_google_chip", lambda: False)
    there("/dev/vfio/0")
    assert devices.find_unused_accelerator() == ""
    with_plugins(unset, "libtpu")
    there("/dev/accel0")
    assert "does another process hold the TPU?" in devices.find_unused_accelerator()
    there()
    assert devices.find_unused_accelerator() == ""


UNKNOWN = (
    "Unable to initialize backend 'cuda': Backend 'cuda' is not in the list of known backends: ['cpu']. "
    "(set JAX_PLATFORMS='' to automatically choose an available backend)"
)


@pytest.mark.parametrize("asked", ["cuda", "gpu", "tpu", "cuda,cpu"])
def test_a_platform_that_is_not_here(asked, unset, capsys):
    """By JAX's own exceptions: in every verb one line and exit code 2."""
    with_plugins(unset)
    unset.setenv("JAX_PLATFORMS", asked)

    def verb(argv):
        raise RuntimeError(UNKNOWN)

    with pytest.raises(SystemExit) as leave:
        cli.main(verb, [])
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: JAX_PLATFORMS={asked} cannot start: ")
    assert f"pip install -e '.[{'tpu' if asked == 'tpu' else 'cuda'}]'" in line
    assert "automatically choose" not in line


def test_the_assertion_of_jax_without_a_card(unset):
    """Without a card JAX skips "cuda" before it looks for the plugin."""
    unset.setenv("JAX_PLATFORMS", "cuda")
    where = {}
    exec(compile("def backends():\n    assert None is not None", "/x/jax/_src/xla_bridge.py", "exec"), where)
    with pytest.raises(AssertionError) as caught:
        where["backends"]()
    assert "no NVIDIA card is here" in str(devices.platform_error(caught.value))
    # Errors of the program stay what they are.
    with pytest.raises(AssertionError) as own:
        raise AssertionError
    assert devices.platform_error(own.value) is None
    assert devices.platform_error(RuntimeError("out of memory")) is None
    assert devices.platform_error(ValueError(UNKNOWN)) is None


def test_jax_that_cannot_start_though_nobody_asked(unset):
    message = (
        "Unable to initialize backend 'tpu': the lock is held (you may need to uninstall the failing plugin package)"
    )
    said = str(devices.platform_error(RuntimeError(message)))
    assert said.endswith("the lock is held; JAX_PLATFORMS=cpu does without it")


def test_a_full_memory_is_one_line():
    message = "INTERNAL: Error dispatching computation: Out of memory allocating 705468758208 bytes."
    said = str(devices.memory_error(jax.errors.JaxRuntimeError(message)))
    assert said.startswith(
        "a device's memory is full (657.0 GiB were asked for at once): use smaller images, or fewer at once; in training "
        "a smaller config.batch_size"
    )
    assert devices.memory_error(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"))
    assert devices.memory_error(jax.errors.JaxRuntimeError("INTERNAL: lost")) is None
    assert devices.memory_error(ValueError("out of memory")) is None
