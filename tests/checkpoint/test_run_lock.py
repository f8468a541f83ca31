"""A workdir takes one run at a time."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from gigagan_jax.checkpoint import consistency, run_lock
from gigagan_jax.checkpoint.run_lock import hold_run_lock
from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.core.workdir_files import HEARTBEAT_FILE, LOCK_FILE
from gigagan_jax.training.loop import Run
from tests.runs import small

HOLD = """
import sys, time
from pathlib import Path
from gigagan_jax.checkpoint.run_lock import hold_run_lock
with hold_run_lock(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_a_second_run_is_kept_out_and_changes_nothing(holder, tmp_path, refused):
    before = sorted(tmp_path.iterdir())
    refused(
        lambda: Run(small(), tmp_path).train(),
        tmp_path,
        f"another run is in it (process {holder.pid} on {socket.gethostname()})",
        "choose another folder",
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_killed_run_leaves_the_workdir_free(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    with hold_run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()
    with hold_run_lock(tmp_path):  # and so does one that ended
        pass
    assert time.monotonic() - began < 5
    assert not (tmp_path / HEARTBEAT_FILE).exists()


def test_a_lock_of_another_machine_is_waited_for_and_left_to_launchers(holder, tmp_path, monkeypatch):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "far", "boot": "other", "process": 7}))
    with pytest.raises(Unreachable, match="process 7 on far"), hold_run_lock(tmp_path, patience=1.5):
        pass
    monkeypatch.setattr(run_lock, "_boot_id", lambda: "other")
    with pytest.raises(UserError, match="process 7 on far") as now, hold_run_lock(tmp_path):
        pass
    assert now.value.code == 2


def no_locks(monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)


def test_where_there_are_no_locks_signs_of_life_keep_out(tmp_path, monkeypatch, caplog):
    """As on a bucket that two machines have mounted."""
    no_locks(monkeypatch)
    with hold_run_lock(tmp_path, beat=0.2):
        assert "cannot be locked (No locks available)" in caplog.text
        for boot in (run_lock._boot_id(), "elsewhere"):  # on this machine, and on another one
            with monkeypatch.context() as where:
                where.setattr(run_lock, "_boot_id", lambda boot=boot: boot)
                with pytest.raises(UserError, match="another run is in it"), hold_run_lock(tmp_path, beat=0.5):
                    pass
    (tmp_path / HEARTBEAT_FILE).write_text(json.dumps({"host": "far", "boot": "gone", "process": 7, "count": 3}))
    with hold_run_lock(tmp_path, beat=0.2):  # it has died
        assert run_lock.read_heartbeat(tmp_path)["process"] == os.getpid()


# ---------------------------------------------------------------- processes of one run


@pytest.fixture
def second(monkeypatch):
    """second(what process 0 says): this is process 1 of 2."""

    def second(theirs, run):
        monkeypatch.setattr("jax.process_count", lambda: 2)
        monkeypatch.setattr("jax.process_index", lambda: 1)
        monkeypatch.setattr(consistency.communication, "broadcast_from_main", lambda mine: [theirs, run])

    return second


def test_processes_that_differ_are_told_apart(tmp_path, second, refused):
    with hold_run_lock(tmp_path):
        second(consistency._comparable_values(small(), "a"), run_lock.read_heartbeat(tmp_path)["run"])
        consistency.assert_same_on_all_processes(small(), "a", tmp_path)
        consistency.assert_same_on_all_processes(small(data__threads=3, data__path="/elsewhere"), "a", tmp_path)
        refused(
            lambda: consistency.assert_same_on_all_processes(small(), "b", tmp_path),
            "process 1",
            "the data is b here and a there",
        )
        other = small(generator__z_dim=16, log_kimg=7.0)
        refused(
            lambda: consistency.assert_same_on_all_processes(other, "a", tmp_path),
            "config.generator.z_dim is 16 here",
            "log_kimg is 7.0",
        )
        refused(
            lambda: consistency.assert_same_on_all_processes(small(), "a", tmp_path / "own", seconds=0.1),
            "is not that of process 0",
        )
        (tmp_path / "own").mkdir()
        with hold_run_lock(tmp_path / "own"):
            refused(
                lambda: consistency.assert_same_on_all_processes(small(), "a", tmp_path / "own", seconds=0.1),
                "not that of process 0",
            )


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, refused):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock, "_write_heartbeat", full)

    def start():
        with hold_run_lock(tmp_path):
            pass

    refused(start, tmp_path, "No space left on device")
