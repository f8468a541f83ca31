"""Runs that live in a bucket: whole ones, killed ones, one at a time, and what happens when the server stops to answer.

20 kills of each kind, and 20 pairs of runs, are a command: tools/measure_bucket.py (docs/pods.md).
"""

import os
import subprocess
import sys
import time

import pytest

from gigagan_jax.checkpoint.manager import states_equal
from gigagan_jax.checkpoint.object_store import ObjectStore
from tests.runs import ROOT, child, log, read, small

sys.path.append(str(ROOT / "tools"))  # as for a script there

import measure_bucket
from google_server import google_server

from tests.object_server import Server
from tests.quick import FLAGS

# For processes whose gs:// is a server of this machine.
QUICK = {"XLA_FLAGS": FLAGS}


@pytest.fixture
def server(tmp_path):
    with google_server(tmp_path / "server", {}) as running:
        yield running


def folder(server, run):
    return server.folder / server.bucket / "runs" / run


def start(tmp_path, server, run="a", steps=8, *flags, **more):
    fields = (f"--workdir=gs://bucket/runs/{run}", f"--config.total_kimg={steps * 0.016}", *flags)
    return child(tmp_path / "run", *fields, **server.environment(), **more)


def call(server, *command):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | QUICK | server.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_run_resumes_in_a_bucket(tmp_path, server):
    assert start(tmp_path, server, steps=4).wait(300) == 0, log(tmp_path / "run")
    assert start(tmp_path, server, steps=8).wait(300) == 0, log(tmp_path / "run")
    text = log(tmp_path / "run")
    assert text.count("resume: restoring checkpoint 4") == 1
    assert "samples: gs://bucket/runs/a/snapshots/000000.128kimg.png" in text
    assert "report: gs://bucket/runs/a/report.html" in text
    whole = tmp_path / "whole"
    assert child(whole, "--config.total_kimg=0.128").wait(300) == 0, log(whole)
    # The server keeps objects in files: its folder is what a copy of the bucket would be.
    (a, data_a), (b, data_b) = read(whole, small()), read(folder(server, "a"), small())
    assert states_equal(a, b)
    assert data_a["examples_seen"] == data_b["examples_seen"]
    assert measure_bucket.logged_steps(folder(server, "a")) == measure_bucket.logged_steps(whole)
    names = {p.name for p in folder(server, "a").iterdir()}
    assert {
        "config.json",
        "goodput.jsonl",
        "metrics.jsonl",
        "report.html",
        "run.lock",
        "snapshots",
        "tensorboard",
    } <= names


@pytest.mark.slow
def test_the_verbs_read_a_run_in_a_bucket(tmp_path, server):
    assert start(tmp_path, server, steps=4).wait(300) == 0, log(tmp_path / "run")
    out = tmp_path / "seven.png"
    call(
        server,
        "-m",
        "gigagan_jax.sample",
        "--workdir=gs://bucket/runs/a",
        "--prompt=a handwritten seven",
        f"--out={out}",
    )
    assert out.exists()
    (folder(server, "a") / "report.html").unlink()
    text = call(server, "tools/report.py", "--workdir=gs://bucket/runs/a")
    assert text.startswith("gs://bucket/runs/a/report.html: ")
    page = (folder(server, "a") / "report.html").read_text()
    assert "gs://bucket/runs/a" in page
    assert "data:image/" in page
    # And what was in the bucket goes on in a folder.
    assert child(folder(server, "a"), "--config.total_kimg=0.16").wait(300) == 0, log(folder(server, "a"))


@pytest.mark.slow
def test_weights_and_exports_of_a_run_in_a_bucket(tmp_path, server):
    assert start(tmp_path, server, steps=4).wait(300) == 0, log(tmp_path / "run")
    workdir = "--workdir=gs://bucket/runs/a"
    call(server, "tools/export_weights.py", workdir, f"--out={tmp_path / 'weights'}")
    torch, back = tmp_path / "torch", tmp_path / "back"
    call(server, "tools/convert_checkpoint.py", "--to=pytorch", workdir, f"--out={torch}", "--what=optimizer")
    call(server, "tools/convert_checkpoint.py", "--from=pytorch", f"--input={torch}", f"--out={back}")
    assert (back / "checkpoints/4").is_dir()
    assert (tmp_path / "weights/model.safetensors").exists()
    # Published weights in a bucket are sampled from too.
    store = ObjectStore("gs://bucket/runs/weights")
    store.upload(("config.json", "model.safetensors"), tmp_path / "weights")
    out = f"--out={tmp_path / 'seven.png'}"
    call(server, "-m", "gigagan_jax.sample", "--workdir=gs://bucket/runs/weights", "--prompt=a handwritten seven", out)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills", "faults"), [(1, 4, 0.0), (1, 2, 0.05), (2, 2, 0.0)])
def test_killed_at_random_times_is_bit_exact(tmp_path, processes, kills, faults):
    """SIGKILL and SIGTERM in turn; the first two inside a save."""
    steps = measure_bucket.INTERVAL * (kills + 2)
    whole, mine = tmp_path / "whole", tmp_path / "whole.log"
    assert not any(measure_bucket.start(whole, mine, steps, QUICK, processes).wait()), mine.read_text()
    kinds = ("503", "429", "cut", "lost")
    with google_server(tmp_path / "server", dict.fromkeys(kinds, faults / 4) if faults else None) as server:
        counts = measure_bucket.kill_at_random(
            "gs://bucket/runs/a",
            folder(server, "a"),
            tmp_path / "cut.log",
            server.environment() | QUICK,
            kills=kills,
            steps=steps,
            processes=processes,
        )
        assert counts["kills"] == kills
        assert counts["inside a save"]
        assert measure_bucket.same_end(whole, folder(server, "a"))
        assert measure_bucket.logged_steps(folder(server, "a")) == list(range(1, steps + 1))


@pytest.mark.slow
def test_a_killed_run_at_s3_is_bit_exact(tmp_path):
    whole = tmp_path / "whole"
    assert child(whole, "--config.total_kimg=0.192").wait(300) == 0, log(whole)
    (tmp_path / "empty").mkdir()
    with Server(tmp_path / "empty"):
        run, flags = tmp_path / "run", ("--workdir=s3://bucket/runs/a", "--config.total_kimg=0.192")
        process = child(run, *flags)
        deadline = time.monotonic() + 300
        while log(run).count("kimg 0.1") < 2:
            assert process.poll() is None, log(run)
            assert time.monotonic() < deadline, log(run)
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert child(run, *flags).wait(300) == 0, log(run)
        assert "resume: restoring checkpoint" in log(run)
        store = ObjectStore("s3://bucket/runs/a")
        store.download(store.list_objects(), tmp_path / "copy")
    (a, _), (b, _) = read(whole, small()), read(tmp_path / "copy", small())
    assert states_equal(a, b)


@pytest.mark.slow
def test_of_two_runs_one_trains(tmp_path, server):
    first, second = start(tmp_path, server, steps=40), start(tmp_path, server, steps=40)
    assert sorted([first.wait(300), second.wait(300)]) == [0, 2], log(tmp_path / "run")
    assert "another run is in it" in log(tmp_path / "run")
    assert measure_bucket.logged_steps(folder(server, "a")) == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("403", 2, "check the rights of this machine"),
        ("401", 1, "check the network and the credentials"),
    ],
)
def test_a_server_that_refuses_in_the_middle_ends_the_run_with_one_line(tmp_path, server, kind, code, words):
    flags = ("--config.checkpoint_kimg=0.064", "--config.checkpoint.timeout_seconds=20")
    process = start(tmp_path, server, "a", 100_000, *flags, GIGAGAN_RETRY_SECONDS="5")
    deadline = time.monotonic() + 300
    while not list(folder(server, "a").glob("checkpoints/*/commit_success.txt")):
        assert process.poll() is None, log(tmp_path / "run")
        assert time.monotonic() < deadline, log(tmp_path / "run")
        time.sleep(0.05)
    server.proxy.faults[kind] = 1.0
    assert process.wait(240) == code, log(tmp_path / "run")
    text = log(tmp_path / "run")
    last = text.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in text
    # The same command goes on where it stopped.
    server.proxy.faults.clear()
    steps = max(measure_bucket.finished_steps(folder(server, "a") / "checkpoints"))
    assert start(tmp_path, server, "a", steps + 8).wait(300) == 0, log(tmp_path / "run")
    assert "resume: restoring checkpoint" in log(tmp_path / "run")
