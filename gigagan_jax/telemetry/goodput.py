"""Goodput: the share of a run's wall time in useful steps, and the causes of the rest, over all restarts.

Each moment of a process belongs to one cause, which the loop sets by `with goodput("data"): ...`. An inner cause is subtracted
from the outer one. Process 0 appends the sums to `goodput.jsonl`, one JSON object a line:

    {"event": "start", "time": ..., "about": {...}}   a process started at this time (seconds since the epoch)
    {"event": "resume", "time": ..., "step": 120}     it resumes from this step; later steps done before are lost
    {"event": "time", "time": ..., "step": 150, "skipped": 0, "seconds": {"step": 4.9, "data": 0.1}}   since the line before
    {"event": "about", "time": ..., "about": {...}}   further facts of the process
    {"event": "end", "time": ..., "exit": "done", "message": ""}

A killed process has no "end" and loses the time after its last line. The file is append-only.
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gigagan_jax.core.files import append_text, read_json_lines
from gigagan_jax.core.formatting import format_duration
from gigagan_jax.core.processes import process_start
from gigagan_jax.core.workdir_files import GOODPUT_FILE

_log = logging.getLogger(__name__)

# Cause -> label in tables. Account derives the last ones from the events; the loop sets the others.
CAUSES = {
    "step": "useful steps",
    "start": "starting: imports, data, initialising or restoring",
    "compile": "compiling",
    "data": "waiting for data",
    "checkpoint": "saving checkpoints",
    "evaluation": "snapshots and evaluation",
    "profile": "profiling",
    "other": "other",
    "repeated": "steps lost in a stop, and repeated",
    "skipped": "steps skipped or rolled back",
    "down": "not running",
}
# Seconds between lines: the age of the process / _LINES within these bounds. A long run has few lines, and a killed short
# run loses little.
_SHORTEST, _LONGEST, _LINES = 5.0, 60.0, 500


@dataclasses.dataclass
class Session:
    """One process of a run, from its start to its end or its last event.

    Attributes:
      began, last: seconds since the epoch.
      first_step, last_step: None before the process resumed.
      exit: "done", "stopped", "failed"; "" for a process that runs or was killed.
      message: the reason of its end.
      about: facts that the process recorded.
    """

    began: float
    last: float
    first_step: int | None = None
    last_step: int | None = None
    exit: str = ""
    message: str = ""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


class Account:
    """Sums up the events of a workdir.

    Attributes:
      seconds: by cause. Together they are the wall time from the first start to the last event.
      sessions: the processes, in order.
      rollbacks: (from step, to step) of each return to an earlier step within a process.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()):
        self.seconds: dict[str, float] = defaultdict(float)
        self.sessions: list[Session] = []
        self.rollbacks: list[tuple[int, int]] = []
        # (first step, step after the last, seconds) of useful time, which a later resume may turn into lost time.
        self._intervals: list[tuple[int, int, float]] = []
        for event in events:
            self.add_event(event)

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Adds one event. Incomplete events, and events before any start, are ignored."""
        # A damaged line must not fail the run that reads it.
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            kind, now = event["event"], float(event["time"])
            if kind == "start":
                self._add_start(now, dict(event.get("about") or {}))
            elif self.sessions:
                session = self.sessions[-1]
                if kind == "resume":
                    self._add_resume(session, int(event["step"]))
                elif kind == "time":
                    self._add_time(session, int(event["step"]), int(event.get("skipped", 0)), dict(event["seconds"]))
                elif kind == "about":
                    session.about |= event["about"]
                elif kind == "end":
                    session.exit, session.message = str(event["exit"]), str(event.get("message", ""))
                # max: the clock of a machine may be set back during a run.
                session.last = max(session.last, now)

    def _add_start(self, now: float, about: dict[str, Any]) -> None:
        # The time after a finished run, which somebody prolongs later, was not lost.
        if self.sessions and self.sessions[-1].exit != "done":
            self.seconds["down"] += max(0.0, now - self.sessions[-1].last)
        self.sessions.append(Session(now, now, about=about))

    def _add_resume(self, session: Session, step: int) -> None:
        # The first resume of a process follows a stop; further ones are rollbacks.
        cause = "repeated"
        if session.first_step is not None:
            cause = "skipped"
            self.rollbacks.append((session.last_step or 0, step))
        else:
            session.first_step = step
        session.last_step = step
        kept = []
        for before, after, seconds in self._intervals:
            # Intervals up to the resumed step stay useful; an interval of no steps at that step does not.
            if after < step or (after == step and before < step):
                kept.append((before, after, seconds))
                continue
            # An interval that contains the step is split in proportion to its steps.
            lost = seconds * (after - max(before, step)) / (after - before) if after > before else seconds
            self.seconds["step"] -= lost
            self.seconds[cause] += lost
            if before < step:
                kept.append((before, step, seconds - lost))
        # Lost intervals are dropped, so that a second rollback does not subtract them again.
        self._intervals = kept

    def _add_time(self, session: Session, step: int, skipped: int, seconds: dict[str, float]) -> None:
        # Time before the first resume belongs to no steps.
        before = step if session.last_step is None else session.last_step
        session.last_step = step
        useful = float(seconds.pop("step", 0.0))
        # Steps take about equal time, so skipped steps take their share of it.
        if skipped and step > before:
            skipped_seconds = useful * min(1.0, skipped / (step - before))
            self.seconds["skipped"] += skipped_seconds
            useful -= skipped_seconds
        if useful:
            self.seconds["step"] += useful
            self._intervals.append((before, step, useful))
        for cause, value in seconds.items():
            # Later versions may write causes that are unknown here.
            self.seconds[cause if cause in CAUSES else "other"] += float(value)

    @property
    def share(self) -> float | None:
        """Share of the wall time in useful steps; None without any time."""
        return goodput_share(self.seconds)

    def format_table(self) -> str:
        """A table of the causes with their time and share, the largest first."""
        return format_seconds(self.seconds)


def goodput_share(seconds: Mapping[str, float]) -> float | None:
    """Share of useful steps in the seconds by cause; None without any time."""
    total = sum(seconds.values())
    return seconds.get("step", 0.0) / total if total > 0 else None


def sort_by_size(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """(cause, seconds): useful steps first, then the other causes that took time, the largest first."""
    others = sorted((c for c in seconds if c != "step" and seconds[c] > 0), key=lambda c: -seconds[c])
    return [(c, seconds.get(c, 0.0)) for c in ("step", *others)]


def format_seconds(seconds: Mapping[str, float]) -> str:
    """A text table of the causes with their time and share."""
    # Avoids a division by zero for a run that just began.
    total = max(sum(seconds.values()), 1e-9)
    rows = [(CAUSES[c], format_duration(s), f"{100 * s / total:.1f} %") for c, s in sort_by_size(seconds)]
    rows.append(("wall time", format_duration(total), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows)


def read_events(workdir: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a workdir. Incomplete lines and a missing or unreadable file are ignored."""
    return read_json_lines(workdir / GOODPUT_FILE)


def process_start_time() -> float:
    """Start time of this process in seconds since the epoch; the present time where the system lacks /proc."""
    try:
        ticks = int(process_start(os.getpid()))
        # Start times count from the boot of the machine, in clock ticks.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - max(0.0, age)
    except (OSError, ValueError, AttributeError):
        return time.time()


class Goodput:
    """Measures the time of a process by cause, and writes it to the file.

    Args:
      workdir: of the run.
      about: facts of this process, for its first line.
      enabled: False on all processes but the first: time is measured, but not written.
      began: start of the process in seconds since the epoch; None for now.
      stops: exceptions that stop a process on request and are no failure.
      clock: monotonic seconds.

    Attributes:
      step: number of steps done; the loop sets it.
      account: of all processes of this workdir, up to the last line written.
    """

    def __init__(
        self,
        workdir: Path,
        about: Mapping[str, Any] | None = None,
        *,
        enabled: bool = True,
        began: float | None = None,
        stops: tuple[type[BaseException], ...] = (KeyboardInterrupt,),
        clock: Callable[[], float] = time.monotonic,
    ):
        self.step = 0
        self._clock, self._stops = clock, stops
        # Reentrant: flush and close are called with and without the lock.
        self._lock = threading.RLock()
        self._over = threading.Event()
        # Nested causes; the time since self._since belongs to the last one.
        self._stack = ["start"]
        self._since = clock()
        self._opened = self._since
        # A start in the future (a clock that was set back) would give negative seconds.
        now = time.time()
        began = now if began is None else min(began, now)
        self._total: dict[str, float] = defaultdict(float, start=now - began)
        self._written: dict[str, float] = {}
        self._skipped = 0
        self.account = Account(read_events(workdir) if enabled else ())
        self._file: Path | None = None
        if enabled:
            path = workdir / GOODPUT_FILE
            try:
                append_text(path, "")
                # A killed process may have left half a line, which must not swallow the next one.
                if not _ends_with_newline(path):
                    append_text(path, "\n")
                self._file = path
            except OSError as e:
                _log.warning("%s cannot be written (%s): goodput is not kept", path, e.strerror or e)
        self._write_event({"event": "start", "time": round(began, 3), "about": dict(about or {})})
        if self._file is not None:
            # A thread: a process that is killed within one long phase has written lines about it.
            threading.Thread(target=self._flush_periodically, daemon=True, name="goodput").start()

    @contextlib.contextmanager
    def __call__(self, cause: str, behind: Any = None) -> Iterator[None]:
        """A context: the time within it belongs to `cause`.

        Args:
          cause: a key of CAUSES.
          behind: an array that the devices were computing at the start. If it is not ready at the end, the devices were
            busy all the time, and the time counts as useful steps.
        """
        with self._lock:
            self._charge_elapsed()
            # The value at entry: only the time of this context may move to "step".
            entered = self._total[cause]
            self._stack.append(cause)
        try:
            yield
        finally:
            with self._lock:
                self._charge_elapsed()
                self._stack.pop()
                if behind is not None and not behind.is_ready():
                    # Time that the thread has written already stays with its cause.
                    moved = self._total[cause] - max(entered, self._written.get(cause, 0.0))
                    self._total[cause] -= moved
                    self._total["step"] += moved
                # Starting ends with the first step. Time outside of any cause is "other" from then on.
                if cause == "step":
                    self._stack[0] = "other"
                # The other causes are rare and long (a checkpoint, a compilation): each gets a line at its end.
                elif cause != "data":
                    self.flush()

    def record_resume(self, step: int) -> None:
        """Records the step that the state is of: at the start, and after each rollback."""
        with self._lock:
            # Before a rollback, the time so far must be written with the steps it belongs to.
            if self.account.sessions[-1].first_step is not None:
                self.flush()
            self.step = step
            self._write_event({"event": "resume", "time": round(time.time(), 3), "step": step})

    def record_skipped(self, steps: int = 1) -> None:
        """Records skipped steps: steps since the last line that changed no parameter."""
        with self._lock:
            self._skipped += steps

    def record_facts(self, facts: Mapping[str, Any]) -> None:
        """Records further facts of this process."""
        self._write_event({"event": "about", "time": round(time.time(), 3), "about": dict(facts)})

    @property
    def training_seconds(self) -> float:
        """Seconds of this process in steps and in waiting for data: the clock of the images a second."""
        with self._lock:
            self._charge_elapsed()
            return self._total["step"] + self._total["data"]

    def total_seconds(self) -> dict[str, float]:
        """Seconds by cause, of all processes of this workdir until now."""
        with self._lock:
            self._charge_elapsed()
            # The account has what is written; the rest is in memory.
            new, known = self._unwritten_seconds(), self.account.seconds
            return {cause: known.get(cause, 0.0) + new.get(cause, 0.0) for cause in {*known, *new}}

    @property
    def share(self) -> float | None:
        """Goodput until now: the share of useful steps in the wall time since the run first started."""
        return goodput_share(self.total_seconds())

    def flush(self) -> None:
        """Writes a line with the time since the last line."""
        with self._lock:
            self._charge_elapsed()
            # Milliseconds: less than half of one rounds to zero.
            new = {cause: round(s, 3) for cause, s in self._unwritten_seconds().items() if s >= 0.0005}
            event = {"event": "time", "time": round(time.time(), 3), "step": self.step, "seconds": new}
            if self._skipped:
                event["skipped"] = self._skipped
            self._written = dict(self._total)
            self._skipped = 0
            self._write_event(event)

    def close(self, exit: str = "done", message: str = "") -> None:
        """Writes the last lines. A second call does nothing."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
            self.flush()
            self._write_event({"event": "end", "time": round(time.time(), 3), "exit": exit, "message": message})
            self._file = None

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        message = "" if error is None else " ".join(str(error).split())[:500] or type(error).__name__
        # A stop on request is no failure in the report.
        stopped = isinstance(error, (KeyboardInterrupt, *self._stops))
        self.close("done" if error is None else "stopped" if stopped else "failed", message)

    def _charge_elapsed(self) -> None:
        now = self._clock()
        self._total[self._stack[-1]] += now - self._since
        self._since = now

    def _unwritten_seconds(self) -> dict[str, float]:
        return {cause: s - self._written.get(cause, 0.0) for cause, s in self._total.items()}

    def _flush_periodically(self) -> None:
        # Lines get rarer as the process gets older.
        while not self._over.wait(min(max((self._clock() - self._opened) / _LINES, _SHORTEST), _LONGEST)):
            with self._lock:
                if not self._over.is_set():
                    self.flush()

    def _write_event(self, event: dict[str, Any]) -> None:
        with self._lock:
            self.account.add_event(event)
            if self._file is None:
                return
            try:
                append_text(self._file, json.dumps(event) + "\n")
            # A full disk must not end training.
            except OSError as e:
                _log.warning("%s cannot be written (%s): goodput is no longer kept", GOODPUT_FILE, e.strerror or e)
                self._file = None


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        # An empty file needs no newline.
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
