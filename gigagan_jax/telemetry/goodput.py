"""Where the wall time of a run goes: the share of it in useful steps, and what took the rest, over all restarts.

Every moment of a process belongs to one cause: the loop says which by `with goodput("data"): ...`, and what is inside another
is taken out of it. Process 0 appends the sums to `goodput.jsonl`, one JSON object a line:

    {"event": "start", "time": ..., "about": {...}}   a process began, at this time (seconds since the epoch)
    {"event": "resume", "time": ..., "step": 120}     it goes on from this step; steps beyond it, done before, are lost
    {"event": "time", "time": ..., "step": 150, "skipped": 0, "seconds": {"step": 4.9, "data": 0.1}}   since the line before
    {"event": "about", "time": ..., "about": {...}}   what became known later
    {"event": "end", "time": ..., "exit": "done", "message": ""}

A process that is killed has no "end", and loses what came after its last line. Nothing in the file is ever changed.
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

from gigagan_jax.core.files import append
from gigagan_jax.core.formatting import duration

_log = logging.getLogger(__name__)

GOODPUT_FILE = "goodput.jsonl"
# Causes, and how they are called in tables. The last four are found by the account, not by the loop.
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
# Seconds between lines of the file: few lines of a long run, little lost of a short one.
_SHORTEST, _LONGEST, _LINES = 5.0, 60.0, 500


@dataclasses.dataclass
class Session:
    """One process of a run, from its start to its end or to the last that is known of it.

    Attributes:
      began, last: seconds since the epoch.
      first_step, last_step: None until it had come so far.
      exit: "done", "stopped", "failed", or "" of a process that runs or was killed.
      message: why it ended.
      about: what it said of itself.
    """

    began: float
    last: float
    first_step: int | None = None
    last_step: int | None = None
    exit: str = ""
    message: str = ""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


class Account:
    """The sum of the events of a workdir.

    Attributes:
      seconds: of each cause; over all of them, the wall time from the first start to the last event.
      sessions: the processes, in order.
      rollbacks: (from step, to step) of each return to an earlier step within a process.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()):
        self.seconds: dict[str, float] = defaultdict(float)
        self.sessions: list[Session] = []
        self.rollbacks: list[tuple[int, int]] = []
        self._pieces: list[tuple[int, int, float]] = []  # (step before, step after, seconds): may yet be lost
        for event in events:
            self.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes one event in; one that lacks something, or comes before any start, is passed over."""
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            kind, now = event["event"], float(event["time"])
            if kind == "start":
                self._start(now, dict(event.get("about") or {}))
            elif self.sessions:
                session = self.sessions[-1]
                if kind == "resume":
                    self._resume(session, int(event["step"]))
                elif kind == "time":
                    self._time(session, int(event["step"]), int(event.get("skipped", 0)), dict(event["seconds"]))
                elif kind == "about":
                    session.about |= event["about"]
                elif kind == "end":
                    session.exit, session.message = str(event["exit"]), str(event.get("message", ""))
                session.last = max(session.last, now)

    def _start(self, now: float, about: dict[str, Any]) -> None:
        if self.sessions and self.sessions[-1].exit != "done":  # a finished run that is prolonged was not missed
            self.seconds["down"] += max(0.0, now - self.sessions[-1].last)
        self.sessions.append(Session(now, now, about=about))

    def _resume(self, session: Session, step: int) -> None:
        cause = "repeated"
        if session.first_step is not None:
            cause = "skipped"
            self.rollbacks.append((session.last_step or 0, step))
        else:
            session.first_step = step
        session.last_step = step
        kept = []
        for before, after, seconds in self._pieces:
            if after < step or (after == step and before < step):
                kept.append((before, after, seconds))
                continue
            lost = seconds * (after - max(before, step)) / (after - before) if after > before else seconds
            self.seconds["step"] -= lost
            self.seconds[cause] += lost
            if before < step:
                kept.append((before, step, seconds - lost))
        self._pieces = kept

    def _time(self, session: Session, step: int, skipped: int, seconds: dict[str, float]) -> None:
        before = step if session.last_step is None else session.last_step
        session.last_step = step
        useful = float(seconds.pop("step", 0.0))
        if skipped and step > before:
            aside = useful * min(1.0, skipped / (step - before))
            self.seconds["skipped"] += aside
            useful -= aside
        if useful:
            self.seconds["step"] += useful
            self._pieces.append((before, step, useful))
        for cause, value in seconds.items():
            self.seconds[cause if cause in CAUSES else "other"] += float(value)

    @property
    def share(self) -> float | None:
        """Of the wall time, in useful steps; None before there is any."""
        return share(self.seconds)

    def table(self) -> str:
        """Causes with their time and their share, the largest first."""
        return table(self.seconds)


def share(seconds: Mapping[str, float]) -> float | None:
    """Of all these seconds by cause, in useful steps."""
    total = sum(seconds.values())
    return seconds.get("step", 0.0) / total if total > 0 else None


def by_size(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """(cause, seconds): useful steps, then the others that took any time, the largest first."""
    rest = sorted((c for c in seconds if c != "step" and seconds[c] > 0), key=lambda c: -seconds[c])
    return [(c, seconds.get(c, 0.0)) for c in ("step", *rest)]


def table(seconds: Mapping[str, float]) -> str:
    """Causes with their time and their share as text."""
    total = max(sum(seconds.values()), 1e-9)
    rows = [(CAUSES[c], duration(s), f"{100 * s / total:.1f} %") for c, s in by_size(seconds)]
    rows.append(("wall time", duration(total), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows)


def read_events(workdir: Path) -> Iterator[dict[str, Any]]:
    """The events of a workdir; lines that were cut off, and a file that is missing or unreadable, are passed over."""
    try:
        with open(workdir / GOODPUT_FILE, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    event = json.loads(line)
                    if isinstance(event, dict):
                        yield event
    except OSError:
        return


def process_began() -> float:
    """Seconds since the epoch when this process was started; now, where the system does not tell."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - max(0.0, age)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()


class Goodput:
    """The clock of a process, and its lines in the file.

    Args:
      workdir: of the run.
      about: facts of this process, kept in its first line.
      enabled: False, on all processes but the first: the clock goes, nothing is written.
      began: seconds since the epoch when the process was started; None for now.
      stops: exceptions that end a process as asked for, not by a failure.
      clock: seconds that do not go back.

    Attributes:
      step: how many steps are done; the loop counts it.
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
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._stack = ["start"]
        self._since = clock()
        self._opened = self._since
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
                append(path, "")
                if not _ends_whole(path):
                    append(path, "\n")
                self._file = path
            except OSError as e:
                _log.warning("%s cannot be written (%s): goodput is not kept", path, e.strerror or e)
        self._write({"event": "start", "time": round(began, 3), "about": dict(about or {})})
        if self._file is not None:
            # A thread, so that what a process did before it was killed is known though it was busy with one thing.
            threading.Thread(target=self._beat, daemon=True, name="goodput").start()

    @contextlib.contextmanager
    def __call__(self, cause: str, behind: Any = None) -> Iterator[None]:
        """Time inside is of this cause, of CAUSES.

        Args:
          cause: of the time.
          behind: an array that the devices were asked for before. If they are not done with it at the end, they were
            busy all the while, and nothing was lost: the time is of useful steps.
        """
        with self._lock:
            self._settle()
            entered = self._total[cause]
            self._stack.append(cause)
        try:
            yield
        finally:
            with self._lock:
                self._settle()
                self._stack.pop()
                if behind is not None and not behind.is_ready():
                    moved = self._total[cause] - max(entered, self._written.get(cause, 0.0))
                    self._total[cause] -= moved
                    self._total["step"] += moved
                if cause == "step":
                    self._stack[0] = "other"  # what comes after the loop
                elif cause != "data":
                    self.flush()  # it is rare, and much is done by then: a checkpoint, a compilation

    def resumed(self, step: int) -> None:
        """The state is that of this step: at the start, and again after each return to an earlier one."""
        with self._lock:
            if self.account.sessions[-1].first_step is not None:
                self.flush()  # what was done before belongs to the steps before
            self.step = step
            self._write({"event": "resume", "time": round(time.time(), 3), "step": step})

    def skipped(self, steps: int = 1) -> None:
        """So many of the steps since the last line changed nothing."""
        with self._lock:
            self._skipped += steps

    def about(self, facts: Mapping[str, Any]) -> None:
        """More facts of this process."""
        self._write({"event": "about", "time": round(time.time(), 3), "about": dict(facts)})

    @property
    def training_seconds(self) -> float:
        """Of this process, in steps and waiting for their data: the clock by which its speed is told."""
        with self._lock:
            self._settle()
            return self._total["step"] + self._total["data"]

    def seconds(self) -> dict[str, float]:
        """By cause, of all processes of this workdir until now."""
        with self._lock:
            self._settle()
            new, known = self._new(), self.account.seconds
            return {cause: known.get(cause, 0.0) + new.get(cause, 0.0) for cause in {*known, *new}}

    @property
    def share(self) -> float | None:
        """Goodput until now: of the wall time since the run was first started, the share in useful steps."""
        return share(self.seconds())

    def flush(self) -> None:
        """Writes a line with what was not written yet."""
        with self._lock:
            self._settle()
            new = {cause: round(s, 3) for cause, s in self._new().items() if s >= 0.0005}
            event = {"event": "time", "time": round(time.time(), 3), "step": self.step, "seconds": new}
            if self._skipped:
                event["skipped"] = self._skipped
            self._written = dict(self._total)
            self._skipped = 0
            self._write(event)

    def close(self, exit: str = "done", message: str = "") -> None:
        """Writes the last lines; harmless when called again."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
            self.flush()
            self._write({"event": "end", "time": round(time.time(), 3), "exit": exit, "message": message})
            self._file = None

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        message = "" if error is None else " ".join(str(error).split())[:500] or type(error).__name__
        stopped = isinstance(error, (KeyboardInterrupt, *self._stops))
        self.close("done" if error is None else "stopped" if stopped else "failed", message)

    def _settle(self) -> None:
        now = self._clock()
        self._total[self._stack[-1]] += now - self._since
        self._since = now

    def _new(self) -> dict[str, float]:
        return {cause: s - self._written.get(cause, 0.0) for cause, s in self._total.items()}

    def _beat(self) -> None:
        while not self._over.wait(min(max((self._clock() - self._opened) / _LINES, _SHORTEST), _LONGEST)):
            with self._lock:
                if not self._over.is_set():
                    self.flush()

    def _write(self, event: dict[str, Any]) -> None:
        with self._lock:
            self.account.add(event)
            if self._file is None:
                return
            try:
                append(self._file, json.dumps(event) + "\n")
            except OSError as e:  # a full disk is no reason to stop
                _log.warning("%s cannot be written (%s): goodput is no longer kept", GOODPUT_FILE, e.strerror or e)
                self._file = None


def _ends_whole(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
