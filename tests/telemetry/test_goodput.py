"""The account of wall time: causes, restarts, lost steps, and a file that a kill cannot spoil."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import gigagan_jax
from gigagan_jax.core.errors import UserError
from gigagan_jax.telemetry.goodput import Account, Goodput, format_seconds, process_start_time, read_events

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gigagan_jax.__file__).parents[1])}


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# Stands for a JAX array, of which only is_ready is used.
class Array:
    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


def start_event(now, **about):
    return {"event": "start", "time": now, "about": about}


def resume_event(now, step):
    return {"event": "resume", "time": now, "step": step}


# Positional only: `step` must be free as the name of a cause.
def time_event(now, at, /, skipped=0, **seconds):
    return {"event": "time", "time": now, "step": at, "skipped": skipped, "seconds": seconds}


def end_event(now, exit="done"):
    return {"event": "end", "time": now, "exit": exit, "message": ""}


def sum_seconds(events):
    return {cause: s for cause, s in Account(events).seconds.items() if s}


def test_every_second_has_one_cause(tmp_path):
    clock = Clock()
    with Goodput(tmp_path, clock=clock) as goodput:
        # Before the first step: starting.
        clock.now += 3
        goodput.record_resume(0)
        with goodput("step"):
            clock.now += 10
            with goodput("compile"):
                clock.now += 20
            with goodput("data"):
                clock.now += 1
                with goodput("checkpoint"):
                    clock.now += 0.5
            clock.now += 4
            # Useful steps and waiting for data; compiling and saving do not count.
            assert goodput.training_seconds == pytest.approx(15)
            goodput.step = 14
        clock.now += 2
        with goodput("evaluation"):
            clock.now += 5
    want = {"start": 3, "step": 14, "compile": 20, "data": 1, "checkpoint": 0.5, "other": 2, "evaluation": 5}
    assert sum_seconds(read_events(tmp_path)) == pytest.approx(want, abs=0.01)
    assert goodput.share == pytest.approx(14 / 45.5, abs=0.001)
    assert sum(Account(read_events(tmp_path)).seconds.values()) == pytest.approx(45.5, abs=0.01)


def test_waiting_for_data_while_the_devices_work_loses_nothing(tmp_path):
    clock = Clock()
    goodput = Goodput(tmp_path, clock=clock)
    with goodput("step"):
        # Devices that still compute at the end were busy: the wait cost nothing.
        with goodput("data", behind=Array(ready=False)):
            clock.now += 7
        with goodput("data", behind=Array(ready=True)):
            clock.now += 2
        with goodput("data"):
            clock.now += 1
    assert {k: v for k, v in goodput.total_seconds().items() if v > 0.1} == {"step": 7, "data": 3}
    goodput.close()


def test_steps_after_the_checkpoint_of_a_killed_run_are_repeated():
    """Killed at step 30 of a checkpoint at 20: a line crosses it, and one was written within a step."""
    events = [
        start_event(0),
        resume_event(5, 0),
        time_event(15, 10, start=5, step=10),
        time_event(30, 25, step=15),
        time_event(35, 30, step=5),
    ]
    # Written by the heartbeat thread within a step: no new step, but 3 s.
    events += [time_event(38, 30, step=3)]
    # 7 s after the last line of the killed process.
    again = [start_event(45), resume_event(55, 20), time_event(75, 30, start=10, step=20), end_event(75)]
    assert sum_seconds([*events, *again]) == pytest.approx(
        {"start": 15, "step": 10 + 10 + 20, "repeated": 5 + 5 + 3, "down": 7}
    )
    assert sum(sum_seconds([*events, *again]).values()) == pytest.approx(75)
    account = Account([*events, *again])
    assert [(s.first_step, s.last_step, s.exit) for s in account.sessions] == [(0, 30, ""), (20, 30, "done")]
    # A restart is no rollback.
    assert account.rollbacks == []
    assert account.share == pytest.approx(40 / 75)


def test_what_was_lost_once_is_not_lost_again():
    events = [start_event(0), resume_event(0, 0), time_event(10, 10, step=10)]
    for now in (10, 20, 30):  # three times to step 10, from the checkpoint of step 4
        events += [start_event(now), resume_event(now, 4), time_event(now + 10, 10, step=10)]
    assert sum_seconds(events) == pytest.approx({"step": 4 + 10, "repeated": 6 + 10 + 10})


def test_a_run_that_died_before_its_first_checkpoint_lost_all_its_steps():
    assert sum_seconds(
        [start_event(0), resume_event(0, 0), time_event(8, 4, step=8), start_event(8), resume_event(8, 0)]
    ) == {"repeated": 8}


def test_a_start_that_came_to_nothing_takes_nothing_back():
    """It ended before it restored anything; the next one goes on from step 4."""
    events = [
        start_event(0),
        resume_event(0, 0),
        time_event(8, 4, step=8),
        start_event(8),
        time_event(9, 0, start=1),
        end_event(9, "failed"),
    ]
    assert sum_seconds(events) == {"step": 8, "start": 1}
    assert sum_seconds([*events, start_event(10), resume_event(10, 4)]) == {"step": 8, "start": 1, "down": 1}


def test_a_rollback_within_a_process_is_not_a_restart():
    events = [
        start_event(0),
        resume_event(0, 0),
        time_event(10, 10, step=10),
        resume_event(10, 6),
        time_event(20, 16, step=10),
        end_event(20),
    ]
    assert sum_seconds(events) == pytest.approx({"step": 6 + 10, "skipped": 4})
    assert Account(events).rollbacks == [(10, 6)]
    assert len(Account(events).sessions) == 1


def test_skipped_steps_are_no_useful_ones():
    events = [start_event(0), resume_event(0, 0), time_event(10, 20, skipped=5, step=10)]
    assert sum_seconds(events) == {"skipped": 2.5, "step": 7.5}


def test_a_finished_run_that_is_prolonged_later_was_not_down():
    events = [
        start_event(0),
        resume_event(0, 0),
        time_event(10, 10, step=10),
        end_event(10),
        start_event(1000),
        resume_event(1000, 10),
    ]
    assert sum_seconds(events) == {"step": 10}
    # A stopped run was meant to go on: the time until then is down time.
    events[3] = end_event(10, "stopped")
    assert sum_seconds(events) == {"step": 10, "down": 990}


def test_the_next_process_adds_to_the_file(tmp_path):
    # An error that ends a process on request.
    class Stop(Exception):
        pass

    def run_process(error, **about):
        with contextlib.suppress(UserError, Stop), Goodput(tmp_path, about, stops=(Stop,)) as goodput:
            goodput.record_facts({"data": {"examples": 5}})
            if error:
                raise error

    run_process(UserError("training\ndiverged"), devices=8)
    run_process(Stop("asked to"))
    run_process(None)
    sessions = Account(read_events(tmp_path)).sessions
    assert [(s.exit, s.message) for s in sessions] == [
        ("failed", "training diverged"),
        ("stopped", "asked to"),
        ("done", ""),
    ]
    assert sessions[0].about == {"devices": 8, "data": {"examples": 5}}


def test_lines_that_are_broken_are_passed_over(tmp_path):
    with open(tmp_path / "goodput.jsonl", "w") as file:
        for event in (time_event(1, 1, step=5), start_event(0), resume_event(1, 0), time_event(3, 2, step=2)):
            file.write(json.dumps(event) + "\n")
        file.write('[]\n{"event": "time", "time": 4}\n{"event": "time", "time": "x", "step": 3, "seconds": {}}\n\x00\n')
        # Cut off by a kill: the next line must not be appended to it.
        file.write('{"event": "time", "time": 4, "step": 4, "seco')
    goodput = Goodput(tmp_path)
    goodput.record_resume(2)
    goodput.close()
    account = Account(read_events(tmp_path))
    # The second process began at the last step of the first: nothing was lost.
    assert account.seconds["step"] == 2
    assert [s.first_step for s in account.sessions] == [0, 2]


def test_a_killed_process_leaves_what_it_did(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys, time
        from pathlib import Path
        from gigagan_jax.telemetry import goodput
        # A line every 50 ms instead of every 5 s.
        goodput._SHORTEST = 0.05
        clock = goodput.Goodput(Path(sys.argv[1]), {"pid": os.getpid()}, began=goodput.process_start_time())
        clock.record_resume(0)
        with clock("step"), clock("compile"):
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    began = time.time()
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    account = Account(read_events(tmp_path))
    (session,) = account.sessions
    assert session.exit == ""
    # /proc counts in clock ticks, and starting Python takes a moment.
    assert abs(session.began - began) < 2
    # Up to the last line before the kill.
    assert 0.3 < account.seconds["compile"] <= 0.7
    assert account.seconds["start"] > 0
    assert sum(account.seconds.values()) == pytest.approx(session.last - session.began, abs=0.1)


def test_what_was_done_before_a_checkpoint_is_in_the_file_with_it(tmp_path):
    clock = Clock()
    goodput = Goodput(tmp_path, clock=clock)
    goodput.record_resume(0)
    with goodput("step"):
        clock.now += 4
        goodput.step = 7
        with goodput("checkpoint"):
            clock.now += 1
        account = Account(read_events(tmp_path))  # as it stands were the process killed now
    assert account.seconds["step"] == 4
    assert account.seconds["checkpoint"] == 1
    assert account.sessions[0].last_step == 7
    goodput.close()


def test_other_processes_write_nothing(tmp_path):
    with Goodput(tmp_path, enabled=False) as goodput:
        goodput.record_resume(3)
        with goodput("step"):
            pass
        assert goodput.training_seconds >= 0
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    # A folder of that name: root may write to any file, so permissions would not do.
    (tmp_path / "goodput.jsonl").mkdir()
    with Goodput(tmp_path) as goodput:
        goodput.record_resume(0)
        with goodput("step"):
            pass
    assert "goodput is not kept" in caplog.text
    assert goodput.share is not None


def test_a_process_started_before_now():
    assert 0 <= time.time() - process_start_time() < 24 * 3600


def test_the_table_has_the_largest_first():
    assert format_seconds({"data": 30.0, "step": 7000.0, "compile": 2970.0, "other": 0.0}).splitlines() == [
        "useful steps       1 h 56 min  70.0 %",
        "compiling         49 min 30 s  29.7 %",
        "waiting for data         30 s   0.3 %",
        "wall time          2 h 46 min",
    ]
