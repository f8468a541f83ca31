import io
import json
import logging
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
from gigagan_jax.telemetry.console import Progress, configure
from gigagan_jax.telemetry.metrics import MetricLogger

# Child processes import the package that is tested, wherever pytest was started.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gigagan_jax.__file__).parents[1])}


def lines(workdir):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def events(workdir):
    """All TensorBoard events of a workdir, in the order in which they were written."""
    out = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)  # length, its checksum, the event, its checksum
            payload = data[at + 12 : at + 12 + size]
            assert struct.unpack_from("<I", data, at + 12 + size) == (masked_crc32c(payload),)
            out.append(Event.FromString(payload))
            at += 16 + size
    return out


# MetricLogger


def test_a_line_and_an_event_for_each_call(tmp_path):
    with MetricLogger(tmp_path / "new" / "run", clock=lambda: 1700000000.5) as log:
        log.scalars(10, 0.16, {"loss/g": 0.5, "loss/d": np.float32(0.25), "grad_norm/g": jnp.float32(2), "n": 3})
        log.scalars(20, 0.32, {"loss/g": jnp.bfloat16(1.5)})
    assert lines(tmp_path / "new" / "run") == [
        {"step": 10, "kimg": 0.16, "time": 1700000000.5, "loss/g": 0.5, "loss/d": 0.25, "grad_norm/g": 2.0, "n": 3.0},
        {"step": 20, "kimg": 0.32, "time": 1700000000.5, "loss/g": 1.5},
    ]
    scalars = [
        (e.step, v.tag, v.simple_value, e.wall_time) for e in events(tmp_path / "new" / "run") for v in e.summary.value
    ]
    assert (10, "loss/d", 0.25, 1700000000.5) in scalars
    assert (20, "loss/g", 1.5, 1700000000.5) in scalars
    assert len(scalars) == 5


def test_nan_and_infinity_are_null_in_the_file_and_themselves_in_the_events(tmp_path):
    with MetricLogger(tmp_path) as log:
        log.scalars(1, 0.1, {"a": float("nan"), "b": jnp.inf, "c": -np.inf, "d": 1.0})
    (line,) = lines(tmp_path)
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 1.0)
    values = {v.tag: v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert math.isnan(values["a"])
    assert values["b"] == math.inf
    assert values["c"] == -math.inf


def test_images_go_to_the_events(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    with MetricLogger(tmp_path) as log:
        log.image("samples", 7, image)
        with pytest.raises(ValueError, match="'samples' must be uint8"):
            log.image("samples", 7, image / 255)
    ((step, value),) = [(e.step, v) for e in events(tmp_path) for v in e.summary.value]
    assert step == 7
    assert value.tag == "samples"
    assert (value.image.height, value.image.width) == (8, 12)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string))), image)


def test_what_is_written_can_be_read_at_once(tmp_path):
    log = MetricLogger(tmp_path)
    log.scalars(1, 0.1, {"a": 1})
    assert [line["step"] for line in lines(tmp_path)] == [1]
    log.flush()
    assert [e.step for e in events(tmp_path) if e.summary.value] == [1]
    log.close()
    log.close()


def test_tensorboard_can_follow_without_a_flush(tmp_path):
    now = 0.0
    with MetricLogger(tmp_path, clock=lambda: now) as log:
        log.scalars(1, 0.1, {"a": 1})
        now = 31.0
        log.scalars(2, 0.2, {"a": 1})
        assert [e.step for e in events(tmp_path) if e.summary.value] == [1, 2]


def test_events_of_a_long_run_are_in_several_files(tmp_path):
    """What a lost machine had open is not all of them."""
    now = 0.0
    with MetricLogger(tmp_path, clock=lambda: now) as log:
        for step in range(1, 5):
            log.scalars(step, step / 10, {"a": 1})
            now += 500
    assert [e.step for e in events(tmp_path) if e.summary.value] == [1, 2, 3, 4]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_other_processes_write_nothing(tmp_path):
    with MetricLogger(tmp_path / "run", enabled=False) as log:
        log.scalars(1, 0.1, {"a": 1.0})
        log.image("samples", 1, np.zeros((4, 4, 3), np.uint8))
        log.flush()
    assert not list(tmp_path.iterdir())


def test_resume_takes_out_later_steps_and_a_half_line(tmp_path):
    with MetricLogger(tmp_path) as log:
        for step in (10, 20, 30, 40):
            log.scalars(step, step / 100, {"a": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "kimg": 0.5, "ti')
    with MetricLogger(tmp_path, resume_step=20) as log:
        assert [line["step"] for line in lines(tmp_path)] == [10, 20]
        log.scalars(30, 0.3, {"a": -1})
    assert [(line["step"], line["a"]) for line in lines(tmp_path)] == [(10, 10), (20, 20), (30, -1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    # TensorBoard discards what a session start of step 21 finds at 21 and later
    found = [("start" if e.HasField("session_log") else "scalar", e.step) for e in events(tmp_path) if e.step]
    assert found == [("scalar", n) for n in (10, 20, 30, 40)] + [("start", 21), ("scalar", 30)]


def test_resume_of_an_untouched_file_leaves_its_bytes_alone(tmp_path):
    with MetricLogger(tmp_path) as log:
        log.scalars(10, 0.1, {"a": 1 / 3})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    MetricLogger(tmp_path, resume_step=10).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kimg": 0.1, "time": 0}')
    with MetricLogger(tmp_path, resume_step=5) as log:
        log.scalars(6, 0.6, {})
    assert [line["step"] for line in lines(tmp_path)] == [1, 6]


def test_unreadable_lines_are_dropped_with_a_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\x00\n[3]\n{"kimg": 2}\n{"step": 2}\n')
    MetricLogger(tmp_path, resume_step=5).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert "dropped 3 unreadable lines" in caplog.text


def test_a_start_from_nothing_leaves_no_line_of_a_run_that_died_before_its_first_checkpoint(tmp_path):
    with MetricLogger(tmp_path) as log:
        log.scalars(0, 0, {"a": 1})
        log.scalars(5, 0.1, {"a": 1})
    with MetricLogger(tmp_path) as log:
        log.scalars(0, 0, {"a": 2})
    assert [(line["step"], line["a"]) for line in lines(tmp_path)] == [(0, 2)]
    assert [e.step for e in events(tmp_path) if e.HasField("session_log")] == [0]


def test_a_killed_run_leaves_lines_that_a_resume_reads(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys
        from gigagan_jax.telemetry.metrics import MetricLogger
        log = MetricLogger(sys.argv[1])
        for step in range(1, 51):
            log.scalars(step, step / 10, {"a": step})
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    with MetricLogger(tmp_path, resume_step=40) as log:
        log.scalars(41, 4.1, {"a": 0})
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, 41), 41]


@pytest.mark.parametrize("value", [np.zeros(2), "1.0", None, [1.0]])
def test_a_metric_is_one_number(tmp_path, value):
    with MetricLogger(tmp_path) as log, pytest.raises(ValueError, match="metric 'a' must be one number"):
        log.scalars(1, 0.1, {"a": value})
    assert lines(tmp_path) == []


@pytest.mark.parametrize("name", ["step", "kimg", "time"])
def test_a_metric_cannot_take_the_name_of_a_field(tmp_path, name):
    with MetricLogger(tmp_path) as log, pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        log.scalars(1, 0.1, {name: 1.0})


def test_a_workdir_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write metrics to .*; choose a workdir"):
        MetricLogger(tmp_path / "file" / "run")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write metrics"):
        MetricLogger(tmp_path / "run")
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="cannot write metrics"):
        MetricLogger(tmp_path)
    with pytest.raises(UserError, match="local folder, got gs://bucket/run"):
        MetricLogger("gs://bucket/run")


# Progress

METRICS = {
    "logits/real": 1.234,
    "logits/fake": jnp.float32(-1.1),
    "loss/g": 0.83,
    "loss/r1": 0.021,
    "grad_norm/g": 0.118,
    "grad_norm/d": 0.4,
    "something else": 1.0,
}


def test_the_line():
    progress = Progress(140)
    progress.update(12_300 - 1810, METRICS, now=100.0)
    line = progress.update(12_300, METRICS, now=110.0)
    assert line == (
        "kimg 12.3/140.0  8.8 %  images/s 181  ETA 0:11:46  | D real +1.23  fake -1.10  G 0.83"
        "  | r1 0.021  | gnorm G 0.12  D 0.4"
    )


def test_speed_and_goodput_come_first():
    progress = Progress(1)
    progress.update(0, {}, now=0.0)
    progress.update(16, {}, now=1.0)
    values = {"goodput": 0.934, "mfu": 0.4123, "loss/g": 1.0, "images_per_second_per_chip": 25.0}
    line = progress.update(216, values, now=2.0)
    assert "  images/s 200 (25 a chip)  ETA 0:00:04  | MFU 41.2%  goodput 93%  | G 1.00" in line
    assert "  images/s 200  ETA" in progress.line({"images_per_second_per_chip": 200.0})


def test_missing_metrics_are_left_out_and_nan_is_shown():
    progress = Progress(1)
    assert progress.update(0, {}, now=0.0) == "kimg 0.0/1.0  0.0 %  compiling"
    assert progress.update(0, {"loss/r1": float("nan")}, now=1.0).endswith("compiling  | r1 nan")


def test_compile_time_before_the_first_step_does_not_count():
    progress = Progress(10)
    assert "compiling" in progress.update(0, {}, now=0.0)
    first = progress.update(16, {}, now=300.0)  # 300 s of compiling ended with these 16 images
    assert "images/s --  ETA --" in first
    assert progress.rate is None
    progress.update(1016, {}, now=310.0)
    assert progress.rate == pytest.approx(100)


def test_a_resumed_run_is_compiling_too_and_counts_only_its_own_images():
    progress = Progress(10, start_images=5000)
    line = progress.update(5000, {}, now=0.0)
    assert line == "kimg 5.0/10.0  50.0 %  compiling"
    progress.update(5016, {}, now=300.0)
    line = progress.update(6016, {}, now=310.0)
    assert progress.rate == pytest.approx(100)
    assert "ETA 0:00:40" in line


def test_images_of_a_step_that_was_compiled_do_not_count():
    progress = Progress(10)
    progress.update(100, {}, now=1.0)
    progress.restart(200, now=1.01)
    assert "images/s --" in progress.update(200, {}, now=1.01)
    progress.update(300, {}, now=2.01)
    assert progress.rate == pytest.approx(100)


def test_the_rate_is_that_of_the_recent_window():
    progress = Progress(1000, window=60)
    now, images = 0.0, 0
    for per_second in [10] * 20 + [100] * 6:
        now, images = now + 10, images + 10 * per_second
        progress.update(images, {}, now)
    assert progress.rate == pytest.approx(100)
    # and it is smooth: one slow interval of six moves it by a sixth of the difference
    progress.update(images + 100, {}, now + 10)
    assert progress.rate == pytest.approx((5 * 100 + 10) / 6)


def test_intervals_longer_than_the_window_still_give_a_rate():
    progress = Progress(1000, window=60)
    for i in range(4):
        progress.update(1000 * (i + 1) * (i + 1), {}, now=500.0 * i)
    assert progress.rate == pytest.approx(7000 / 500)


def test_a_stalled_run_has_no_eta_and_a_rolled_back_one_starts_afresh():
    progress = Progress(10)
    progress.update(1000, {}, now=0.0)
    assert "images/s 0.00  ETA --" in progress.update(1000, {}, now=10.0)
    assert "images/s --  ETA --" in progress.update(500, {}, now=20.0)
    progress.update(700, {}, now=30.0)
    assert progress.rate == pytest.approx(20)


def test_two_updates_at_one_instant_do_not_divide_by_zero():
    progress = Progress(10)
    progress.update(10, {}, now=5.0)
    assert "ETA --" in progress.update(20, {}, now=5.0)


def test_the_end_and_long_runs():
    progress = Progress(1)
    progress.update(500, {}, now=0.0)
    assert "100.0 %  images/s 500  ETA 0:00:00" in progress.update(1000, {}, now=1.0)
    assert "101.6 %" in progress.update(1016, {}, now=2.0)  # the last batch may reach past the end
    long = Progress(1e6)
    long.update(1000, {}, now=0.0)
    assert "images/s 5.00  ETA 2314d 19:" in long.update(1050, {}, now=10.0)


def test_the_layout_can_be_another():
    progress = Progress(1, layout=((("FID", "fid", ".1f"),),))
    assert progress.update(0, {"fid": 12.34, "loss/g": 1.0}, now=0.0) == "kimg 0.0/1.0  0.0 %  compiling  | FID 12.3"


def test_lines_are_plain_text():
    line = Progress(1).update(10, METRICS, now=0.0)
    assert line.isprintable()
    assert line.isascii()


# configure: in a process of its own, since it sets up the whole process


def run(program):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_one_line_a_record_on_stderr_and_libraries_only_from_warnings_up():
    got = run(
        """
        import logging
        logging.basicConfig()
        import absl.logging
        absl.logging.use_absl_handler()
        absl.logging.set_verbosity("info")
        from gigagan_jax.telemetry.metrics import configure
        configure(); configure()
        log = logging.getLogger("gigagan_jax.training.loop")
        log.info("step %d", 3); log.warning("odd"); log.debug("hidden")
        absl.logging.info("hidden"); absl.logging.warning("absl warns")
        for name in ("orbax.checkpoint", "jax._src.dispatch", "grain", "tensorflow_datasets.core"):
            logging.getLogger(name).info("hidden")
        import orbax.checkpoint
        logging.getLogger("orbax").info("hidden")
        try: 1 / 0
        except ZeroDivisionError: log.exception("broke")
        """
    )
    assert [line[9:] for line in got[:3]] == [
        "step 3",
        "warning [gigagan_jax.training.loop] odd",
        "warning [absl] absl warns",
    ]
    assert all(len(line.split(" ")[0]) == 8 and line[2] == line[5] == ":" for line in got[:3])
    assert got[3][9:] == "error [gigagan_jax.training.loop] broke"
    assert got[-1].startswith("ZeroDivisionError")
    assert "hidden" not in "\n".join(got)


def test_verbose_and_other_processes():
    got = run(
        """
        import logging
        from gigagan_jax.telemetry.metrics import configure
        log = logging.getLogger("gigagan_jax.x")
        configure(verbose=True); log.debug("seen"); logging.getLogger("other").debug("hidden")
        configure(process_index=3); log.debug("hidden"); log.info("hidden"); log.error("bad")
        """
    )
    assert [line[9:] for line in got] == ["debug [gigagan_jax.x] seen", "[3] error [gigagan_jax.x] bad"]


def test_importing_says_nothing_and_changes_no_logger():
    assert (
        run(
            """
            import logging, sys
            import gigagan_jax.telemetry.metrics
            assert logging.getLogger().handlers == []
            assert not {"absl", "tensorboardX"} & set(sys.modules)
            """
        )
        == []
    )


def test_handlers_that_are_no_console_stay(caplog):
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    names = ("gigagan_jax", "absl", "orbax", "jax", "grain", "tensorflow_datasets", "etils", "tensorboardX", "PIL")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        configure()
        assert caplog.handler in root.handlers
        logging.getLogger("gigagan_jax").info("caught")
        assert "caught" in caplog.text
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        for name, old in levels.items():
            logging.getLogger(name).setLevel(old)
