"""Ends this process when another one of the run fails, is lost, or stalls."""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from gigagan_jax.core.errors import causes
from gigagan_jax.parallel.communication import _client

_ERROR, _ALIVE = "gigagan_jax/error", "gigagan_jax/alive/"
_watch: list["_Watch"] = []  # of this process, once it is joined to others
_READ_SECONDS = 5  # for the others to read why all end
_place: list[int | None] = [None] * 2  # of this process: steps done, and position in the data; None outside of the loop


def report(step: int | None, example: int | None = None) -> None:
    """Notes how far this process is, for the others to say should it be lost; None where it is in no loop of steps."""
    _place[:] = step, example


@contextlib.contextmanager
def steps_timed(stall: float) -> Iterator[None]:
    """While it is open, a process alone that finishes no step for so long is ended, as several are by those that watch.

    Args:
      stall: seconds; 0 for never.
    """
    if not stall or _watch:
        yield
        return
    over = threading.Event()
    threading.Thread(target=_time_steps, args=(stall, over), daemon=True, name="watch").start()
    try:
        yield
    finally:
        over.set()


def _time_steps(stall: float, over: threading.Event) -> None:
    still = _Still()
    while not over.wait(1):
        if still.seconds({0: _place[0]}) > stall:
            _end(f"no step was finished for {stall:g} s after step {_place[0]}: data or a device does not answer", 1)


class _Still:
    """For how long no process has finished a step, by what is asked of it about once a second."""

    def __init__(self) -> None:
        self._steps: dict[int, int | None] = {}
        self._seconds, self._asked = 0.0, time.monotonic()

    def seconds(self, steps: dict[int, int | None]) -> float:
        """The same number of steps of each process for so long; compiling, evaluating and the like (None) are not timed."""
        now = time.monotonic()
        # A process that was stopped itself (Ctrl-Z) has not waited all that time.
        passed, self._asked = min(now - self._asked, 10.0), now
        self._seconds = 0.0 if steps != self._steps or None in steps.values() else self._seconds + passed
        self._steps = steps
        return self._seconds


def fail(message: str, code: int) -> None:
    """Tells all other processes why this one ends, for them to end too. Returns at once where there are none."""
    client = _client()
    if client is None or jax.process_count() == 1:
        return
    with contextlib.suppress(Exception):  # somebody was first: what they said is what all say
        client.key_value_set(_ERROR, f"{code} {jax.process_index()} {message}")
    for watch in _watch:
        watch.take_leave()


def unexpected(error: Exception) -> None:
    """What a verb cannot explain ends all processes; returns for a process alone."""
    if _client() is None or jax.process_count() == 1:
        return
    if any(isinstance(c, jax.errors.JaxRuntimeError) for c in causes(error)) and _watch:
        # A collective that breaks says little; which process was lost is known as soon as it has been silent long enough.
        time.sleep(_watch[0].limit + 5)
    traceback.print_exception(error)
    fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)
    leave(1)


def leave(code: int) -> None:
    """Ends this process without waiting for processes that will not come; returns for a process alone."""
    if _client() is not None and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Watch:
    """Ends this process when another one has failed or is lost: it may be waiting for it in a collective, forever.

    Each process counts up in the store once a second, and says where it is. Process 0 looks at all, the others at it.

    Args:
      limit: seconds after which a process that no longer counts is lost.
      stall: seconds after which processes that count are stopped all the same, if none has finished a step; 0 for never.
    """

    def __init__(self, limit: float, stall: float = 0):
        self._client, self.me, self.limit, self._stall = _client(), jax.process_index(), limit, stall
        self._host = socket.gethostname()
        self._over = threading.Event()
        # Process -> (what it says, when its count last changed).
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._still = _Still()
        self._heard = time.monotonic()
        threads = [threading.Thread(target=f, daemon=True, name="watch") for f in (self._talk, self._listen)]
        for thread in threads:
            thread.start()
        self._threads = threads
        atexit.register(self._stop)

    def _stop(self) -> None:
        self._over.set()
        self._threads[0].join(5)
        self._count("done")

    def take_leave(self) -> None:
        """Before this process ends by itself. The store lives in process 0: it waits until all others took theirs, too."""
        self._over.set()
        self._count("done")
        end = time.monotonic() + _READ_SECONDS
        while self.me == 0 and time.monotonic() < end and not self._all_done():
            time.sleep(0.1)

    def _all_done(self) -> bool:
        try:
            said = [json.loads(value)["count"] for _, value in self._client.key_value_dir_get(_ALIVE)]
        except Exception:
            return False
        return said.count("done") == jax.process_count()

    def _count(self, count: int | str) -> None:
        if self._over.is_set() and count != "done":
            return
        step, example = _place
        line = {"count": count, "host": self._host, "step": step, "example": example}
        with contextlib.suppress(Exception):  # the store is gone: _listen sees that
            self._client.key_value_set(f"{_ALIVE}{self.me}", json.dumps(line), True)

    def said(self, process: int) -> str:
        """`process 3 (host x, last at step 120, example 1920)`, of what it said last."""
        last, _ = self._seen.get(process, ({}, 0.0))
        parts = [f"host {last['host']}"] if last else []
        if last.get("step") is not None:
            parts.append(f"last at step {last['step']}, example {last['example']}")
        return f"process {process}" + (f" ({', '.join(parts)})" if parts else "")

    def _talk(self) -> None:
        count = 0
        while not self._over.wait(1):
            count += 1
            self._count(count)
            try:
                failed = self._client.key_value_try_get(_ERROR)
            except Exception as e:
                if "NOT_FOUND" not in str(e):
                    continue
                failed = ""
            if failed:
                code, process, message = failed.split(" ", 2)
                if int(process) != self.me:
                    self.take_leave()
                    _end(f"process {process} failed, and with it this one: {message}", int(code))
                return
            with contextlib.suppress(Exception):
                self._look()
            self._heard = time.monotonic()

    def _look(self) -> None:
        now = time.monotonic()
        said = self._client.key_value_dir_get(_ALIVE) if self.me == 0 else self._zero()
        for key, value in said:
            process, last = int(key.rpartition("/")[2]), json.loads(value)
            before, since = self._seen.get(process, ({}, now))
            self._seen[process] = (last, since if before.get("count") == last["count"] else now)
            if self.me == 0 and last["count"] != "done" and now - self._seen[process][1] > self.limit:
                lost = f"{self.said(process)} has not answered for {self.limit:g} s: its machine is lost, or it was stopped"
                fail(lost, 1)
                _end(lost, 1)
        if self.me == 0 and self._stall:
            self._look_at_steps()

    def _zero(self) -> list[tuple[str, str]]:
        return [(f"{_ALIVE}0", self._client.key_value_try_get(f"{_ALIVE}0"))]

    def _look_at_steps(self) -> None:
        steps = {process: last["step"] for process, (last, _) in self._seen.items()}
        if self._still.seconds(steps) > self._stall:
            slow = [p for p in steps if steps[p] < max(steps.values())]
            whom = f"behind the others is {', '.join(map(self.said, slow))}" if slow else "all are at the same step"
            stalled = f"no process has finished a step for {self._stall:g} s after step {max(steps.values())}: {whom}"
            fail(stalled, 1)
            _end(stalled, 1)

    def _listen(self) -> None:
        """A thread of its own: asking a process 0 that was stopped never returns."""
        while not self._over.wait(1):
            if time.monotonic() - self._heard > self.limit:
                _end(f"{self.said(0)} has not answered for {self.limit:g} s: its machine is lost, or it was stopped", 1)


def _end(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
