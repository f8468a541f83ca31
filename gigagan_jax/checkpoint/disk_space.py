"""Room for checkpoints on a disk: looked at before the first step and before each save."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax

from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_bytes, format_duration
from gigagan_jax.parallel import communication, watchdog

_log = logging.getLogger(__name__)

# Manifests, checksums, config and the position in the data.
_SMALL_FILES = 1_000_000
# Seconds between two looks at a full disk, and between two lines about it.
_POLL_SECONDS, _LOG_SECONDS = 5.0, 30.0


class DiskSpace:
    """The room that a run's checkpoints need, and that there is.

    Args:
      place: of the run.
      config: of the run.
      abstract: the state as ShapeDtypeStructs.

    Attributes:
      checkpoint_bytes: size of a checkpoint. Orbax compresses: most take some percent less.
    """

    def __init__(self, place: RunFolder, config: Config, abstract: Any):
        self._place, self._config = place, config
        arrays = jax.tree.leaves(abstract)
        self.checkpoint_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays) + _SMALL_FILES
        # Orbax writes to gs:// itself. To s3:// one checkpoint at a time passes through a folder of this machine.
        self._is_disk = place.store is None or place.store.scheme != "gs"

    def check_start(self, existing: int, remaining_kimg: float) -> None:
        """Refuses a start whose first checkpoint has no room, and warns where later ones will have none.

        Args:
          existing: checkpoints that are there.
          remaining_kimg: thousands of images that the run still trains on.

        Raises:
          UserError: no room for one more checkpoint.
        """
        # One writer looks: the disk of a workdir is one for all.
        if not self._is_disk or jax.process_index() != 0 or remaining_kimg <= 0:
            return
        free = self._free_bytes()
        where = self._place.folder if self._place.store is None else f"{self._place.folder} (for {self._place})"
        size = format_bytes(self.checkpoint_bytes)
        if free < self.checkpoint_bytes:
            raise UserError(
                f"{where} has {format_bytes(free)} free and a checkpoint takes {size}: free some space, or choose another "
                f"--workdir{' or GIGAGAN_SCRATCH' if self._place.store else ''}"
            )
        kept, total = self._kept(existing, remaining_kimg)
        # One more: the oldest goes when the newest is complete.
        needed = (min(kept + 1, total) - existing) * self.checkpoint_bytes
        if self._place.store is None and free < needed:
            fewer = max(1, existing + free // self.checkpoint_bytes - 1)
            _log.warning(
                "%s has %s free; %d checkpoints of %s are kept, and one more while it is written, which takes %s more: free some "
                "space, or keep fewer (--config.checkpoint.keep=%d)",
                where,
                format_bytes(free),
                kept,
                size,
                format_bytes(needed),
                fewer,
            )

    def _kept(self, existing: int, remaining_kimg: float) -> tuple[int, int]:
        """(checkpoints that retention keeps at the end, those that the run will have written)"""
        c = self._config
        total = existing + math.ceil(remaining_kimg / c.checkpoint_kimg)
        kept = c.checkpoint.keep + c.checkpoint.keep_best
        if c.checkpoint.keep_every_kimg:
            kept += int(c.total_kimg // c.checkpoint.keep_every_kimg)
        return min(kept, total), total

    def wait_for_room(self, interrupted: Callable[[], bool]) -> None:
        """Waits up to `checkpoint.full_disk_seconds` until a checkpoint has room; then the save is tried all the same.

        All processes call it, and process 0 decides.

        Args:
          interrupted: on all processes, whether any was told to stop.
        """
        if not self._is_disk:
            return
        began, said = time.monotonic(), -math.inf
        while True:
            missing = self.checkpoint_bytes - self._free_bytes() if jax.process_index() == 0 else 0
            waited = time.monotonic() - began
            is_over = missing <= 0 or waited >= self._config.checkpoint.full_disk_seconds
            if communication.broadcast_from_main(is_over) or interrupted():
                break
            if jax.process_index() == 0 and waited - said >= _LOG_SECONDS:
                said = waited
                left = format_duration(self._config.checkpoint.full_disk_seconds - waited)
                _log.warning(
                    "%s lacks %s for the checkpoint of %s: training waits for free space, %s at most",
                    self._place.folder,
                    format_bytes(missing),
                    format_bytes(self.checkpoint_bytes),
                    left,
                )
            # Waiting must not look like a step that hangs. The next step is timed again.
            watchdog.report_progress(None)
            time.sleep(_POLL_SECONDS)
        if said >= 0:
            _log.info("waited %s for free space", format_duration(time.monotonic() - began))

    def _free_bytes(self) -> int:
        folder = self._place.folder
        # The workdir may be a folder that the first write makes.
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            # The save itself will say what is wrong there.
            return 1 << 62
