"""Saves on a disk that may be full: training waits for space with its state in memory, and tries again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import jax

from gigagan_jax.checkpoint.disk_space import DiskSpace
from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.checkpoint.write_errors import DiskFull
from gigagan_jax.core.formatting import format_duration
from gigagan_jax.parallel import watchdog

_log = logging.getLogger(__name__)

# Seconds between two tries of a save for which the disk had no room although it seemed so: quotas, inodes, another writer.
_RETRY_SECONDS = 30.0


class CheckpointSaver:
    """Saves the state of a run, and waits for space up to `checkpoint.full_disk_seconds`.

    Args:
      checkpoints: of the run.
      space: on its disk.
      seconds: to wait for space.
      interrupted: on all processes, whether any was told to stop; then nothing is waited for.
    """

    def __init__(self, checkpoints: Checkpoints, space: DiskSpace, seconds: float, interrupted: Callable[[], bool]):
        self._checkpoints, self._space = checkpoints, space
        self._seconds, self._interrupted = seconds, interrupted
        # When the first of the saves that failed one after the other did.
        self._failing_since: float | None = None

    def save(self, start: Callable[[], None]) -> None:
        """Starts a save.

        Args:
          start: starts it; called again after a failure.

        Raises:
          UserError: there was no space for too long, or it failed for another reason.
        """
        while True:
            try:
                # Orbax would wait for it too; what it still writes is not free.
                self._checkpoints.wait_until_finished()
                self._space.wait_for_room(self._interrupted)
                start()
                if self._failing_since is not None:
                    # The last one failed in the background: this one must be whole before the run goes on.
                    self._checkpoints.wait_until_finished()
                self._failing_since = None
                return
            except DiskFull as error:
                self._discard(error)
                self._wait_for_retry(error)

    def has_failed(self) -> bool:
        """Whether the save in progress failed for want of space, and must be made again; never waits for it."""
        try:
            self._checkpoints.check_for_errors()
        except DiskFull as error:
            self._discard(error)
            return True
        return False

    def finish(self, start: Callable[[], None]) -> None:
        """Waits for the save in progress; `start` makes it again where it failed for want of space."""
        try:
            self._checkpoints.wait_until_finished()
        except DiskFull as error:
            self._discard(error)
            # It waits until the save is whole.
            self.save(start)

    def _discard(self, error: DiskFull) -> None:
        # Others would wait for this process within a save that it has given up.
        if jax.process_count() > 1 or not self._seconds or self._interrupted():
            raise error
        _log.warning("%s", error)
        self._checkpoints.discard_failed_save()
        if self._failing_since is None:
            self._failing_since = time.monotonic()

    def _wait_for_retry(self, error: DiskFull) -> None:
        """Raises the error where time is over."""
        assert self._failing_since is not None
        left = self._failing_since + self._seconds - time.monotonic()
        if left <= 0:
            raise error
        _log.warning("training waits for free space, %s at most", format_duration(left))
        # Waiting must not look like a step that hangs. The next step is timed again.
        watchdog.report_progress(None)
        until = time.monotonic() + min(left, _RETRY_SECONDS)
        while time.monotonic() < until and not self._interrupted():
            time.sleep(0.5)
