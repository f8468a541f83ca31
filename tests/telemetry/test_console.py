"""The progress line, and logging on the console."""

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import pytest

import gigagan_jax
from gigagan_jax.telemetry.console import TrainingProgress, configure_logging

# Child processes import the package that is tested, wherever pytest was started.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gigagan_jax.__file__).parents[1])}


# The progress line

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
    progress = TrainingProgress(140)
    # 1810 images in 10 s.
    progress.update(12_300 - 1810, METRICS, now=100.0)
    line = progress.update(12_300, METRICS, now=110.0)
    assert line == (
        "kimg 12.3/140.0  8.8 %  images/s 181  ETA 0:11:46  | D real +1.23  fake -1.10  G 0.83"
        "  | r1 0.021  | gnorm G 0.12  D 0.4"
    )


def test_speed_and_goodput_come_first():
    progress = TrainingProgress(1)
    progress.update(0, {}, now=0.0)
    progress.update(16, {}, now=1.0)
    values = {"goodput": 0.934, "mfu": 0.4123, "loss/g": 1.0, "images_per_second_per_chip": 25.0}
    line = progress.update(216, values, now=2.0)
    assert "  images/s 200 (25 a chip)  ETA 0:00:04  | MFU 41.2%  goodput 93%  | G 1.00" in line
    assert "  images/s 200  ETA" in progress.format_line({"images_per_second_per_chip": 200.0})


def test_missing_metrics_are_left_out_and_nan_is_shown():
    progress = TrainingProgress(1)
    assert progress.update(0, {}, now=0.0) == "kimg 0.0/1.0  0.0 %  compiling"
    assert progress.update(0, {"loss/r1": float("nan")}, now=1.0).endswith("compiling  | r1 nan")


def test_compile_time_before_the_first_step_does_not_count():
    progress = TrainingProgress(10)
    assert "compiling" in progress.update(0, {}, now=0.0)
    first = progress.update(16, {}, now=300.0)  # 300 s of compiling ended with these 16 images
    assert "images/s --  ETA --" in first
    assert progress.rate is None
    progress.update(1016, {}, now=310.0)
    assert progress.rate == pytest.approx(100)


def test_a_resumed_run_is_compiling_too_and_counts_only_its_own_images():
    progress = TrainingProgress(10, start_images=5000)
    line = progress.update(5000, {}, now=0.0)
    assert line == "kimg 5.0/10.0  50.0 %  compiling"
    progress.update(5016, {}, now=300.0)
    line = progress.update(6016, {}, now=310.0)
    assert progress.rate == pytest.approx(100)
    assert "ETA 0:00:40" in line


def test_images_of_a_step_that_was_compiled_do_not_count():
    progress = TrainingProgress(10)
    progress.update(100, {}, now=1.0)
    progress.restart_rate(200, now=1.01)
    assert "images/s --" in progress.update(200, {}, now=1.01)
    progress.update(300, {}, now=2.01)
    assert progress.rate == pytest.approx(100)


def test_the_rate_is_that_of_the_recent_window():
    progress = TrainingProgress(1000, window=60)
    now, images = 0.0, 0
    # The slow part lies before the window.
    for per_second in [10] * 20 + [100] * 6:
        now, images = now + 10, images + 10 * per_second
        progress.update(images, {}, now)
    assert progress.rate == pytest.approx(100)
    # and it is smooth: one slow interval of six moves it by a sixth of the difference
    progress.update(images + 100, {}, now + 10)
    assert progress.rate == pytest.approx((5 * 100 + 10) / 6)


def test_intervals_longer_than_the_window_still_give_a_rate():
    progress = TrainingProgress(1000, window=60)
    for i in range(4):
        # A step of 500 s, as of a huge batch: the window then holds one interval.
        progress.update(1000 * (i + 1) * (i + 1), {}, now=500.0 * i)
    assert progress.rate == pytest.approx(7000 / 500)


def test_a_stalled_run_has_no_eta_and_a_rolled_back_one_starts_afresh():
    progress = TrainingProgress(10)
    progress.update(1000, {}, now=0.0)
    assert "images/s 0.00  ETA --" in progress.update(1000, {}, now=10.0)
    # Fewer images than before: a rollback.
    assert "images/s --  ETA --" in progress.update(500, {}, now=20.0)
    progress.update(700, {}, now=30.0)
    assert progress.rate == pytest.approx(20)


def test_two_updates_at_one_instant_do_not_divide_by_zero():
    progress = TrainingProgress(10)
    progress.update(10, {}, now=5.0)
    assert "ETA --" in progress.update(20, {}, now=5.0)


def test_the_end_and_long_runs():
    progress = TrainingProgress(1)
    progress.update(500, {}, now=0.0)
    assert "100.0 %  images/s 500  ETA 0:00:00" in progress.update(1000, {}, now=1.0)
    assert "101.6 %" in progress.update(1016, {}, now=2.0)  # the last batch may reach past the end
    long = TrainingProgress(1e6)
    long.update(1000, {}, now=0.0)
    assert "images/s 5.00  ETA 2314d 19:" in long.update(1050, {}, now=10.0)


def test_the_layout_can_be_another():
    progress = TrainingProgress(1, layout=((("FID", "fid", ".1f"),),))
    assert progress.update(0, {"fid": 12.34, "loss/g": 1.0}, now=0.0) == "kimg 0.0/1.0  0.0 %  compiling  | FID 12.3"


def test_lines_are_plain_text():
    line = TrainingProgress(1).update(10, METRICS, now=0.0)
    # No carriage return and no colour: logs of clusters would show them as text.
    assert line.isprintable()
    assert line.isascii()


# configure_logging: in a child process, since it configures logging of the whole process


def run_code(program):
    done = subprocess.run(
        # Warnings are errors, since libraries must not add lines.
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_one_line_a_record_on_stderr_and_libraries_only_from_warnings_up():
    got = run_code(
        """
        import logging
        # As a library may have done before.
        logging.basicConfig()
        import absl.logging
        absl.logging.use_absl_handler()
        absl.logging.set_verbosity("info")
        from gigagan_jax.telemetry.console import configure_logging
        configure_logging(); configure_logging()
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
    got = run_code(
        """
        import logging
        from gigagan_jax.telemetry.console import configure_logging
        log = logging.getLogger("gigagan_jax.x")
        configure_logging(verbose=True); log.debug("seen"); logging.getLogger("other").debug("hidden")
        configure_logging(process_index=3); log.debug("hidden"); log.info("hidden"); log.error("bad")
        """
    )
    assert [line[9:] for line in got] == ["debug [gigagan_jax.x] seen", "[3] error [gigagan_jax.x] bad"]


def test_importing_says_nothing_and_changes_no_logger():
    assert (
        run_code(
            """
            import logging, sys
            import gigagan_jax.telemetry.metrics
            assert logging.getLogger().handlers == []
            # Both are imported by the calls that need them.
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
        configure_logging()
        assert caplog.handler in root.handlers
        logging.getLogger("gigagan_jax").info("caught")
        assert "caught" in caplog.text
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        for name, old in levels.items():
            logging.getLogger(name).setLevel(old)
