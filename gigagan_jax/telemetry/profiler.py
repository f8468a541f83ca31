"""Traces of the profiler on request: of given steps, after SIGUSR1, or when a file named `profile` appears in the workdir."""

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

_log = logging.getLogger(__name__)

TRIGGER_FILE, FOLDER = "profile", "profiles"
STEPS = 5  # that a signal or the file asks for
_LOOK_SECONDS = 2.0  # between looks for the file
_LEAVE_SECONDS = 10.0  # that the file stays: other processes must see it too


def parse_steps(text: str) -> tuple[int, int]:
    """ "100:105" as (100, 105): steps 100 to 104, counted from 0.

    Raises:
      UserError: it is no such range.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"--profile_steps={text}: write FIRST:LAST, as in 100:105 for the five steps from 100 on")
    return int(first), int(last)


class Profiler:
    """Takes traces of the steps of this process into `<workdir>/profiles/<first step>/`.

    While it is open, SIGUSR1 asks for a trace of the next steps; so does `touch <workdir>/profile`, on all processes of the
    run. Steps that are compiled are waited for. A request while a trace is taken is the same request. Whatever goes wrong with
    a trace is a warning: training goes on.

    Args:
      workdir: of the run.
      steps: (first, last) of a trace that is asked for from the beginning, last not included.
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
        self._trigger, self._folder = workdir / TRIGGER_FILE, workdir / FOLDER
        self._steps, self._aside, self._clock = steps, aside, clock
        self._asked = False
        self._left: int | None = None  # of the trace that is being taken: how many more steps
        self._into = Path()
        self._looked = -_LOOK_SECONDS
        self._seen: int | None = None  # time stamp of the file that was last taken for a request
        self._remove_at: float | None = None
        self._before: Any = None
        self._has_handler = False

    def __enter__(self) -> "Profiler":
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR1"):
            self._before = signal.signal(signal.SIGUSR1, self._ask)
            self._has_handler = True
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def __exit__(self, *exception: object) -> None:
        self._stop(None)
        if self._asked:
            _log.warning("no step was left to profile")
        if self._remove_at is not None:
            self._remove()
        if self._has_handler:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL if self._before is None else self._before)

    @contextlib.contextmanager
    def __call__(self, step: int, *, compiles: bool, done: Any) -> Iterator[None]:
        """Goes around each step, and begins and ends a trace before it where that is due.

        Args:
          step: number of the step, from 0.
          compiles: the step is not compiled yet: a trace that may wait begins after it.
          done: arrays that the step before gave; a trace ends when they are there.
        """
        if self._left == 0:
            self._stop(done)
        self._look()
        if self._left is None:
            if self._steps is not None and self._steps[0] <= step < self._steps[1]:
                self._start(step, self._steps[1] - step, done)
                self._steps = None
            elif self._asked and not compiles:
                self._start(step, STEPS, done)
                self._asked = False
        elif self._asked:
            self._asked = False
            _log.warning("a trace is being taken already; it ends after %d more steps", self._left)
        if self._left is not None:
            self._left -= 1
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _look(self) -> None:
        now = self._clock()
        if self._remove_at is not None and now >= self._remove_at:
            self._remove()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        try:
            stamp = self._trigger.stat().st_mtime_ns
        except OSError:
            return
        if stamp != self._seen:
            self._seen, self._asked = stamp, True
            if jax.process_index() == 0:
                self._remove_at = now + (_LEAVE_SECONDS if jax.process_count() > 1 else 0.0)

    def _remove(self) -> None:
        self._remove_at = None
        try:
            # One that was touched again since is a new request.
            if self._trigger.stat().st_mtime_ns == self._seen:
                self._trigger.unlink()
        except FileNotFoundError:
            pass
        except OSError as e:
            _log.warning("%s cannot be removed: %s", self._trigger, e.strerror or e)

    def _start(self, step: int, steps: int, done: Any) -> None:
        into = self._folder / str(step)
        if jax.process_count() > 1:
            into = into / f"process_{jax.process_index()}"  # of one machine, they would take the same file
        with self._aside():
            jax.block_until_ready(done)
            try:
                into.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(into)
            except Exception as e:  # the disk, or whatever the profiler of the platform raises
                _log.warning("no trace of step %d: %s", step, _first_line(e))
                return
        _log.info("profiling steps %d to %d", step, step + steps - 1)
        self._left, self._into = steps, into

    def _stop(self, done: Any) -> None:
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
                    _log.warning("the trace %s was lost: %s", self._into, _first_line(e))
                    return
        _log.info(
            "trace in %s: pip install xprof, then `xprof --logdir %s`; or open its .trace.json.gz at ui.perfetto.dev",
            self._into,
            self._into,
        )


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
