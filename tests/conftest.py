"""Every test sees eight CPU devices and full-precision products; a parity or sharding test that skips fails the run."""

# ruff: noqa: E402  (the environment comes before JAX)

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the time of the tests: little optimisation, and a program that several processes run is compiled once.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
_cache = tempfile.TemporaryDirectory(prefix="gigagan_jax_tests_", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "2"

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

# A test with one of these in its name is worth something only where it runs.
MUST_RUN = ("sharding", "parity", "mesh", "torch")
_skipped: list[str] = []


def _note(report):
    if report.skipped and any(word in report.nodeid.lower() for word in MUST_RUN):
        _skipped.append(report.nodeid)


def pytest_runtest_logreport(report):
    _note(report)


def pytest_collectreport(report):
    _note(report)  # a module that skips itself, with all its tests


def pytest_sessionfinish(session):
    if _skipped:
        session.exitstatus = max(int(session.exitstatus), int(pytest.ExitCode.TESTS_FAILED))


def pytest_terminal_summary(terminalreporter):
    for nodeid in _skipped:
        terminalreporter.write_line(f"FAILED {nodeid}: a test of {', '.join(MUST_RUN)} must not be skipped", red=True)


@pytest.fixture(scope="session")
def tiny():
    """configs/laion.py:tiny in float32, frozen: 16 px, every part at toy width."""
    from configs.laion import get_config
    from gigagan_jax.config import from_dict

    config = get_config("tiny")
    config.dtype = "float32"
    return from_dict(config)
