"""Joins several processes to one run."""

import argparse
import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax

from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.parallel.communication import _client, _forget_store, _private
from gigagan_jax.parallel.watchdog import _end, _Watch, _watch

_log = logging.getLogger(__name__)


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


@ctypes.CFUNCTYPE(None)
def _terminated() -> None:
    who = _watch[0].said(0) if _watch else "process 0"
    if _watch and _watch[0].me == 0:
        _end("this process lost its connection to the others: see what they say", 1)
    _end(f"{who} has closed its connection: it was killed, or its machine is lost", 1)
