"""Profiler traces on request: of given steps, after SIGUSR1, or after `touch <workdir>/profile`."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import PROFILE_TRIGGER_FILE, PROFILES_FOLDER

_log = logging.getLogger(__name__)

# Length of a trace that a signal or the file requests.
TRACED_STEPS = 5
# Seconds between checks for the file: not every step waits for a stat on a network disk.
_POLL_SECONDS = 2.0
# Seconds for which the file stays, until other processes have seen it too.
_KEEP_TRIGGER_SECONDS = 10.0


def parse_steps(text: str) -> tuple[int, int]:
    """ "100:105" as (100, 105): steps 100 to 104, counted from 0.

    Raises:
      UserError: the text is no such range.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"--profile_steps={text}: write FIRST:LAST, as in 100:105 for the five steps from 100 on")
    return int(first), int(last)


class Profiler:
    """Writes traces of this process's steps to `<workdir>/profiles/<first step>/`.

    While it is open, SIGUSR1 requests a trace of the next steps. `touch <workdir>/profile` requests one on all processes of
    the run. A trace begins after steps that compile. A request during a trace is ignored with a warning. Errors of a trace
    are warnings: training goes on.

    Args:
      workdir: of the run.
      steps: (first, last) of a trace requested in advance, last not included.
      aside: a context for the time that starting and storing a trace take.
      clock: seconds that do not go back.
    """

    def __init__(
        self,
        workdir: Path,
        steps: tuple[int, int] | None = None,
        aside: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._trigger, self._folder = workdir / PROFILE_TRIGGER_FILE, workdir / PROFILES_FOLDER
        self._steps, self._aside, self._clock = steps, aside, clock
        self._requested = False
        # Steps left of the current trace; None without one.
        self._left: int | None = None
        self._target = Path()
        self._checked = -_POLL_SECONDS
        # Time stamp of the file at the last request.
        self._seen_stamp: int | None = None
        self._remove_at: float | None = None
        self._previous_handler: Any = None
        self._has_handler = False

    def __enter__(self) -> "Profiler":
        # Only the main thread may set handlers; Windows has no SIGUSR1.
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR1"):
            self._previous_handler = signal.signal(signal.SIGUSR1, self._request_trace)
            self._has_handler = True
        return self

    def _request_trace(self, number: int, frame: Any) -> None:
        self._requested = True

    def __exit__(self, *exception: object) -> None:
        self._stop_trace(None)
        if self._requested:
            _log.warning("no step was left to profile")
        if self._remove_at is not None:
            self._remove_trigger()
        if self._has_handler:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL if self._previous_handler is None else self._previous_handler)

    @contextlib.contextmanager
    def __call__(self, step: int, *, compiles: bool, done: Any) -> Iterator[None]:
        """A context for each step. A due trace begins or ends before the step.

        Args:
          step: number of the step, from 0.
          compiles: the step is not compiled yet; a requested trace begins after it.
          done: arrays of the step before; a trace ends once they are computed.
        """
        # Before the next step and not after the last one: the last one still runs on the device.
        if self._left == 0:
            self._stop_trace(done)
        self._check_trigger()
        if self._left is None:
            if self._steps is not None and self._steps[0] <= step < self._steps[1]:
                self._start_trace(step, self._steps[1] - step, done)
                # A trace in advance is taken once, also when a rollback repeats its steps.
                self._steps = None
            # The trace is of steps, not of a compilation.
            elif self._requested and not compiles:
                self._start_trace(step, TRACED_STEPS, done)
                self._requested = False
        elif self._requested:
            self._requested = False
            _log.warning("a trace is being taken already; it ends after %d more steps", self._left)
        if self._left is not None:
            self._left -= 1
        # XProf groups the operations of a trace by these steps.
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _check_trigger(self) -> None:
        now = self._clock()
        if self._remove_at is not None and now >= self._remove_at:
            self._remove_trigger()
        # Removal first, because the file must go even if no check is due.
        if now - self._checked < _POLL_SECONDS:
            return
        self._checked = now
        try:
            stamp = self._trigger.stat().st_mtime_ns
        except OSError:
            return
        if stamp != self._seen_stamp:
            self._seen_stamp, self._requested = stamp, True
            if jax.process_index() == 0:
                # Only process 0 removes the file: another one may not have seen it yet.
                self._remove_at = now + (_KEEP_TRIGGER_SECONDS if jax.process_count() > 1 else 0.0)

    def _remove_trigger(self) -> None:
        self._remove_at = None
        try:
            # A newer time stamp is a new request.
            if self._trigger.stat().st_mtime_ns == self._seen_stamp:
                self._trigger.unlink()
        # The user may have removed it.
        except FileNotFoundError:
            pass
        except OSError as e:
            _log.warning("%s cannot be removed: %s", self._trigger, e.strerror or e)

    def _start_trace(self, step: int, steps: int, done: Any) -> None:
        target = self._folder / str(step)
        if jax.process_count() > 1:
            # Processes of one machine would write to the same file.
            target = target / f"process_{jax.process_index()}"
        with self._aside():
            # Steps are dispatched asynchronously: without this, the trace would begin within an earlier step.
            jax.block_until_ready(done)
            try:
                target.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(target)
            # A full disk, or any error of the platform's profiler.
            except Exception as e:
                _log.warning("no trace of step %d: %s", step, _first_line(e))
                return
        _log.info("profiling steps %d to %d", step, step + steps - 1)
        self._left, self._target = steps, target

    def _stop_trace(self, done: Any) -> None:
        if self._left is None:
            return
        self._left = None
        with self._aside():
            try:
                jax.block_until_ready(done)
            finally:
                try:
                    jax.profiler.stop_trace()
                except Exception as e:
                    _log.warning("the trace %s was lost: %s", self._target, _first_line(e))
                    return
        _log.info(
            "trace in %s: pip install xprof, then `xprof --logdir %s`; or open its .trace.json.gz at ui.perfetto.dev",
            self._target,
            self._target,
        )


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
