"""One run at a time in a workdir: a second one would remove what the first is writing."""

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

LOCK, ALIVE = "run.lock", "run.alive"
_FAR_SECONDS = 90.0  # until a file server has forgotten a machine that was lost
_BEAT_SECONDS, _BEATS = 10.0, 3  # between two signs of life; so many are waited for

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(workdir: Path, patience: float = _FAR_SECONDS, beat: float = _BEAT_SECONDS) -> Iterator[None]:
    """Holds the workdir, which is made where it is missing, for this process.

    By a record lock: the system gives it up when the process ends, however it ends, workers of the data do not inherit it,
    and file servers know it. Disks in user space (a bucket that is mounted) know it within one machine only: so the process
    also counts up in a file, and who finds a count of another machine looks whether it goes on.

    Args:
      patience: seconds to wait for a lock of another machine, which may be lost.
      beat: seconds between two signs of life.

    Raises:
      UserError: another process trains in it, or it cannot be written.
      Unreachable: another machine has the lock, and may be lost.
    """
    with _usable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    over = threading.Event()
    me: dict[str, Any] = {
        "host": socket.gethostname(),
        "boot": _boot(),
        "process": os.getpid(),
        "run": uuid.uuid4().hex,
    }
    try:
        locked = _take(handle, workdir, me, patience)
        _look(workdir, me if locked else {}, beat)
        with _usable(workdir):
            _sign(workdir, me, 0)
        thread = threading.Thread(target=_live, args=(workdir, me, beat, over), daemon=True, name="alive")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(beat)  # it may be writing
            with contextlib.suppress(OSError):
                (workdir / ALIVE).unlink()
    finally:
        os.close(handle)


@contextlib.contextmanager
def _usable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(
            f"--workdir={workdir} cannot be used: {e.strerror or e}; choose a folder you may write to"
        ) from None


def _boot() -> str:
    """Names this machine since it was started; containers on it, too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _occupied(workdir: Path, holder: dict[str, Any], kind: type[UserError] = UserError) -> UserError:
    who = f"process {holder.get('process', '?')} on {holder.get('host', 'a machine that is not told')}"
    return kind(f"--workdir={workdir}: another run is in it ({who}): stop that one first, or choose another folder")


def _take(handle: int, workdir: Path, me: dict[str, Any], patience: float) -> bool:
    """Takes the lock; False where there are none."""
    end, said = time.monotonic() + patience, False
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                _log.warning("%s cannot be locked (%s): its signs of life must do", workdir, e.strerror)
                return False
        holder = _parsed(os.pread(handle, 1000, 0))
        if holder.get("boot") == me["boot"]:
            raise _occupied(workdir, holder)
        if time.monotonic() > end:
            raise _occupied(workdir, holder, Unreachable)
        if not said:
            _log.info(
                "waiting up to %.0f s for the run in %s on %s", patience, workdir, holder.get("host", "another machine")
            )
            said = True
        time.sleep(1)
    # A full disk is found by what must be written; who holds the lock is only told.
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(me).encode(), 0)
    return True


def _look(workdir: Path, holder: dict[str, Any], beat: float) -> None:
    """Raises UserError where another process lives in the workdir.

    Args:
      holder: of the lock, on whose machine nobody else can; {} where there are no locks
    """
    before = read(workdir)
    if not before or before.get("boot") == holder.get("boot"):
        return
    _log.info(
        "a run on %s did not end by itself: looking for %.0f s whether it lives", before.get("host"), _BEATS * beat
    )
    end = time.monotonic() + _BEATS * beat
    while time.monotonic() < end:
        time.sleep(min(1.0, beat / 4))
        now = read(workdir)
        if not now:
            return
        if now != before:
            raise _occupied(workdir, now)


def _live(workdir: Path, me: dict[str, Any], beat: float, over: threading.Event) -> None:
    count = 0
    while not over.wait(beat):
        count += 1
        with contextlib.suppress(OSError):  # a full disk, a server that is away
            _sign(workdir, me, count)


def _sign(workdir: Path, me: dict[str, Any], count: int) -> None:
    temporary = workdir / f"{ALIVE}.tmp"
    temporary.write_text(json.dumps(me | {"count": count}))
    os.replace(temporary, workdir / ALIVE)


def read(workdir: Path) -> dict[str, Any]:
    """What the process in a workdir says of itself; {} where there is none."""
    try:
        return _parsed((workdir / ALIVE).read_bytes())
    except OSError:
        return {}


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
