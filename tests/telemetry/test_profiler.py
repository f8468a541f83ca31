"""Traces of asked-for steps, by flag, signal and file; nothing that is asked for at a bad moment disturbs."""

import gzip
import json
import logging
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from gigagan_jax.telemetry.profiler import Profiler, parse_steps

# Work for the device, so that a trace has something in it.
STEP = jax.jit(lambda x: jnp.tanh(x @ x))


def run_steps(profiler, steps, first=0, compiles=(), act=None):
    """So many steps, as the loop takes them; `act` is {step: what is done in it}."""
    done = jnp.ones((4, 4))
    for step in range(first, first + steps):
        with profiler(step, compiles=step in compiles, done=done):
            done = STEP(done)
            (act or {}).get(step, lambda: None)()


def read_traced_steps(workdir):
    """{name of the trace: numbers of the steps in it}"""
    traced_steps = {}
    # The trace for Perfetto is JSON; the one for XProf is a protobuf.
    for file in workdir.glob("profiles/*/plugins/profile/*/*.trace.json.gz"):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        steps = {int(e["args"]["step_num"]) for e in events if e.get("name") == "train" and "step_num" in e["args"]}
        traced_steps[file.relative_to(workdir).parts[1]] = sorted(steps)
    return traced_steps


def request_trace():
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_range_of_steps():
    assert parse_steps("100:105") == (100, 105)


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:5", "7:5", "-1:5", "a:b", "1:2:3"])
def test_what_is_no_range_is_said(text, refused):
    refused(lambda: parse_steps(text), f"--profile_steps={text}", "100:105")


def test_the_steps_of_the_flag_are_traced_compiled_or_not(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Profiler(tmp_path, (2, 4)) as profiler:
        # The user chose these steps, so a compilation in them is traced too.
        run_steps(profiler, 6, compiles=(2,))
    assert read_traced_steps(tmp_path) == {"2": [2, 3]}
    assert f"xprof --logdir {tmp_path / 'profiles' / '2'}" in caplog.text


def test_a_run_that_goes_on_within_the_range_takes_what_is_left_of_it(tmp_path):
    with Profiler(tmp_path, (2, 8)) as profiler:
        # Resumed at step 6, within the range.
        run_steps(profiler, 5, first=6)
    assert read_traced_steps(tmp_path) == {"6": [6, 7]}


def test_a_signal_waits_for_what_is_compiled_and_two_are_one(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Profiler(tmp_path) as profiler:
        # Two signals before step 2, and one during the trace.
        run_steps(profiler, 12, compiles=(0, 1), act={0: lambda: (request_trace(), request_trace()), 4: request_trace})
    assert read_traced_steps(tmp_path) == {"2": [2, 3, 4, 5, 6]}
    assert "is being taken already; it ends after 2 more steps" in caplog.text


def test_a_trace_ends_with_the_run(tmp_path, caplog):
    before = signal.getsignal(signal.SIGUSR1)
    with Profiler(tmp_path) as profiler:
        run_steps(profiler, 3, act={0: request_trace})
    assert read_traced_steps(tmp_path) == {"1": [1, 2]}
    with Profiler(tmp_path) as profiler:
        run_steps(profiler, 1, first=3, act={3: request_trace})
    assert "no step was left to profile" in caplog.text
    # The handler of the caller is back.
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_file_asks_once_each_time_that_it_is_touched(tmp_path):
    now = 0.0
    with Profiler(tmp_path, clock=lambda: now) as profiler:
        (tmp_path / "profile").touch()
        run_steps(profiler, 8)
        assert not (tmp_path / "profile").exists()
        (tmp_path / "profile").touch()
        run_steps(profiler, 8, first=8)
        assert (tmp_path / "profile").exists()  # it is looked for every few seconds only
        # Past _POLL_SECONDS.
        now = 3.0
        run_steps(profiler, 8, first=16)
    assert not (tmp_path / "profile").exists()
    assert set(read_traced_steps(tmp_path)) == {"0", "16"}


def test_a_trace_that_cannot_be_stored_is_a_warning(tmp_path, caplog):
    # A file where the folder should be.
    (tmp_path / "profiles").write_text("")
    with Profiler(tmp_path, (0, 2)) as profiler:
        run_steps(profiler, 4)
    assert "no trace of step 0" in caplog.text


def test_a_profiler_that_is_taken_is_a_warning(tmp_path, caplog):
    # JAX takes one trace at a time.
    with jax.profiler.trace(tmp_path / "other"), Profiler(tmp_path, (0, 2)) as profiler:
        run_steps(profiler, 4)
    assert "no trace of step 0" in caplog.text
    assert read_traced_steps(tmp_path) == {}
