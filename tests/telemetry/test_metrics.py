"""MetricLogger: metrics.jsonl and the TensorBoard events, also after kills and resumes."""

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

import gigagan_jax
from gigagan_jax.core.errors import UserError
from gigagan_jax.telemetry.metrics import MetricLogger

# Child processes import the package that is tested, wherever pytest was started.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gigagan_jax.__file__).parents[1])}


def read_lines(workdir):
    def no_constant(name):
        # Python's parser accepts NaN and Infinity; others do not.
        raise AssertionError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    # Each line is complete when the call returns.
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def read_events(workdir):
    """All TensorBoard events of a workdir, in the order in which they were written."""
    out = []
    # Names have a time in them, so their order is that of writing.
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            # The TFRecord format.
            (size,) = struct.unpack_from("<Q", data, at)  # length, its checksum, the event, its checksum
            payload = data[at + 12 : at + 12 + size]
            assert struct.unpack_from("<I", data, at + 12 + size) == (masked_crc32c(payload),)
            out.append(Event.FromString(payload))
            at += 16 + size
    return out


def test_a_line_and_an_event_for_each_call(tmp_path):
    with MetricLogger(tmp_path / "new" / "run", clock=lambda: 1700000000.5) as log:
        log.log_scalars(10, 0.16, {"loss/g": 0.5, "loss/d": np.float32(0.25), "grad_norm/g": jnp.float32(2), "n": 3})
        # 1.5 is exact in bfloat16.
        log.log_scalars(20, 0.32, {"loss/g": jnp.bfloat16(1.5)})
    assert read_lines(tmp_path / "new" / "run") == [
        {"step": 10, "kimg": 0.16, "time": 1700000000.5, "loss/g": 0.5, "loss/d": 0.25, "grad_norm/g": 2.0, "n": 3.0},
        {"step": 20, "kimg": 0.32, "time": 1700000000.5, "loss/g": 1.5},
    ]
    scalars = [
        (e.step, v.tag, v.simple_value, e.wall_time)
        for e in read_events(tmp_path / "new" / "run")
        for v in e.summary.value
    ]
    assert (10, "loss/d", 0.25, 1700000000.5) in scalars
    assert (20, "loss/g", 1.5, 1700000000.5) in scalars
    assert len(scalars) == 5


def test_nan_and_infinity_are_null_in_the_file_and_themselves_in_the_events(tmp_path):
    with MetricLogger(tmp_path) as log:
        log.log_scalars(1, 0.1, {"a": float("nan"), "b": jnp.inf, "c": -np.inf, "d": 1.0})
    (line,) = read_lines(tmp_path)
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 1.0)
    values = {v.tag: v.simple_value for e in read_events(tmp_path) for v in e.summary.value}
    assert math.isnan(values["a"])
    assert values["b"] == math.inf
    assert values["c"] == -math.inf


def test_images_go_to_the_events(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    with MetricLogger(tmp_path) as log:
        log.log_image("samples", 7, image)
        with pytest.raises(ValueError, match="'samples' must be uint8"):
            # Floats: TensorBoard would show them black.
            log.log_image("samples", 7, image / 255)
    ((step, value),) = [(e.step, v) for e in read_events(tmp_path) for v in e.summary.value]
    assert step == 7
    assert value.tag == "samples"
    assert (value.image.height, value.image.width) == (8, 12)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string))), image)


def test_what_is_written_can_be_read_at_once(tmp_path):
    log = MetricLogger(tmp_path)
    log.log_scalars(1, 0.1, {"a": 1})
    assert [line["step"] for line in read_lines(tmp_path)] == [1]
    log.flush()
    assert [e.step for e in read_events(tmp_path) if e.summary.value] == [1]
    log.close()
    log.close()


def test_tensorboard_can_follow_without_a_flush(tmp_path):
    now = 0.0
    with MetricLogger(tmp_path, clock=lambda: now) as log:
        log.log_scalars(1, 0.1, {"a": 1})
        # Past _FLUSH_SECONDS.
        now = 31.0
        log.log_scalars(2, 0.2, {"a": 1})
        assert [e.step for e in read_events(tmp_path) if e.summary.value] == [1, 2]


def test_events_of_a_long_run_are_in_several_files(tmp_path):
    """What a lost machine had open is not all of them."""
    now = 0.0
    with MetricLogger(tmp_path, clock=lambda: now) as log:
        for step in range(1, 5):
            log.log_scalars(step, step / 10, {"a": 1})
            # Two calls fit into _FILE_SECONDS.
            now += 500
    assert [e.step for e in read_events(tmp_path) if e.summary.value] == [1, 2, 3, 4]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_other_processes_write_nothing(tmp_path):
    with MetricLogger(tmp_path / "run", enabled=False) as log:
        log.log_scalars(1, 0.1, {"a": 1.0})
        log.log_image("samples", 1, np.zeros((4, 4, 3), np.uint8))
        log.flush()
    # Not even the workdir: process 0 makes it.
    assert not list(tmp_path.iterdir())


def test_resume_takes_out_later_steps_and_a_half_line(tmp_path):
    with MetricLogger(tmp_path) as log:
        for step in (10, 20, 30, 40):
            log.log_scalars(step, step / 100, {"a": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        # A line cut off by a kill.
        file.write('{"step": 50, "kimg": 0.5, "ti')
    with MetricLogger(tmp_path, resume_step=20) as log:
        assert [line["step"] for line in read_lines(tmp_path)] == [10, 20]
        log.log_scalars(30, 0.3, {"a": -1})
    assert [(line["step"], line["a"]) for line in read_lines(tmp_path)] == [(10, 10), (20, 20), (30, -1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    # TensorBoard discards what a session start of step 21 finds at 21 and later
    found = [("start" if e.HasField("session_log") else "scalar", e.step) for e in read_events(tmp_path) if e.step]
    assert found == [("scalar", n) for n in (10, 20, 30, 40)] + [("start", 21), ("scalar", 30)]


def test_resume_of_an_untouched_file_leaves_its_bytes_alone(tmp_path):
    with MetricLogger(tmp_path) as log:
        log.log_scalars(10, 0.1, {"a": 1 / 3})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    # The file is not replaced: readers such as `tail -f` keep following it.
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    MetricLogger(tmp_path, resume_step=10).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    # The kill came between the text and its newline.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kimg": 0.1, "time": 0}')
    with MetricLogger(tmp_path, resume_step=5) as log:
        log.log_scalars(6, 0.6, {})
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 6]


def test_unreadable_lines_are_dropped_with_a_warning(tmp_path, caplog):
    # Not UTF-8, no object, and an object without a step.
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\x00\n[3]\n{"kimg": 2}\n{"step": 2}\n')
    MetricLogger(tmp_path, resume_step=5).close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]
    assert "dropped 3 unreadable lines" in caplog.text


def test_a_start_from_nothing_leaves_no_line_of_a_run_that_died_before_its_first_checkpoint(tmp_path):
    with MetricLogger(tmp_path) as log:
        log.log_scalars(0, 0, {"a": 1})
        log.log_scalars(5, 0.1, {"a": 1})
    with MetricLogger(tmp_path) as log:
        log.log_scalars(0, 0, {"a": 2})
    assert [(line["step"], line["a"]) for line in read_lines(tmp_path)] == [(0, 2)]
    assert [e.step for e in read_events(tmp_path) if e.HasField("session_log")] == [0]


def test_a_killed_run_leaves_lines_that_a_resume_reads(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys
        from gigagan_jax.telemetry.metrics import MetricLogger
        log = MetricLogger(sys.argv[1])
        for step in range(1, 51):
            log.log_scalars(step, step / 10, {"a": step})
        # No flush and no close.
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    with MetricLogger(tmp_path, resume_step=40) as log:
        log.log_scalars(41, 4.1, {"a": 0})
    assert [line["step"] for line in read_lines(tmp_path)] == [*range(1, 41), 41]


@pytest.mark.parametrize("value", [np.zeros(2), "1.0", None, [1.0]])
def test_a_metric_is_one_number(tmp_path, value):
    with MetricLogger(tmp_path) as log, pytest.raises(ValueError, match="metric 'a' must be one number"):
        log.log_scalars(1, 0.1, {"a": value})
    assert read_lines(tmp_path) == []


@pytest.mark.parametrize("name", ["step", "kimg", "time"])
def test_a_metric_cannot_take_the_name_of_a_field(tmp_path, name):
    with MetricLogger(tmp_path) as log, pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        log.log_scalars(1, 0.1, {name: 1.0})


def test_a_workdir_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write metrics to .*; choose a workdir"):
        MetricLogger(tmp_path / "file" / "run")
    # A folder in the place of the file: permissions would not stop root.
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write metrics"):
        MetricLogger(tmp_path / "run")
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="cannot write metrics"):
        MetricLogger(tmp_path)
    with pytest.raises(UserError, match="local folder, got gs://bucket/run"):
        MetricLogger("gs://bucket/run")
