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

STEP = jax.jit(lambda x: jnp.tanh(x @ x))


def go(profiler, steps, first=0, compiles=(), act=None):
    """So many steps, as the loop takes them; `act` is {step: what is done in it}."""
    done = jnp.ones((4, 4))
    for step in range(first, first + steps):
        with profiler(step, compiles=step in compiles, done=done):
            done = STEP(done)
            (act or {}).get(step, lambda: None)()


def traced(workdir):
    """{name of the trace: numbers of the steps in it}"""
    out = {}
    for file in workdir.glob("profiles/*/plugins/profile/*/*.trace.json.gz"):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        steps = {int(e["args"]["step_num"]) for e in events if e.get("name") == "train" and "step_num" in e["args"]}
        out[file.relative_to(workdir).parts[1]] = sorted(steps)
    return out


def ask():
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_range_of_steps():
    assert parse_steps("100:105") == (100, 105)


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:5", "7:5", "-1:5", "a:b", "1:2:3"])
def test_what_is_no_range_is_said(text, refused):
    refused(lambda: parse_steps(text), f"--profile_steps={text}", "100:105")


def test_the_steps_of_the_flag_are_traced_compiled_or_not(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Profiler(tmp_path, (2, 4)) as profiler:
        go(profiler, 6, compiles=(2,))
    assert traced(tmp_path) == {"2": [2, 3]}
    assert f"xprof --logdir {tmp_path / 'profiles' / '2'}" in caplog.text


def test_a_run_that_goes_on_within_the_range_takes_what_is_left_of_it(tmp_path):
    with Profiler(tmp_path, (2, 8)) as profiler:
        go(profiler, 5, first=6)
    assert traced(tmp_path) == {"6": [6, 7]}


def test_a_signal_waits_for_what_is_compiled_and_two_are_one(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Profiler(tmp_path) as profiler:
        go(profiler, 12, compiles=(0, 1), act={0: lambda: (ask(), ask()), 4: ask})
    assert traced(tmp_path) == {"2": [2, 3, 4, 5, 6]}
    assert "is being taken already; it ends after 2 more steps" in caplog.text


def test_a_trace_ends_with_the_run(tmp_path, caplog):
    before = signal.getsignal(signal.SIGUSR1)
    with Profiler(tmp_path) as profiler:
        go(profiler, 3, act={0: ask})
    assert traced(tmp_path) == {"1": [1, 2]}
    with Profiler(tmp_path) as profiler:
        go(profiler, 1, first=3, act={3: ask})
    assert "no step was left to profile" in caplog.text
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_file_asks_once_each_time_that_it_is_touched(tmp_path):
    now = 0.0
    with Profiler(tmp_path, clock=lambda: now) as profiler:
        (tmp_path / "profile").touch()
        go(profiler, 8)
        assert not (tmp_path / "profile").exists()
        (tmp_path / "profile").touch()
        go(profiler, 8, first=8)
        assert (tmp_path / "profile").exists()  # it is looked for every few seconds only
        now = 3.0
        go(profiler, 8, first=16)
    assert not (tmp_path / "profile").exists()
    assert set(traced(tmp_path)) == {"0", "16"}


def test_a_trace_that_cannot_be_stored_is_a_warning(tmp_path, caplog):
    (tmp_path / "profiles").write_text("")
    with Profiler(tmp_path, (0, 2)) as profiler:
        go(profiler, 4)
    assert "no trace of step 0" in caplog.text


def test_a_profiler_that_is_taken_is_a_warning(tmp_path, caplog):
    with jax.profiler.trace(tmp_path / "other"), Profiler(tmp_path, (0, 2)) as profiler:
        go(profiler, 4)
    assert "no trace of step 0" in caplog.text
    assert traced(tmp_path) == {}
