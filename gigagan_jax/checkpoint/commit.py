"""How a checkpoint becomes complete: checksums first, then a rename on a disk, or a marker in a bucket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from gigagan_jax.checkpoint.checksums import ObjectFiles, write_checksums
from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.checkpoint.step_folders import LocalSteps, StagedSteps, StepFolders
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER

_log = logging.getLogger(__name__)

_Mode = ocp.options.AtomicityMode


def atomicity_options(steps: StepFolders) -> Any:
    """Orbax's options for the place of these checkpoints.

    Stated for every place: Orbax guesses from the path what it is, and takes a checkpoint without the marker of a bucket for half
    written. Not all of its versions write the marker on a disk.
    """
    if isinstance(steps, (LocalSteps, StagedSteps)):
        return ocp.options.AtomicityOptions(mode=_Mode.ATOMIC_RENAME)
    # Legacy: items of a checkpoint that was copied from a disk have no markers of their own.
    return ocp.options.AtomicityOptions(mode=_Mode.COMMIT_FILE, allow_legacy_atomic_rename=True)


def path_class(place: RunFolder, steps: StepFolders, after_commit: Callable[[int], None]) -> type:
    """Orbax's temporary folder of a checkpoint, which gets its checksums before it is complete.

    Orbax finalizes it on process 0, while training continues.

    Args:
      place: of the run.
      steps: its checkpoints.
      after_commit: called with the step of a checkpoint that is complete in a bucket.
    """
    if isinstance(steps, LocalSteps):
        return _RenamedPath
    if isinstance(steps, StagedSteps):
        return _staged_path(place, steps, after_commit)
    return _marked_path(place, after_commit)


def _step_of(path: Any) -> int | None:
    """Each item has a temporary folder of its own; only the checkpoint's name is a number."""
    name = path.get_final().name
    return int(name) if name.isdecimal() else None


class _RenamedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    async def finalize(self) -> None:
        if _step_of(self) is not None:
            # In a thread: hashing gigabytes would block Orbax's event loop.
            await asyncio.to_thread(write_checksums, Path(self.get()))
        await super().finalize()


def _marked_path(place: RunFolder, after_commit: Callable[[int], None]) -> type:
    # Orbax makes the object from a path: what else it needs comes from this closure.
    assert place.store is not None
    store = place.store

    class MarkedPath(ocp.path.atomicity.CommitFileTemporaryPath):
        async def finalize(self) -> None:
            step = _step_of(self)
            if step is None:
                return await super().finalize()

            def prepare() -> None:
                # The logs first: a run that resumes from this checkpoint has the lines before it.
                place.upload()
                write_checksums(ObjectFiles(store, f"{CHECKPOINTS_FOLDER}/{step}"))
                place.check_lock()

            # In threads: each of these waits for a server.
            await asyncio.to_thread(prepare)
            # Writes the marker.
            await super().finalize()
            await asyncio.to_thread(_clean_up, after_commit, step)
            return None

    return MarkedPath


def _staged_path(place: RunFolder, steps: StagedSteps, after_commit: Callable[[int], None]) -> type:
    class StagedPath(_RenamedPath):
        async def finalize(self) -> None:
            step = _step_of(self)
            # Complete on this machine, with its checksums; then there.
            await super().finalize()
            if step is not None:
                await asyncio.to_thread(place.upload)
                await asyncio.to_thread(steps.publish, step)
                await asyncio.to_thread(_clean_up, after_commit, step)

    return StagedPath


def _clean_up(after_commit: Callable[[int], None], step: int) -> None:
    try:
        after_commit(step)
    # Old checkpoints cost space only: the next save deletes them.
    except UserError as e:
        _log.warning("old checkpoints cannot be deleted now: %s", e)
