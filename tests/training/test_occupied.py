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

from gigagan_jax.errors import UserError
from gigagan_jax.training.loop import Run
from gigagan_jax.training.occupied import FILE, alone
from tests.runs import small

HOLD = """
import sys, time
from pathlib import Path
from gigagan_jax.training.occupied import alone
with alone(Path(sys.argv[1])):
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
    with alone(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()
    with alone(tmp_path):  # and so does one that ended
        pass


def test_a_holder_on_another_machine_is_waited_for(holder, tmp_path, refused):
    (tmp_path / FILE).write_text(json.dumps({"host": "far", "process": 7}))
    began = time.monotonic()
    with pytest.raises(UserError, match="process 7 on far"), alone(tmp_path, patience=1.5):
        pass
    assert time.monotonic() - began > 1.5
    holder.kill()
    holder.wait()
    with alone(tmp_path, patience=1.5):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with alone(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in caplog.text
