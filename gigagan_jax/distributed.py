"""Several processes as one run: joining them, and agreeing on what each of them alone has noticed."""

import argparse
import atexit
import contextlib
import ctypes
import functools
import importlib
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gigagan_jax.errors import Unreachable, UserError, causes

_log = logging.getLogger(__name__)
_ERROR, _ALIVE = "gigagan_jax/error", "gigagan_jax/alive/"
_watch: list["_Watch"] = []  # of this process, once it is joined to others
_said = itertools.count()
_SLOWEST_SECONDS = 3600  # for what one process does while the others wait for its word
_READ_SECONDS = 5  # for the others to read why all end
# What is asked of the store that JAX's processes share. JAX has no public name for it.
_STORE = (
    *("key_value_set", "key_value_dir_get", "key_value_try_get"),
    *("blocking_key_value_get", "wait_at_barrier"),
)
_place: list[int | None] = [None] * 2  # of this process: steps done, and position in the data; None outside of the loop


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--distributed, or the three that say the same by hand."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes of a TPU pod, SLURM or Kubernetes job, as found there",
    )
    parser.add_argument(
        "--coordinator", default="", help="HOST:PORT of process 0, where nothing tells; on all processes alike"
    )
    parser.add_argument("--num_processes", type=int, help="how many processes there are; with --coordinator")
    parser.add_argument(
        "--heartbeat_seconds", type=int, default=100, help="a process that does not answer for so long ends all (100)"
    )
    parser.add_argument(
        "--join_seconds", type=int, default=300, help="so long all processes may take to come together (300)"
    )
    parser.add_argument(
        "--stall_seconds",
        type=int,
        default=3600,
        help="processes that answer but finish no step for so long are ended, one alone too; 0: never (3600)",
    )
    parser.add_argument("--process_id", type=int, help="number of this one, from 0; with --coordinator")


def join(args: argparse.Namespace) -> None:
    """Joins this process to the others, where the flags ask for it. Comes before anything that touches a device.

    Raises:
      UserError: flags that do not fit, or no cluster that could be found.
      Unreachable: processes that do not come.
    """
    by_hand = (args.num_processes, args.process_id)
    for name in ("heartbeat_seconds", "join_seconds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: must be at least 1")
    if args.stall_seconds < 0:
        raise UserError(f"--stall_seconds={args.stall_seconds}: must not be negative")
    if args.coordinator:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator={args.coordinator}: write HOST:PORT, an address of process 0")
        if None in by_hand:
            raise UserError("--coordinator needs --num_processes and --process_id beside it")
        if not 0 <= args.process_id < args.num_processes:
            raise UserError(f"--process_id={args.process_id}: must be 0 to {args.num_processes - 1} (--num_processes)")
    elif by_hand != (None, None):
        raise UserError("--num_processes and --process_id need --coordinator=HOST:PORT")
    elif not args.distributed:
        return
    jax.config.update("jax_enable_preemption_service", False)  # signals are agreed on below
    try:
        with _own_last_words():
            jax.distributed.initialize(
                args.coordinator or None,
                args.num_processes,
                args.process_id,
                initialization_timeout=args.join_seconds,
                heartbeat_timeout_seconds=30 + 2 * args.heartbeat_seconds,  # should the threads below be lost
                shutdown_timeout_seconds=3 * args.heartbeat_seconds,
            )
    except (RuntimeError, ValueError) as e:
        _forget_store()
        where = args.coordinator or "found by --distributed"
        first = (str(e).splitlines() or [type(e).__name__])[0]
        if "std::bad_cast" in first or "DEADLINE" in first:  # the former: see _own_last_words
            first = f"not all came within {args.join_seconds} s (--join_seconds)"
        # No cluster found is a mistake; machines that are late may be there at the next try.
        kind = UserError if isinstance(e, ValueError) else Unreachable
        raise kind(
            f"the processes of the run could not be joined (coordinator {where}): {first}; check that all were started, "
            "with the same --coordinator, and reach it"
        ) from None
    _log.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())
    if jax.process_count() > 1 and _client() is None:
        _log.warning(
            "jax %s shows no store that processes share: one that fails or is lost ends the others without a word, after "
            "%d s, and steps that stall are not noticed",
            jax.__version__,
            30 + 2 * args.heartbeat_seconds,
        )
    elif jax.process_count() > 1:
        _watch.append(_Watch(args.heartbeat_seconds, args.stall_seconds))


@contextlib.contextmanager
def _own_last_words() -> Iterator[None]:
    """Where process 0 is gone JAX's client ends the process at once, by SIGABRT and a page of text; this makes it one line.

    The client calls what it is given, but cannot convert the argument: std::terminate is what comes of it, and is ours.
    """
    # JAX has no public way to say it: a private function gets one argument more, where it is known to have a name for it.
    name, argument = "get_distributed_runtime_client", "missed_heartbeat_callback"
    module: Any = _private("jaxlib._jax")
    make: Any = getattr(module, name, None)
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        if f"{argument}:" not in (make.__doc__ or ""):
            raise AttributeError(argument)
        library._ZSt13set_terminatePFvvE(_terminated)
    except (OSError, AttributeError):  # another C++ library, or another JAX
        _log.warning("should process 0 be lost, it is jax %s that says so, in a page of text", jax.__version__)
        yield
        return
    setattr(module, name, functools.partial(make, **{argument: lambda status: None}))
    try:
        yield
    finally:
        setattr(module, name, make)


def _private(module: str) -> Any:
    """A private module of JAX; None where this JAX has none of that name."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


@ctypes.CFUNCTYPE(None)
def _terminated() -> None:
    who = _watch[0].said(0) if _watch else "process 0"
    if _watch and _watch[0].me == 0:
        _end("this process lost its connection to the others: see what they say", 1)
    _end(f"{who} has closed its connection: it was killed, or its machine is lost", 1)


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


def from_zero(mine: Any) -> Any:
    """What process 0 calls this with, on all processes. All call it equally often, and go on together, within an hour: process 0
    may have all files of a checkpoint to compare, and others their data to open.

    Args:
      mine: used on process 0 only; of what JSON knows
    """
    if jax.process_count() == 1:
        return mine
    client = _client()
    if client is None:
        return _broadcast(mine)
    # Over the store and not by a collective: those of CPUs wait for half a minute only.
    key, milliseconds = f"gigagan_jax/said/{next(_said)}", 1000 * _SLOWEST_SECONDS
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(mine))
    client.wait_at_barrier(f"{key}/heard", milliseconds)
    return json.loads(client.blocking_key_value_get(key, milliseconds))


def _broadcast(mine: Any) -> Any:
    """The same by collectives: first how long it is, then the bytes."""
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, text.size)] = text[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())


def _client() -> Any:
    """The key-value store that JAX's processes share; None for a process alone, or where it is not the tested one."""
    client = getattr(_state(), "client", None)
    return client if all(hasattr(client, name) for name in _STORE) else None


def _forget_store() -> None:
    """After a failure to join: nothing more is to be said or asked there."""
    if hasattr(_state(), "client"):
        _state().client = None


def _state() -> Any:
    return getattr(_private("jax._src.distributed"), "global_state", None)


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


class Agreement:
    """A number that each process has, made the largest of all without waiting for any: the answer comes with the steps.

    Args:
      mesh: of the run.
    """

    def __init__(self, mesh: Mesh):
        flat = mesh.devices.reshape(-1)
        self._length = flat.size
        self._each = NamedSharding(Mesh(flat, ("all",)), PartitionSpec("all"))
        everywhere = NamedSharding(self._each.mesh, PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=everywhere)

    def ask(self, mine: int) -> jax.Array:
        """The largest of what all processes ask with, on the device. All processes ask equally often."""
        here = lambda index: np.full(1, mine, np.int32)
        return self._largest(jax.make_array_from_callback((self._length,), self._each, here))
