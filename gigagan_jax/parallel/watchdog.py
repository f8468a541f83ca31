"""Ends this process when another one of the run fails, is lost, or stalls."""

import atexit
import contextlib
import faulthandler
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

from gigagan_jax.core.errors import error_chain
from gigagan_jax.core.processes import end_at_once
from gigagan_jax.parallel.communication import shared_store

# Keys in the store that the processes of a run share.
_ERROR_KEY, _HEARTBEAT_PREFIX = "gigagan_jax/error", "gigagan_jax/alive/"
# At most one: the watchdog of this process, once it has joined others.
active_watchdogs: list["Watchdog"] = []
# Seconds for which process 0 keeps the store open, so that the others can read why the run ends.
_READ_SECONDS = 5
# [steps done, examples read] of this process; None outside of the loop. The watching thread may read one of them a step late.
_progress: list[int | None] = [None] * 2


def report_progress(step: int | None, example: int | None = None) -> None:
    """Sets the progress that the others report if this process is lost; None outside of the loop of steps."""
    _progress[:] = step, example


@contextlib.contextmanager
def watch_for_stall(stall: float) -> Iterator[None]:
    """Within it, a single process that finishes no step for `stall` seconds is ended. Several have their watchdogs.

    Args:
      stall: seconds; 0 for never.
    """
    # Several processes: the watchdog of process 0 measures the stall of all of them.
    if not stall or active_watchdogs:
        yield
        return
    over = threading.Event()
    threading.Thread(target=_watch_steps, args=(stall, over), daemon=True, name="watch").start()
    try:
        yield
    finally:
        over.set()


def _watch_steps(stall: float, over: threading.Event) -> None:
    stall_clock = _StallClock()
    while not over.wait(1):
        if stall_clock.stalled_seconds({0: _progress[0]}) > stall:
            # Where each thread hangs stands above the line that says that it does. A stderr without a file has no room for it.
            with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
                faulthandler.dump_traceback()
            end_process(
                f"no step was finished for {stall:g} s after step {_progress[0]}: data or a device does not answer", 1
            )


class _StallClock:
    """Counts the seconds in which no process finished a step. Call it about once a second."""

    def __init__(self) -> None:
        self._steps: dict[int, int | None] = {}
        self._seconds, self._checked = 0.0, time.monotonic()

    def stalled_seconds(self, steps: dict[int, int | None]) -> float:
        """Seconds since any process finished a step. None as a step (compiling, evaluating) resets them."""
        now = time.monotonic()
        # The cap of 10 s is for a process that was suspended (Ctrl-Z): it did not wait all that time.
        passed, self._checked = min(now - self._checked, 10.0), now
        # Any process that moves resets the clock: slow processes are no stall.
        self._seconds = 0.0 if steps != self._steps or None in steps.values() else self._seconds + passed
        self._steps = steps
        return self._seconds


def report_failure(message: str, code: int) -> None:
    """Tells all other processes why this one ends, so that they end too. Returns at once for a single process."""
    client = shared_store()
    if client is None or jax.process_count() == 1:
        return
    # The store refuses to overwrite a key: the first failure is the cause, and all processes report that one.
    with contextlib.suppress(Exception):
        client.key_value_set(_ERROR_KEY, f"{code} {jax.process_index()} {message}")
    # Otherwise the others would report this process as lost, and not the cause.
    for watchdog in active_watchdogs:
        watchdog.announce_exit()


def end_all_processes(error: Exception) -> None:
    """Ends all processes after an unexpected error; returns for a single process."""
    if shared_store() is None or jax.process_count() == 1:
        return
    if any(isinstance(c, jax.errors.JaxRuntimeError) for c in error_chain(error)) and active_watchdogs:
        # The error of a broken collective does not name the lost process. The watchdog does, after its time limit.
        time.sleep(active_watchdogs[0].limit + 5)
    traceback.print_exception(error)
    report_failure(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)
    exit_without_waiting(1)


def exit_without_waiting(code: int) -> None:
    """Ends this process without waiting for the others; returns for a single process."""
    if shared_store() is not None and jax.process_count() > 1:
        # sys.exit would run JAX's shutdown barrier, which waits for the other processes.
        end_at_once(code)


class Watchdog:
    """Ends this process when another one fails or is lost. Without it, a collective waits forever.

    Each process writes a heartbeat (a counter and its progress) to the store once a second. Process 0 checks the heartbeats
    of all processes; the others check process 0.

    Args:
      limit: seconds without a heartbeat after which a process counts as lost.
      stall: seconds without a finished step after which live processes are ended too; 0 for never.
    """

    def __init__(self, limit: float, stall: float = 0):
        # The client is fetched once: after JAX's shutdown the global state has none.
        self._client, self.process_index, self.limit, self._stall = shared_store(), jax.process_index(), limit, stall
        self._host = socket.gethostname()
        self._over = threading.Event()
        # Process -> (its last heartbeat, time by our clock at which its counter last changed). Clocks of machines differ.
        self._heartbeats: dict[int, tuple[dict[str, Any], float]] = {}
        self._stall_clock = _StallClock()
        self._last_answer = time.monotonic()
        # Daemons: a thread that is blocked in a call to the store must not keep the process alive.
        targets = (self._run_heartbeats, self._watch_main_process)
        threads = [threading.Thread(target=target, daemon=True, name="watch") for target in targets]
        for thread in threads:
            thread.start()
        self._threads = threads
        # At a normal exit the counter stops too. "done" tells the others that this is no loss.
        atexit.register(self._stop_threads)

    def _stop_threads(self) -> None:
        self._over.set()
        self._threads[0].join(5)
        self._publish_heartbeat("done")

    def announce_exit(self) -> None:
        """Tells the others that this process ends by itself. Process 0 holds the store, so it waits for the others."""
        self._over.set()
        self._publish_heartbeat("done")
        end = time.monotonic() + _READ_SECONDS
        # The others poll once a second, so they need more than a second to see the error.
        while self.process_index == 0 and time.monotonic() < end and not self._all_done():
            time.sleep(0.1)

    def _all_done(self) -> bool:
        try:
            counts = [json.loads(value)["count"] for _, value in self._client.key_value_dir_get(_HEARTBEAT_PREFIX)]
        except Exception:
            return False
        return counts.count("done") == jax.process_count()

    def _publish_heartbeat(self, count: int | str) -> None:
        # The heartbeat thread may be one count behind: "done" must stay the last value.
        if self._over.is_set() and count != "done":
            return
        step, example = _progress
        heartbeat = {"count": count, "host": self._host, "step": step, "example": example}
        # The store may be gone. _watch_main_process notices that.
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_HEARTBEAT_PREFIX}{self.process_index}", json.dumps(heartbeat), True)

    def describe_process(self, process: int) -> str:
        """`process 3 (host x, last at step 120, example 1920)`, from its last heartbeat."""
        last, _ = self._heartbeats.get(process, ({}, 0.0))
        parts = [f"host {last['host']}"] if last else []
        if last.get("step") is not None:
            parts.append(f"last at step {last['step']}, example {last['example']}")
        return f"process {process}" + (f" ({', '.join(parts)})" if parts else "")

    def _run_heartbeats(self) -> None:
        count = 0
        while not self._over.wait(1):
            # The counter shows life without synchronised clocks.
            count += 1
            self._publish_heartbeat(count)
            try:
                failure = self._client.key_value_try_get(_ERROR_KEY)
            except Exception as e:
                # The client has one exception for all errors. Only NOT_FOUND is an answer of the store.
                if "NOT_FOUND" not in str(e):
                    continue
                failure = ""
            if failure:
                code, process, message = failure.split(" ", 2)
                # The process that failed ends by itself, after its own report.
                if int(process) != self.process_index:
                    self.announce_exit()
                    end_process(f"process {process} failed, and with it this one: {message}", int(code))
                return
            with contextlib.suppress(Exception):
                self._check_heartbeats()
            self._last_answer = time.monotonic()

    def _check_heartbeats(self) -> None:
        now = time.monotonic()
        entries = (
            self._client.key_value_dir_get(_HEARTBEAT_PREFIX)
            if self.process_index == 0
            else self._read_main_heartbeat()
        )
        for key, value in entries:
            process, last = int(key.rpartition("/")[2]), json.loads(value)
            # A first heartbeat counts from now: processes start at different times.
            before, since = self._heartbeats.get(process, ({}, now))
            self._heartbeats[process] = (last, since if before.get("count") == last["count"] else now)
            if self.process_index == 0 and last["count"] != "done" and now - self._heartbeats[process][1] > self.limit:
                message = self._describe_lost(process)
                report_failure(message, 1)
                end_process(message, 1)
        # Only process 0 reads the progress of all.
        if self.process_index == 0 and self._stall:
            self._check_for_stall()

    def _read_main_heartbeat(self) -> list[tuple[str, str]]:
        return [(f"{_HEARTBEAT_PREFIX}0", self._client.key_value_try_get(f"{_HEARTBEAT_PREFIX}0"))]

    def _check_for_stall(self) -> None:
        steps = {process: last["step"] for process, (last, _) in self._heartbeats.items()}
        if self._stall_clock.stalled_seconds(steps) > self._stall:
            # The others wait in a collective for the process with the fewest steps: it is the likely cause.
            slow = [p for p in steps if steps[p] < max(steps.values())]
            cause = (
                f"behind the others is {', '.join(map(self.describe_process, slow))}"
                if slow
                else "all are at the same step"
            )
            message = f"no process has finished a step for {self._stall:g} s after step {max(steps.values())}: {cause}"
            report_failure(message, 1)
            end_process(message, 1)

    def _watch_main_process(self) -> None:
        """Ends this process when the store stops answering. A separate thread: a call to a suspended process 0 never returns."""
        while not self._over.wait(1):
            if time.monotonic() - self._last_answer > self.limit:
                end_process(self._describe_lost(0), 1)

    def _describe_lost(self, process: int) -> str:
        name = self.describe_process(process)
        return f"{name} has not answered for {self.limit:g} s: its machine is lost, or it was stopped"


def end_process(message: str, code: int) -> None:
    """Prints the error and ends this process at once, from any thread and while the main thread is in a collective."""
    # os._exit flushes nothing and runs no atexit handlers, which could wait for lost processes.
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
