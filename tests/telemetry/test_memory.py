"""What a process and its workers have in memory, and the devices' peak."""

import os
import subprocess
import sys
import types

import numpy as np

from gigagan_jax.telemetry import memory
from gigagan_jax.telemetry.console import TrainingProgress
from gigagan_jax.telemetry.memory import child_processes, memory_metrics, resident_memory


def test_what_a_process_holds_is_seen():
    before = resident_memory(os.getpid())
    block = np.ones(64 << 20, np.uint8)
    assert before > 10 << 20
    assert resident_memory(os.getpid()) - before > 50 << 20
    del block


def test_workers_are_seen():
    command = [sys.executable, "-c", "print(flush=True); input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        # It is up, and has its memory.
        child.stdout.readline()
        assert child.pid in child_processes()
        values = memory_metrics([])
        assert values["memory/workers_gib"] > 0.001
        assert resident_memory(child.pid) > 1 << 20
    finally:
        child.communicate(b"\n")
    assert resident_memory(child.pid) == 0


def test_the_devices():
    device = lambda **stats: types.SimpleNamespace(memory_stats=lambda: stats)
    values = memory_metrics([device(peak_bytes_in_use=3 << 30), device(peak_bytes_in_use=5 << 30)], [])
    assert values["memory/device_peak_gib"] == 5
    # CPUs do not tell.
    assert memory_metrics([types.SimpleNamespace(memory_stats=lambda: None)], []).keys() == {"memory/host_gib"}


def test_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert resident_memory(os.getpid()) > 10 << 20
    assert resident_memory(1) == 0
    assert memory_metrics([])["memory/host_gib"] > 0.01


def test_the_progress_line():
    line = TrainingProgress(1.0).format_line({"memory/host_gib": 6.12, "memory/device_peak_gib": 20.4})
    assert line.endswith("| GiB host 6.1  device 20.4")
