"""Real processes joined over loopback: one run, whatever their number; one that stops or is lost ends all of them."""

import collections
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 8, 16
COMMAND = (
    *("-m", "gigagan_jax.train", "--config=configs/digits.py:tiny", f"--config.batch_size={BATCH}"),
    *("--config.dtype=float32", f"--config.log_kimg={BATCH / 1000}", "--config.evaluators=()"),
    *(f"--config.checkpoint_kimg={4 * BATCH / 1000}", "--config.snapshot.seeds=1", "--config.checkpoint.keep=9"),
)
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)


class Processes:
    """A run by `count` processes with so many devices each. Their output is in files."""

    def __init__(self, workdir, count, devices, *flags, steps=STEPS):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        flags = (*flags, f"--workdir={workdir}", f"--config.total_kimg={steps * BATCH / 1000}")
        environment = os.environ | {
            "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        }
        self.logs = [workdir.with_suffix(f".{count}x{devices}.{i}.log") for i in range(count)]
        self.children = []
        for i, log in enumerate(self.logs):
            joined = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}")
            command = [sys.executable, *COMMAND, *flags, *(joined if count > 1 else ())]
            with open(log, "w") as out:
                self.children.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )

    def said(self, i=0):
        return self.logs[i].read_text()

    def until_step(self, step):
        """Waits until process 0 has logged a step."""
        end = time.monotonic() + 300
        while len(re.findall(r"^kimg", self.said(), re.MULTILINE)) < step:
            assert time.monotonic() < end, self.said()
            assert all(c.poll() is None for c in self.children), [self.said(i) for i in range(len(self.logs))]
            time.sleep(0.1)

    def wait(self, seconds=300):
        """Exit codes."""
        try:
            return [c.wait(seconds) for c in self.children]
        finally:
            for child in self.children:
                child.kill()


def losses(workdir):
    """Of each step; without R1's, which is logged on from the step that had it, as long as the process lives."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss/") and k != "loss/r1"} for line in lines]


def assert_close(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert x[key] == pytest.approx(y[key], abs=1e-4), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Workdir of a run by one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run = Processes(workdir, 1, 4)
    assert run.wait() == [0], run.said()
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same by two, parameters sharded over them."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    run = Processes(workdir, 2, 2, "--config.mesh.fsdp=2")
    assert run.wait() == [0, 0], run.said(1)
    return workdir


def test_two_processes_parity_with_one(alone, two):
    assert len(losses(alone)) == STEPS
    assert_close(losses(alone), losses(two))
    assert (two / "snapshots").is_dir()


def test_a_checkpoint_of_two_resumes_on_one_and_on_four_parity(alone, two, tmp_path):
    for count, devices in ((1, 2), (4, 1)):
        workdir = tmp_path / f"{count}"
        shutil.copytree(two, workdir)
        shutil.rmtree(workdir / "checkpoints" / str(STEPS))
        run = Processes(workdir, count, devices)
        assert run.wait() == [0] * count, run.said(count - 1)
        assert "resume: restoring checkpoint 4" in run.said()
        assert_close(losses(workdir), losses(alone))


def test_sigterm_to_one_stops_all_in_the_same_step_and_the_run_goes_on(two, tmp_path):
    workdir = tmp_path / "run"
    run = Processes(workdir, 2, 2, "--config.mesh.fsdp=2", steps=1000)
    run.until_step(1)  # the other program is being compiled now: the signal comes early
    run.children[1].send_signal(signal.SIGTERM)
    assert run.wait() == [75, 75], run.said(1)
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    if step >= STEPS:
        pytest.fail(f"stopped at step {step} only")
    run = Processes(workdir, 2, 2, "--config.mesh.fsdp=2")
    assert run.wait() == [0, 0], run.said(1)
    assert losses(workdir) == losses(two)  # to the last bit


def test_what_one_has_to_say_ends_all(tmp_path):
    """One of them does not find its data; the other waits for it."""
    images = tmp_path / "images"
    images.mkdir()
    port = socket.socket()
    port.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{port.getsockname()[1]}"
    port.close()
    commands = [
        [sys.executable, *COMMAND, f"--workdir={tmp_path / 'run'}", f"--coordinator={address}", "--num_processes=2",
         f"--process_id={i}", *(["--config.data.source=folder", f"--config.data.path={images}"] if i else [])]
        for i in range(2)
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    children = [subprocess.Popen(c, **pipes) for c in commands]
    said = [c.communicate(timeout=120)[1] for c in children]
    assert [c.returncode for c in children] == [2, 2]
    errors = [[line for line in text.splitlines() if line.startswith("error")] for text in said]
    assert errors[1][0].startswith(f"error: no image in {images}")
    assert errors[0] == [f"error: process 1 failed, and with it this one: {errors[1][0].removeprefix('error: ')}"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others(number, tmp_path):
    run = Processes(tmp_path / "run", 2, 1, "--heartbeat_seconds=8", steps=100_000)
    run.until_step(2)
    run.children[1].send_signal(number)
    began = time.monotonic()
    code = run.children[0].wait(60)
    assert code != 0
    assert time.monotonic() - began < 30
    run.children[1].kill()
    run.wait()
    counted = collections.Counter(re.findall(r"^error: .*", run.said(), re.MULTILINE))
    assert counted == {"error: process 1 has not answered for 8 s: its machine is lost, or it was stopped": 1}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--coordinator=nowhere"], "HOST:PORT"),
        (["--coordinator=127.0.0.1:1"], "needs --num_processes"),
        (["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"], "must be 0 to 1"),
        (["--process_id=1"], "need --coordinator"),
        (["--distributed"], "could not be joined"),
    ],
)
def test_flags_that_do_not_fit(flags, words, tmp_path):
    command = [sys.executable, *COMMAND, f"--workdir={tmp_path / 'run'}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line
