"""SIGTERM and SIGINT outside of the loop and within it."""

import signal
import sys
import time

import pytest

from gigagan_jax.checkpoint.orbax_logs import silence_closed_loop_errors
from gigagan_jax.parallel import signals as signals_module
from gigagan_jax.parallel.signals import Interrupted, StopSignals


class InFinaliser:
    """Calls a function when it is deleted. Python drops exceptions there."""

    def __init__(self, function):
        self.function = function

    def __del__(self):
        self.function()


def test_a_signal_within_a_finaliser_stops_the_run_without_a_traceback(capfd):
    def work():
        thing = InFinaliser(lambda: signal.raise_signal(signal.SIGTERM))
        del thing
        time.sleep(10)

    with StopSignals(), pytest.raises(Interrupted, match="stopped by SIGTERM"):
        work()
    assert capfd.readouterr().err == ""


def test_held_signals_are_read_by_the_loop():
    signals = StopSignals()
    with signals, signals.hold_signals():
        thing = InFinaliser(lambda: signal.raise_signal(signal.SIGTERM))
        del thing
        assert signals.number == signal.SIGTERM


def test_a_signal_that_is_sent_again_is_no_second_one(monkeypatch):
    """The loop began meanwhile: one Ctrl-C saves."""
    sent = []
    monkeypatch.setattr(signals_module.os, "kill", lambda pid, number: sent.append(number))
    signals = StopSignals()
    with signals:
        thing = InFinaliser(lambda: signal.raise_signal(signal.SIGINT))
        del thing
        with signals.hold_signals():
            time.sleep(0.2)
            assert signals.number == signal.SIGINT
        assert not sent
        signals._send_again(signal.SIGINT)
        assert sent == [signal.SIGINT]
    signals._send_again(signal.SIGINT)
    assert len(sent) == 1


def test_other_exceptions_of_finalisers_go_to_the_hook_before(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.exc_type))
    hook = sys.unraisablehook
    with StopSignals():
        assert sys.unraisablehook != hook
        thing = InFinaliser(lambda: 1 / 0)
        del thing
    assert seen == [ZeroDivisionError]
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("inside", [True, False])
def test_the_filter_of_closed_loops_outlives_the_run(monkeypatch, inside):
    """Orbax's threads still write when the run has ended, and their errors go through the hook that a checkpoint put there."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    hooks = []
    for _ in range(3):
        if not inside:
            silence_closed_loop_errors()
        with StopSignals():
            silence_closed_loop_errors()
        hooks.append(sys.unraisablehook)

    def fail(message):
        raise RuntimeError(message)

    for message in ("Event loop is closed", "another"):
        thing = InFinaliser(lambda message=message: fail(message))
        del thing
    assert seen == ["another"]
    # Runs of one process do not nest them deeper and deeper.
    assert len(set(hooks)) == 1
