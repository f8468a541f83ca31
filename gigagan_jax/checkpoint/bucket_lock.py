"""The lock of a workdir in a bucket: an object that is created only where none is, and refreshed by its version.

A run that cannot refresh it stops writing before another may take it over: each run trusts its own clock only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from gigagan_jax.checkpoint.object_store import ChangedError, ObjectStore
from gigagan_jax.checkpoint.run_lock import describe_holder, occupied_error, parse_holder
from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.core.processes import machine_identity, process_start
from gigagan_jax.core.workdir_files import LOCK_FILE

_log = logging.getLogger(__name__)

# Seconds between two refreshes of the lock.
BEAT_SECONDS = 10.0
# A lock that was not refreshed for so long is taken over.
TAKEOVER_SECONDS = 60.0
# The share of it after which a run that could not refresh its lock stops writing.
_TRUSTED_SHARE = 0.7


class BucketLock:
    """A lock that this process holds.

    Attributes:
      run: random name of this run.
    """

    def __init__(self, store: ObjectStore, beat: float = BEAT_SECONDS, takeover: float = TAKEOVER_SECONDS):
        self._store, self._beat, self._takeover = store, beat, takeover
        self._me = _describe_process()
        self.run: str = self._me["run"]
        self._count = 0
        self._version: str | None = None
        self._refreshed = 0.0
        self._lost = ""
        self._finished = threading.Event()
        # The thread that refreshes, and a write that checks, must not use the same version twice.
        self._refreshing = threading.Lock()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          UserError: another run holds it and refreshes it.
        """
        # Versions are compared and no times: the clocks of two machines may differ.
        watched: str | None = None
        deadline = 0.0
        while True:
            found = self._store.read_versioned(LOCK_FILE)
            holder, version = (parse_holder(found[0]), found[1]) if found else ({}, None)
            # A process of this machine: whether it lives is known at once.
            known = bool(self._me["machine"]) and holder.get("machine") == self._me["machine"]
            if version is None or holder.get("free") or (known and _is_dead(holder)):
                # The condition decides between several that see it free.
                with contextlib.suppress(ChangedError):
                    self._write(version)
                    return
                # Somebody else was first.
                continue
            if known:
                raise occupied_error(self._store.address, holder)
            if version != watched:
                # It was refreshed while this run looked: its holder lives.
                if watched is not None:
                    raise occupied_error(self._store.address, holder)
                watched, deadline = version, time.monotonic() + self._takeover
                _log.info(
                    "a run on %s holds %s: waiting up to %.0f s for a sign of it",
                    holder.get("host", "another machine"),
                    self._store.path(LOCK_FILE),
                    self._takeover,
                )
            elif time.monotonic() >= deadline:
                with contextlib.suppress(ChangedError):
                    self._write(version)
                    _log.warning("the run on %s gave no sign for %.0f s: going on", holder.get("host"), self._takeover)
                    return
                # Another one that waited was faster.
                raise occupied_error(self._store.address, holder)
            time.sleep(min(1.0, self._beat / 4))

    def start(self) -> None:
        """Begins to refresh the lock in the background."""
        # A daemon: a run that fails must not wait for its lock.
        threading.Thread(target=self._refresh_periodically, daemon=True, name="bucket lock").start()

    def check(self) -> None:
        """Called before each write of the run.

        Raises:
          UserError: another run has taken the lock.
          Unreachable: the lock could not be refreshed for so long that another run may take it.
        """
        # Released: the report is written after the run. Otherwise no request as a rule: it is called before each upload.
        if not self._lost and not self._finished.is_set() and not self._is_trusted():
            # A process that was suspended: its lock may still be its own.
            self._refresh(retry_seconds=0.0)
        if self._lost:
            raise UserError(
                f"--workdir={self._store.address}: another run has taken its lock ({self._lost}): this one stops here and "
                "writes nothing more"
            )
        if not self._finished.is_set() and not self._is_trusted():
            raise Unreachable(
                f"--workdir={self._store.address}: its lock could not be refreshed for {_now() - self._refreshed:.0f} s, and "
                "another run may take it: this one stops; the same command goes on"
            )

    def _is_trusted(self) -> bool:
        """Whether the last refresh is so recent that nobody may have taken the lock."""
        return _now() - self._refreshed <= _TRUSTED_SHARE * self._takeover

    def release(self) -> None:
        """Frees the lock, where it is still this run's."""
        self._finished.set()
        # A server that is away frees it by time.
        store = ObjectStore(self._store.address, self._beat)
        with self._refreshing, contextlib.suppress(ChangedError, UserError):
            if not self._lost:
                # Not deleted: not every server deletes on a condition.
                store.write_if(LOCK_FILE, _encode(self._me | {"count": self._count, "free": True}), self._version)

    def _refresh_periodically(self) -> None:
        while not self._finished.wait(self._beat):
            self._refresh(retry_seconds=self._takeover)

    def _refresh(self, retry_seconds: float) -> None:
        with self._refreshing:
            if self._lost or self._finished.is_set():
                return
            # Not for the usual time: the lock is lost before that.
            store = ObjectStore(self._store.address, retry_seconds)
            # Each refresh writes something else, by which its answer is known.
            self._count += 1
            try:
                try:
                    self._write(self._version, store)
                except ChangedError:
                    found = store.read_versioned(LOCK_FILE)
                    holder = {} if found is None else parse_holder(found[0])
                    # An earlier refresh may have happened though no answer came; or somebody has deleted the object.
                    if found is None or holder.get("run") == self.run:
                        self._write(None if found is None else found[1], store)
                    else:
                        self._lost = describe_holder(holder)
                        _log.error("another run has taken the lock %s", self._store.path(LOCK_FILE))
            except (UserError, ChangedError) as e:
                # `check` ends the run when this lasts.
                _log.warning("the lock cannot be refreshed: %s", e)

    def _write(self, version: str | None, store: ObjectStore | None = None) -> None:
        # Counted from before the request: the server may have written at any moment of it.
        began = _now()
        data = _encode(self._me | {"count": self._count})
        self._version = (store or self._store).write_if(LOCK_FILE, data, version)
        self._refreshed = began


@contextlib.contextmanager
def hold_bucket_lock(
    store: ObjectStore, beat: float = BEAT_SECONDS, takeover: float = TAKEOVER_SECONDS
) -> Iterator[BucketLock]:
    """Holds the lock of a workdir in a bucket.

    Args:
      store: of the workdir.
      beat: seconds between two refreshes.
      takeover: seconds after which a lock that is not refreshed is taken over.

    Raises:
      UserError: another run trains there, or the bucket cannot be written.
      Unreachable: the server does not answer.
    """
    lock = BucketLock(store, beat, takeover)
    lock.acquire()
    lock.start()
    try:
        yield lock
    finally:
        lock.release()


def read_run(store: ObjectStore) -> str | None:
    """The random name of the run that holds the lock; None without one."""
    try:
        return parse_holder(store.read_bytes(LOCK_FILE)).get("run")
    except FileNotFoundError:
        return None


def _describe_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        # A process number is unique on one boot of one machine, and with its start even when numbers are used again.
        "machine": machine_identity(),
        "process": pid,
        "started": process_start(pid),
        "run": uuid.uuid4().hex,
    }


def _now() -> float:
    """Seconds that also pass while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended."""
    number = holder.get("process")
    return not isinstance(number, int) or process_start(number) != holder.get("started")


def _encode(holder: dict[str, Any]) -> bytes:
    return json.dumps(holder).encode()
