"""Real processes joined over loopback: one run, whatever their number; one that stops or is lost ends all of them."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from gigagan_jax import train
from gigagan_jax.checkpoint.manager import states_equal
from tests import quick
from tests.runs import read, small

ROOT = Path(__file__).parents[2]
# The training command, which also records the examples of each batch.
RECORDED = Path(__file__).with_name("recorded_run.py")
STEPS, BATCH = 8, 16
# float32, and one log line a step: losses are compared across numbers of processes.
FLAGS = (
    *("--config=configs/digits.py:tiny", f"--config.batch_size={BATCH}"),
    *("--config.dtype=float32", f"--config.log_kimg={BATCH / 1000}", "--config.evaluators=()"),
    *(f"--config.checkpoint_kimg={2 * BATCH / 1000}", "--config.snapshot.seeds=1", "--config.checkpoint.keep=9"),
)
COMMAND = ("-m", "gigagan_jax.train", *FLAGS)


# The same meshes and lengths all through the file: what one test has compiled the next one finds.
# More steps than any test waits for: these runs end by a fault.
LONG = 100_000
SHARDED = ("--config.mesh.fsdp=2",)
CONFIG = small(batch_size=BATCH)


class Processes:
    """A run by `count` processes with so many devices each. Their output is in files, and the examples they read."""

    def __init__(self, workdir, count, devices, *flags, steps=STEPS, name=""):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            # The port is free again when the run takes it; another process may take it first, which is rare.
            port = s.getsockname()[1]
        flags = (*FLAGS, *flags, f"--workdir={workdir}", f"--config.total_kimg={steps * BATCH / 1000}")
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"{quick.FLAGS} --xla_force_host_platform_device_count={devices}",
            # Otherwise the parity between numbers of processes would be that of bfloat16.
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        }
        name = f"{workdir}.{name}.{count}x{devices}"
        self.logs = [Path(f"{name}.{i}.log") for i in range(count)]
        self.records = [Path(f"{name}.{i}.examples") for i in range(count)]
        self.children = []
        for i, log in enumerate(self.logs):
            joined = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}")
            # A single process runs without a coordinator, as users start it.
            command = [sys.executable, RECORDED, self.records[i], *flags, *(joined if count > 1 else ())]
            with open(log, "w") as out:
                self.children.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )

    def read_examples(self):
        """Step -> the indices of its batch, from all processes; no row read twice."""
        batches = {}
        for record in self.records:
            for seen, rows, indices in map(json.loads, record.read_text().splitlines()):
                batch = batches.setdefault(seen // BATCH, {})
                assert not batch.keys() & set(rows)
                batch.update(zip(rows, indices, strict=True))
        assert all(sorted(batch) == list(range(BATCH)) for batch in batches.values())
        return {step: [batch[row] for row in range(BATCH)] for step, batch in batches.items()}

    def read_log(self, i=0):
        return self.logs[i].read_text()

    def until_step(self, step):
        """Waits until process 0 has logged a step."""
        end = time.monotonic() + 300
        # Each step logs one line that starts with kimg.
        while len(re.findall(r"^kimg", self.read_log(), re.MULTILINE)) < step:
            assert time.monotonic() < end, self.read_log()
            # A process that ended early would make this wait until the limit.
            assert all(c.poll() is None for c in self.children), [self.read_log(i) for i in range(len(self.logs))]
            time.sleep(0.05)

    def wait_for_exit(self, seconds=300):
        """Exit codes."""
        try:
            return [c.wait(seconds) for c in self.children]
        finally:
            for child in self.children:
                # Also when a wait timed out: no process may outlive its test.
                child.kill()


def read_losses(workdir):
    """Of each step; without R1's, which is logged on from the step that had it, as long as the process lives."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss/") and k != "loss/r1"} for line in lines]


def assert_close(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            # Sums over devices have another order, so float32 losses differ in the last digits.
            assert x[key] == pytest.approx(y[key], abs=1e-4), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(workdir, examples) of a run by one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run = Processes(workdir, 1, 4)
    assert run.wait_for_exit() == [0], run.read_log()
    return workdir, run.read_examples()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The same by four, parameters sharded over two of them."""
    workdir = tmp_path_factory.mktemp("four") / "run"
    run = Processes(workdir, 4, 2, *SHARDED)
    assert run.wait_for_exit() == [0] * 4, run.read_log(3)
    return workdir, run.read_examples()


@pytest.mark.slow
def test_two_and_four_processes_parity_with_one(alone, four, tmp_path):
    two = Processes(tmp_path / "two", 2, 2, *SHARDED)
    assert two.wait_for_exit() == [0, 0], two.read_log(1)
    workdir, examples = alone
    assert len(read_losses(workdir)) == STEPS
    assert_close(read_losses(workdir), read_losses(four[0]))
    assert_close(read_losses(workdir), read_losses(tmp_path / "two"))
    assert list(examples) == list(range(1, STEPS + 1))
    assert four[1] == two.read_examples() == examples
    once = [index for step in examples.values() for index in step]
    assert len(set(once)) == len(once) == STEPS * BATCH  # within the first epoch none comes again


@pytest.mark.slow
def test_a_checkpoint_of_four_resumes_on_two_on_one_and_on_four_parity(alone, four, tmp_path):
    """Each goes on from what the one before has left; in the end every example was used once, in the same order."""
    workdir = tmp_path / "run"
    # A copy: the module's other tests use the original.
    shutil.copytree(four[0], workdir)
    examples = {step: four[1][step] for step in (1, 2)}
    for start, count in ((2, 2), (4, 1), (6, 4)):
        for step in range(start + 2, STEPS + 1, 2):  # as if it had been stopped before
            shutil.rmtree(workdir / "checkpoints" / str(step))
        run = Processes(workdir, count, 2, *SHARDED, name=f"{start}")
        assert run.wait_for_exit() == [0] * count, run.read_log(count - 1)
        assert f"resume: restoring checkpoint {start}" in run.read_log()
        read_again = run.read_examples()
        assert list(read_again) == list(range(start + 1, STEPS + 1))
        examples |= {step: read_again[step] for step in (start + 1, start + 2)}
    assert examples == alone[1]
    assert_close(read_losses(workdir), read_losses(alone[0]))


@pytest.mark.slow
def test_sigterm_to_one_of_four_stops_all_in_the_same_step_and_the_run_goes_on(four, tmp_path):
    workdir = tmp_path / "run"
    run = Processes(workdir, 4, 2, *SHARDED, name="stopped")
    run.until_step(1)
    # Not process 0: the signal must travel to all.
    run.children[2].send_signal(signal.SIGTERM)
    assert run.wait_for_exit() == [75] * 4, [run.read_log(i) for i in range(4)]
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    if step >= STEPS:
        # The signal came after the last step, and the test would prove nothing.
        pytest.fail(f"stopped at step {step} only")
    run = Processes(workdir, 4, 2, *SHARDED)
    assert run.wait_for_exit() == [0] * 4, run.read_log(3)
    assert f"resume: restoring checkpoint {step}" in run.read_log()
    assert read_losses(workdir) == read_losses(four[0])  # to the last bit
    (a, data_a), (b, data_b) = read(workdir, CONFIG), read(four[0], CONFIG)
    assert states_equal(a, b)
    assert data_a == data_b


def run_two(workdir, *flags_of_second):
    """Two processes, the second with flags of its own -> (exit codes, lines of errors)"""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{port.getsockname()[1]}"
    commands = [
        [sys.executable, *COMMAND, f"--workdir={workdir}", f"--coordinator={address}", "--num_processes=2",
         f"--process_id={i}", *(flags_of_second if i else [])]
        for i in range(2)
    ]  # fmt: skip
    # Separate pipes: both processes print errors.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    children = [subprocess.Popen(c, **pipes) for c in commands]
    outputs = [c.communicate(timeout=120)[1] for c in children]
    errors = [[line for line in text.splitlines() if line.startswith("error")] for text in outputs]
    return [c.returncode for c in children], errors


def test_what_one_has_to_say_ends_all(tmp_path):
    """One of them does not find its data; the other waits for it."""
    images = tmp_path / "images"
    images.mkdir()
    codes, errors = run_two(tmp_path / "run", "--config.data.source=folder", f"--config.data.path={images}")
    assert codes == [2, 2]
    assert errors[1][0].startswith(f"error: no image in {images}")
    assert errors[0] == [f"error: process 1 failed, and with it this one: {errors[1][0].removeprefix('error: ')}"]


def test_processes_with_different_settings_do_not_train(tmp_path):
    """Their parameters would differ, and nothing would say so."""
    rate = small().g_optimizer.learning_rate
    codes, errors = run_two(tmp_path / "run", "--config.g_optimizer.learning_rate=0.1")
    assert codes == [2, 2]
    assert errors[1][0].startswith(
        f"error: process 1 differs from process 0: config.g_optimizer.learning_rate is 0.1 here and {rate} there; start all"
    )
    assert errors[0] == [f"error: process 1 failed, and with it this one: {errors[1][0].removeprefix('error: ')}"]


@pytest.mark.parametrize(
    "count, lost, number",
    [
        pytest.param(4, 3, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(4, 2, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, 0, signal.SIGSTOP, marks=pytest.mark.slow),
        (2, 0, signal.SIGKILL),
    ],
)
def test_a_lost_process_ends_the_others(count, lost, number, tmp_path):
    """All others end, not with code 0, within the limit and some seconds, each with one line that says who was lost."""
    # Short for a test, but longer than a pause of a busy machine.
    limit = 8
    run = Processes(tmp_path / "run", count, 1, f"--heartbeat_seconds={limit}", steps=LONG)
    run.until_step(2)
    time.sleep(2)  # for the heartbeats to tell
    run.children[lost].send_signal(number)
    began = time.monotonic()
    others = [i for i in range(count) if i != lost]
    codes = [run.children[i].wait(60) for i in others]
    assert time.monotonic() - began < limit + 20
    # SIGSTOP leaves a process that wait() would never see end.
    run.children[lost].kill()
    run.wait_for_exit()
    assert codes == [1] * len(others)
    # The last heartbeat names the host, the step and the position in the data.
    gone = rf"process {lost} \(host \S+, last at step \d+, example \d+\) "
    silent = rf"has not answered for {limit} s: its machine is lost, or it was stopped"
    # The store is in process 0: its connection closes at once, without a timeout.
    if lost == 0 and number == signal.SIGKILL:
        silent = "has closed its connection: it was killed, or its machine is lost"
    for i in others:
        (line,) = re.findall(r"^error: .*", run.read_log(i), re.MULTILINE)
        prefix = "" if i == 0 or lost == 0 else "process 0 failed, and with it this one: "
        assert re.fullmatch(f"error: {prefix}{gone}{silent}", line)
        assert "Check failure stack trace" not in run.read_log(i)


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_ends_all(tmp_path):
    """The others wait for its part of the checkpoint; what it has to say does not wait for them."""
    run = Processes(tmp_path / "run", 2, 2, *SHARDED)
    run.until_step(1)
    # A limit on file sizes makes the next write of that process fail, as a full disk would.
    resource.prlimit(run.children[1].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert run.wait_for_exit(120) == [2, 2], [run.read_log(i) for i in (0, 1)]
    errors = [re.findall(r"^error: (.*)", run.read_log(i), re.MULTILINE) for i in (0, 1)]
    assert re.match(r"cannot write a checkpoint to .*File too large", errors[1][0])
    assert errors[0] == [f"process 1 failed, and with it this one: {errors[1][0]}"]
    assert all("Traceback" not in run.read_log(i) for i in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_processes_that_answer_but_get_no_step_done_are_ended(count, tmp_path):
    """Reading the data hangs, as on a disk over a network that is gone: pipes that nobody writes to."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4 * BATCH):
        Image.new("RGB", (8, 8), (4 * i, 0, 0)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a picture")
    data = ("--config.data.source=folder", f"--config.data.path={images}", "--config.data.threads=0")
    run = Processes(tmp_path / "run", count, 1, *data, "--stall_seconds=4", steps=LONG)
    run.until_step(2)
    for file in images.glob("*.png"):
        # Opening a pipe without a writer blocks forever, as a dead network disk does.
        os.mkfifo(tmp_path / "pipe")
        os.replace(tmp_path / "pipe", file)
    assert run.wait_for_exit(60) == [1] * count
    (line,) = re.findall(r"^error: .*", run.read_log(), re.MULTILINE)
    alone = r"no step was finished for 4 s after step \d+: data or a device"
    joined = r"no process has finished a step for 4 s after step \d+: (behind the others is|all are at)"
    assert re.match(f"error: {alone if count == 1 else joined}", line)
    assert line.removeprefix("error: ") in run.read_log(count - 1)


# Nobody listens at port 1.
NOBODY = ("--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--coordinator=nowhere"], "HOST:PORT"),
        (["--coordinator=127.0.0.1:1"], "needs --num_processes"),
        (["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"], "must be 0 to 1"),
        (["--process_id=1"], "need --coordinator"),
        ([*NOBODY, "--join_seconds=0"], "--join_seconds=0: must be at least 1"),
    ],
)
def test_flags_that_do_not_fit(flags, words, tmp_path, refused):
    refused(lambda: train.verb([*COMMAND[2:], f"--workdir={tmp_path / 'run'}", *flags]), words)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--distributed"], "--distributed found no cluster around this machine"),
        ([*NOBODY, "--join_seconds=3"], "not all came within 3 s"),
    ],
)
def test_others_that_are_not_there(flags, words, tmp_path):
    command = [sys.executable, *COMMAND, f"--workdir={tmp_path / 'run'}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == (1 if words.startswith("not all came") else 2)
    # JAX's client may speak too, of a cluster that never was.
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in done.stderr
