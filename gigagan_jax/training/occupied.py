"""One run at a time in a workdir: a second one would remove what the first is writing."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from gigagan_jax.errors import UserError

FILE = "run.lock"
_FAR_SECONDS = 90.0  # until a file server has forgotten a machine that was lost

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(workdir: Path, patience: float = _FAR_SECONDS) -> Iterator[None]:
    """Holds the workdir, which is made where it is missing, for this process.

    By a record lock: the system gives it up when the process ends, however it ends, workers of the data do not inherit it,
    and file servers know it. A process holds what it already has: only another one is kept out.

    Args:
      patience: seconds to wait for a holder on another machine, which may be lost; one on this machine is not waited for.

    Raises:
      UserError: another process trains in it, or it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise UserError(
            f"--workdir={workdir} cannot be used: {e.strerror or e}; choose a folder you may write to"
        ) from None
    try:
        _take(handle, workdir, patience)
        yield
    finally:
        os.close(handle)


def _take(handle: int, workdir: Path, patience: float) -> None:
    end, said = time.monotonic() + patience, False
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                _log.warning("%s cannot be locked (%s): see that no second run uses it", workdir, e.strerror)
                return
        host, process = _holder(handle)
        if host == socket.gethostname() or time.monotonic() > end:
            raise UserError(
                f"--workdir={workdir}: another run is in it (process {process} on {host}): stop that one first, "
                "or choose another folder"
            )
        if not said:
            _log.info(
                "waiting up to %.0f s for the run that is in %s (process %s on %s)", patience, workdir, process, host
            )
            said = True
        time.sleep(1)
    # A full disk is found by what must be written; who holds the lock is only told.
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)


def _holder(handle: int) -> tuple[str, str]:
    """(host, process) of who has it, as far as it is told."""
    try:
        told = json.loads(os.pread(handle, 1000, 0))
        return str(told["host"]), str(told["process"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a machine that is not told", "?"
