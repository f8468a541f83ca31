"""Joins the processes of a run through `jax.distributed`."""

import argparse
import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax

from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.parallel.communication import forget_store, import_private_module, shared_store
from gigagan_jax.parallel.watchdog import Watchdog, active_watchdogs, end_process

_log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--distributed, or --coordinator with --num_processes and --process_id; and the timeouts."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes of a TPU pod, SLURM or Kubernetes job that JAX detects",
    )
    parser.add_argument(
        "--coordinator", default="", help="HOST:PORT of process 0, the same on all processes; if JAX detects no cluster"
    )
    parser.add_argument("--num_processes", type=int, help="number of processes; with --coordinator")
    parser.add_argument(
        "--heartbeat_seconds", type=int, default=100, help="a process that does not answer for this long ends all (100)"
    )
    parser.add_argument("--join_seconds", type=int, default=300, help="time within which all processes must join (300)")
    parser.add_argument(
        "--stall_seconds",
        type=int,
        default=3600,
        help="processes that finish no step for this long are ended, a single one too; 0: never (3600)",
    )
    parser.add_argument("--process_id", type=int, help="index of this process, from 0; with --coordinator")


def join_processes(args: argparse.Namespace) -> None:
    """Joins this process to the others where the flags ask for it. Call it before anything touches a device.

    Raises:
      UserError: the flags do not fit together, or no cluster was found.
      Unreachable: other processes did not join in time.
    """
    for name in ("heartbeat_seconds", "join_seconds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: must be at least 1")
    if args.stall_seconds < 0:
        raise UserError(f"--stall_seconds={args.stall_seconds}: must not be negative")
    if args.coordinator:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--coordinator={args.coordinator}: write HOST:PORT, an address of process 0")
        if None in (args.num_processes, args.process_id):
            raise UserError("--coordinator needs --num_processes and --process_id beside it")
        if not 0 <= args.process_id < args.num_processes:
            raise UserError(f"--process_id={args.process_id}: must be 0 to {args.num_processes - 1} (--num_processes)")
    elif (args.num_processes, args.process_id) != (None, None):
        raise UserError("--num_processes and --process_id need --coordinator=HOST:PORT")
    elif not args.distributed:
        return
    # JAX's preemption service takes SIGTERM for itself. parallel/signals.py handles it, and Agreement shares it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _report_lost_coordinator():
            jax.distributed.initialize(
                args.coordinator or None,
                args.num_processes,
                args.process_id,
                initialization_timeout=args.join_seconds,
                # The watchdog ends a run first, with a message. JAX's own timeout is the fallback if its threads die.
                heartbeat_timeout_seconds=30 + 2 * args.heartbeat_seconds,
                shutdown_timeout_seconds=3 * args.heartbeat_seconds,
            )
    except (RuntimeError, ValueError) as e:
        forget_store()
        # Without a cluster around it JAX asks for arguments of its own, which are no flags here.
        if isinstance(e, ValueError) and not args.coordinator:
            raise UserError(
                "--distributed found no cluster around this machine (a TPU pod, SLURM, Kubernetes or Open MPI): on one machine "
                "leave it out, all of its devices are used; to join machines by hand give each --coordinator=HOST:PORT "
                "--num_processes=N --process_id=0 to N-1"
            ) from None
        where = args.coordinator or "found by --distributed"
        first = (str(e).splitlines() or [type(e).__name__])[0]
        # bad_cast: the callback of _report_lost_coordinator was called while joining.
        if "std::bad_cast" in first or "DEADLINE" in first:
            first = f"not all came within {args.join_seconds} s (--join_seconds)"
        # A ValueError is a missing cluster: the user's mistake. Late machines may join at the next attempt.
        kind = UserError if isinstance(e, ValueError) else Unreachable
        raise kind(
            f"the processes of the run could not be joined (coordinator {where}): {first}; check that all were started, "
            "with the same --coordinator, and reach it"
        ) from None
    _log.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())
    if jax.process_count() > 1 and shared_store() is None:
        _log.warning(
            "jax %s has no known key-value store: if a process fails or is lost, the others end without a message after "
            "%d s, and steps that stall are not detected",
            jax.__version__,
            30 + 2 * args.heartbeat_seconds,
        )
    elif jax.process_count() > 1:
        active_watchdogs.append(Watchdog(args.heartbeat_seconds, args.stall_seconds))


@contextlib.contextmanager
def _report_lost_coordinator() -> Iterator[None]:
    """While joining, makes the client report a lost process 0 in one line, instead of SIGABRT and a page of text.

    The client calls the given callback, but cannot convert its argument. It then calls std::terminate, which is replaced.
    """
    # jax.distributed.initialize has no argument for this callback, so a private function gets it. It ends the process
    # when process 0 is lost, whatever the settings: see the fault-tolerance page of the docs (jax-ml/jax#39095).
    name, argument = "get_distributed_runtime_client", "missed_heartbeat_callback"
    module: Any = import_private_module("jaxlib._jax")
    make_client: Any = getattr(module, name, None)
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        if f"{argument}:" not in (make_client.__doc__ or ""):
            raise AttributeError(argument)
        # std::set_terminate by its mangled name: C++ gives it no C name.
        library._ZSt13set_terminatePFvvE(_on_terminate)
    except (OSError, AttributeError):
        # Another C++ library, or a JAX without this argument: the run goes on with JAX's own message.
        _log.warning("if process 0 is lost, jax %s reports it in a page of text", jax.__version__)
        yield
        return
    setattr(module, name, functools.partial(make_client, **{argument: lambda status: None}))
    try:
        yield
    finally:
        # Only the client that joins takes the callback. Other callers of the function find it as it was.
        setattr(module, name, make_client)


@ctypes.CFUNCTYPE(None)
def _on_terminate() -> None:
    # Process 0 holds the store. If it runs this itself, its own network is what failed.
    process = active_watchdogs[0].describe_process(0) if active_watchdogs else "process 0"
    if active_watchdogs and active_watchdogs[0].process_index == 0:
        end_process("this process lost its connection to the others: see what they say", 1)
    end_process(f"{process} has closed its connection: it was killed, or its machine is lost", 1)
