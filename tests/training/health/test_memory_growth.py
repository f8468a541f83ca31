"""Host memory over days: a leak is a finding, what goes up and down or jumps once is none."""

import json
import logging
import types

import numpy as np
import pytest

from gigagan_jax.config import Config
from gigagan_jax.training.health.memory_growth import MemoryGrowth
from gigagan_jax.training.health.monitor import HealthMonitor
from gigagan_jax.training.health.recovery import HealthGuard

HOURS = 24 * 5


def findings(readings, spacing=60.0):
    """Numbers of the readings that are findings."""
    growth = MemoryGrowth()
    return [i for i, gib in enumerate(readings) if growth.add_reading(float(gib), i * spacing)]


def test_a_leak_of_a_gigabyte_an_hour():
    noise = np.random.default_rng(0).normal(0, 0.05, 60 * HOURS)
    found = findings(8 + np.arange(60 * HOURS) / 60 + noise)
    # 2 GiB above the baseline after two hours and a half, and 20 minutes until all readings are.
    assert 140 < found[0] < 200
    # Once for each factor of 1.5, not once a minute.
    assert 5 <= len(found) <= 9


def test_a_slow_leak_of_a_large_process():
    assert not findings(100 + np.arange(1000) * 0.019)
    assert findings(100 + np.arange(2000) * 0.019)


@pytest.mark.parametrize(
    "readings",
    [
        np.full(3000, 20.0),
        # Caches that fill in the first half hour.
        20 - 12 * np.exp(-np.arange(3000) / 8),
        # An evaluator that is loaded later, and stays.
        np.where(np.arange(3000) < 600, 8.0, 14.0),
        # Snapshots and checkpoints that come and go.
        8 + 6.0 * (np.arange(3000) % 15 < 4),
        # A little more each hour: less than 2 GiB.
        4 + np.arange(3000) * 0.0006,
        # Up, and down again.
        8 + 1.5 * np.sin(np.arange(3000) / 200),
    ],
    ids=["flat", "caches", "jump", "spikes", "little", "waves"],
)
def test_what_is_no_leak(readings):
    assert not findings(readings)


def test_lines_that_come_every_second_are_not_a_day():
    assert not findings(8 + np.arange(600) / 30, spacing=1.0)


def test_a_finding_is_in_the_report_and_the_log(tmp_path, caplog):
    vector = types.SimpleNamespace(measures=())
    guard = HealthGuard(Config(), vector, tmp_path, types.SimpleNamespace(state=dict))
    with caplog.at_level(logging.WARNING):
        for i in range(300):
            guard.observe_memory(i, i * 64, 8 + i / 60, 60.0 * i)
    (record,) = caplog.records
    assert "memory: the memory of the host has grown from 8.5 to 1" in record.getMessage()
    assert "config.data.workers" in record.getMessage()
    (finding,) = json.loads((tmp_path / "health_report.json").read_text())["findings"]
    assert (finding["name"], finding["action"]) == ("memory", "warn")
    # It survives a checkpoint, and asks for no rollback.
    monitor = HealthMonitor(Config(), ())
    monitor.restore(guard.checkpoint_position()["health"])
    assert monitor.findings == guard.monitor.findings
    assert guard.rollback is None


def test_off(tmp_path):
    import dataclasses

    config = Config()
    config = dataclasses.replace(config, health=dataclasses.replace(config.health, memory="off"))
    guard = HealthGuard(config, types.SimpleNamespace(measures=()), tmp_path, types.SimpleNamespace(state=dict))
    for i in range(300):
        guard.observe_memory(i, i * 64, 8 + i / 60, 60.0 * i)
    assert not guard.monitor.findings
