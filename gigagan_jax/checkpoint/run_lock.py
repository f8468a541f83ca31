"""The lock of a workdir. Two runs in one workdir would delete each other's checkpoints.

A record lock (`fcntl`) excludes other processes. A heartbeat file excludes other machines where locks are local.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.core.workdir_files import HEARTBEAT_FILE, LOCK_FILE

# A file server releases the locks of a lost machine after about this time.
_LOST_HOST_SECONDS = 90.0
# Interval of the heartbeats, and how many intervals a new run waits before it takes over.
_HEARTBEAT_SECONDS, _HEARTBEATS_AWAITED = 10.0, 3

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold_run_lock(
    workdir: Path, patience: float = _LOST_HOST_SECONDS, beat: float = _HEARTBEAT_SECONDS
) -> Iterator[None]:
    """Locks the workdir for this process, and creates it if it is missing.

    Args:
      workdir: workdir of the run.
      patience: seconds to wait for a lock of another machine, which may be lost.
      beat: seconds between two heartbeats.

    Raises:
      UserError: another process trains in it, or it cannot be written.
      Unreachable: another machine holds the lock, and may be lost.
    """
    # A record lock ends with its process, data workers do not inherit it, and file servers support it.
    # File systems in user space (a mounted bucket) enforce it within one machine only: hence the heartbeat.
    with _report_os_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    finished = threading.Event()
    # A process id is unique on one boot of one machine only, so the boot id belongs to it.
    me: dict[str, Any] = {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "process": os.getpid(),
        "run": uuid.uuid4().hex,
    }
    try:
        locked = _acquire_lock(handle, workdir, me, patience)
        # With the lock held, a heartbeat of this machine is of a run that is dead.
        _check_heartbeat(workdir, me if locked else {}, beat)
        with _report_os_errors(workdir):
            _write_heartbeat(workdir, me, 0)
        # A daemon: a run that fails must not wait for its heartbeat.
        thread = threading.Thread(
            target=_write_heartbeats, args=(workdir, me, beat, finished), daemon=True, name="alive"
        )
        thread.start()
        try:
            yield
        finally:
            finished.set()
            # The thread may be writing: its file must not reappear after it is deleted.
            thread.join(beat)
            with contextlib.suppress(OSError):
                (workdir / HEARTBEAT_FILE).unlink()
    finally:
        os.close(handle)


@contextlib.contextmanager
def _report_os_errors(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(
            f"--workdir={workdir} cannot be used: {e.strerror or e}; choose a folder you may write to"
        ) from None


def _boot_id() -> str:
    """Identifies this boot of the machine; all containers on it share the id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def describe_holder(holder: dict[str, Any]) -> str:
    """Names the process that holds a lock."""
    return f"process {holder.get('process', '?')} on {holder.get('host', 'a machine that is not told')}"


def occupied_error(workdir: Path | str, holder: dict[str, Any], kind: type[UserError] = UserError) -> UserError:
    """The line about a workdir that another run holds."""
    who = describe_holder(holder)
    return kind(f"--workdir={workdir}: another run is in it ({who}): stop that one first, or choose another folder")


def _acquire_lock(handle: int, workdir: Path, me: dict[str, Any], patience: float) -> bool:
    """Takes the lock; returns False if the file system has no locks."""
    deadline, announced = time.monotonic() + patience, False
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as e:
            # EACCES and EAGAIN mean that another process holds it; all else, that there are no locks.
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                _log.warning("%s cannot be locked (%s): the heartbeat file is the only guard", workdir, e.strerror)
                return False
        holder = parse_holder(os.pread(handle, 1000, 0))
        # The kernel of this machine releases locks at once: its holder is alive.
        if holder.get("boot") == me["boot"]:
            raise occupied_error(workdir, holder)
        if time.monotonic() > deadline:
            raise occupied_error(workdir, holder, Unreachable)
        if not announced:
            _log.info(
                "waiting up to %.0f s for the run in %s on %s", patience, workdir, holder.get("host", "another machine")
            )
            announced = True
        time.sleep(1)
    # The content only serves messages. A full disk shows where a write is required.
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(me).encode(), 0)
    return True


def _check_heartbeat(workdir: Path, holder: dict[str, Any], beat: float) -> None:
    """Raises UserError if the heartbeat of another process advances.

    Args:
      workdir: workdir of the run
      holder: this process if it holds the lock; {} without locks
      beat: seconds between two heartbeats
    """
    before = read_heartbeat(workdir)
    if not before or before.get("boot") == holder.get("boot"):
        return
    _log.info(
        "a run on %s has not ended cleanly: watching its heartbeat for %.0f s",
        before.get("host"),
        _HEARTBEATS_AWAITED * beat,
    )
    # Counts are compared and no times: the clocks of two machines may differ.
    deadline = time.monotonic() + _HEARTBEATS_AWAITED * beat
    while time.monotonic() < deadline:
        time.sleep(min(1.0, beat / 4))
        current = read_heartbeat(workdir)
        # The other run has just ended and deleted its file.
        if not current:
            return
        if current != before:
            raise occupied_error(workdir, current)


def _write_heartbeats(workdir: Path, me: dict[str, Any], beat: float, finished: threading.Event) -> None:
    count = 0
    while not finished.wait(beat):
        count += 1
        # A full disk or an absent server must not end a run that holds the lock.
        with contextlib.suppress(OSError):
            _write_heartbeat(workdir, me, count)


def _write_heartbeat(workdir: Path, me: dict[str, Any], count: int) -> None:
    # Replaced whole: a reader on another machine must not see half a line.
    temporary = workdir / f"{HEARTBEAT_FILE}.tmp"
    temporary.write_text(json.dumps(me | {"count": count}))
    os.replace(temporary, workdir / HEARTBEAT_FILE)


def read_heartbeat(workdir: Path) -> dict[str, Any]:
    """Returns host, boot, process, run and count of the process in a workdir; {} without one."""
    try:
        return parse_holder((workdir / HEARTBEAT_FILE).read_bytes())
    except OSError:
        return {}


def parse_holder(text: bytes) -> dict[str, Any]:
    """What a lock says of its holder; {} where it is damaged."""
    # The file is empty between the truncation and the write of its holder.
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
