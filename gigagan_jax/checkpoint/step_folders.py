"""The folders of a run's checkpoints, on a disk or in a bucket: which are complete, intact, damaged, half written."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from gigagan_jax.checkpoint.checksums import (
    CHECKSUMS_FILE,
    COMMIT_FILE,
    METADATA_FILE,
    ObjectFiles,
    verify_checksums,
)
from gigagan_jax.checkpoint.object_store import ObjectStore
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER

_log = logging.getLogger(__name__)


class StepFolders(Protocol):
    """The checkpoints of a run by step.

    Attributes:
      address: folder or address of all of them, as Orbax takes it.
    """

    address: str

    def exists(self) -> bool:
        """Whether there is such a folder."""

    def all_steps(self) -> list[int]:
        """Steps of all complete checkpoints in ascending order, damaged ones included."""

    def verify(self, step: int) -> str | None:
        """The first damage of a checkpoint; None for an intact one."""

    def has_put_aside(self) -> bool:
        """Whether damaged checkpoints were put aside."""

    def put_aside(self, step: int) -> str:
        """Renames a damaged checkpoint to `<step>.damaged` -> where it is now."""

    def remove_unfinished(self) -> None:
        """Removes what a run left that was stopped while saving."""

    def has(self, step: int, name: str) -> bool:
        """Whether a checkpoint has an item."""

    def read_text(self, step: int, name: str) -> str:
        """Reads a file of a checkpoint. Raises FileNotFoundError, OSError or Unreachable."""

    def fetch(self, step: int) -> None:
        """Brings a checkpoint to where Orbax reads it."""

    def mark(self, step: int) -> None:
        """Writes the marker of a complete checkpoint that lacks it and without which Orbax does not read it."""

    def delete(self, step: int) -> None:
        """Deletes a checkpoint. Stopped in the middle, it leaves one that is not complete."""


class LocalSteps:
    """`StepFolders` on a disk."""

    def __init__(self, workdir: Path):
        self._folder = workdir.resolve() / CHECKPOINTS_FOLDER
        self.address = str(self._folder)

    def exists(self) -> bool:
        return self._folder.is_dir()

    def all_steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(p.name) for p in self._folder.iterdir() if _is_step(p.name) and p.is_dir())

    def verify(self, step: int) -> str | None:
        return verify_checksums(self._folder / str(step))

    def has_put_aside(self) -> bool:
        return self._folder.is_dir() and any(self._folder.glob("*.damaged*"))

    def put_aside(self, step: int) -> str:
        # The same step can be written and damaged more than once.
        aside = next(p for p in (self._folder / name for name in _damaged_names(step)) if not p.exists())
        (self._folder / str(step)).rename(aside)
        return str(aside)

    def remove_unfinished(self) -> None:
        if not self._folder.is_dir():
            return
        for entry in self._folder.iterdir():
            if entry.is_dir() and ".orbax-checkpoint-tmp" in entry.name:
                _log.warning("removing the unfinished checkpoint %s of a run that was stopped while saving", entry.name)
                # What cannot be deleted costs space only: a name that is no number is no checkpoint.
                shutil.rmtree(entry, ignore_errors=True)

    def has(self, step: int, name: str) -> bool:
        return (self._folder / str(step) / name).exists()

    def read_text(self, step: int, name: str) -> str:
        return (self._folder / str(step) / name).read_text(encoding="utf-8")

    def fetch(self, step: int) -> None:
        pass

    def mark(self, step: int) -> None:
        pass

    def delete(self, step: int) -> None:
        shutil.rmtree(self._folder / str(step))


class BucketSteps:
    """`StepFolders` in a bucket, which knows no rename: a checkpoint is complete when its marker is there.

    Args:
      store: of the workdir.
      guard: called before each change; raises where this run may not write any more.
    """

    def __init__(self, store: ObjectStore, guard: Callable[[], None] = lambda: None):
        self._store, self._guard = store, guard
        self.address = store.path(CHECKPOINTS_FOLDER)

    def exists(self) -> bool:
        return bool(self._store.list_folders(CHECKPOINTS_FOLDER))

    def all_steps(self) -> list[int]:
        # Digits alone: "12.damaged" is none.
        names = [n for n in self._store.list_folders(CHECKPOINTS_FOLDER) if _is_step(n)]
        return sorted(int(n) for n in names if self._is_complete(n))

    def verify(self, step: int) -> str | None:
        return verify_checksums(ObjectFiles(self._store, _name(step)))

    def has_put_aside(self) -> bool:
        return any(".damaged" in n for n in self._store.list_folders(CHECKPOINTS_FOLDER))

    def put_aside(self, step: int) -> str:
        taken = self._store.list_folders(CHECKPOINTS_FOLDER)
        name = next(n for n in _damaged_names(step) if n not in taken)
        self._guard()
        # No rename: the copy is complete before the first object goes.
        self._store.copy(_name(step), _name(name))
        self.delete(step)
        return self._store.path(_name(name))

    def remove_unfinished(self) -> None:
        for name in self._store.list_folders(CHECKPOINTS_FOLDER):
            if _is_step(name) and not self._is_complete(name):
                _log.warning("removing the unfinished checkpoint %s of a run that was stopped while saving", name)
                self.delete(int(name))

    def mark(self, step: int) -> None:
        # One that was copied from a disk may lack it.
        if not self.has(step, COMMIT_FILE):
            self._guard()
            self._store.write_bytes(_name(step, COMMIT_FILE), b"complete: it has its checksums")

    def delete(self, step: int) -> None:
        names = list(self._store.list_objects(_name(step)))
        # What makes it complete goes first, in this order: stopped in between, it counts as half written.
        for first in (COMMIT_FILE, METADATA_FILE, CHECKSUMS_FILE):
            if first in names:
                self._guard()
                self._store.delete([_name(step, first)])
                names.remove(first)
        self._guard()
        self._store.delete(_name(step, n) for n in names)

    def has(self, step: int, name: str) -> bool:
        if self._store.info(_name(step, name)) is not None:
            return True
        # An item is a folder, which is nothing but the objects in it.
        return bool(self._store.list_objects(_name(step, name)))

    def read_text(self, step: int, name: str) -> str:
        return self._store.read_bytes(_name(step, name)).decode()

    def fetch(self, step: int) -> None:
        pass

    def _is_complete(self, name: str) -> bool:
        """Orbax writes the time of the commit, and then the marker; on a disk some of its versions write no marker."""
        if self._store.info(_name(name, COMMIT_FILE)) is not None:
            return True
        try:
            metadata = json.loads(self._store.read_bytes(_name(name, METADATA_FILE)))
            return bool(metadata.get("commit_timestamp_nsecs"))
        except (FileNotFoundError, ValueError, AttributeError):
            return False


class StagedSteps(BucketSteps):
    """Checkpoints in a bucket that Orbax cannot write to: they pass through a folder of this machine, one at a time.

    Args:
      store: of the workdir.
      scratch: folder of this machine.
      guard: as of `BucketSteps`.
    """

    def __init__(self, store: ObjectStore, scratch: Path, guard: Callable[[], None] = lambda: None):
        super().__init__(store, guard)
        self._scratch = scratch
        self.address = str(scratch / CHECKPOINTS_FOLDER)

    def fetch(self, step: int) -> None:
        folder = self._scratch / CHECKPOINTS_FOLDER / str(step)
        if not folder.exists():
            # Before the download: the disk of this machine holds one checkpoint at a time.
            self._remove_others(step)
            try:
                self._store.download((_name(step, n) for n in self._store.list_objects(_name(step))), self._scratch)
            except BaseException:
                # Half of it would be taken for the whole.
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def publish(self, step: int) -> None:
        """Uploads a checkpoint that Orbax has written to this machine; the marker comes last."""
        folder = self._scratch / CHECKPOINTS_FOLDER / str(step)
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        # Orbax has written both in the folder; there they make it complete.
        last = [n for n in (METADATA_FILE, COMMIT_FILE) if n in names]
        self._guard()
        # Arrays, items and checksums first.
        self._store.upload((_name(step, n) for n in names if n not in last), self._scratch)
        for name in last:
            # The arrays took their time: another run may hold the lock now.
            self._guard()
            self._store.upload([_name(step, name)], self._scratch)
        self._remove_others(step)

    def delete(self, step: int) -> None:
        super().delete(step)
        shutil.rmtree(self._scratch / CHECKPOINTS_FOLDER / str(step), ignore_errors=True)

    def _remove_others(self, step: int) -> None:
        for old in (self._scratch / CHECKPOINTS_FOLDER).glob("*"):
            if old.name != str(step):
                shutil.rmtree(old, ignore_errors=True)


def _is_step(name: str) -> bool:
    """Whether a folder is a checkpoint's: "0012" is not that of step 12."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _name(step: int | str, *inside: str) -> str:
    return "/".join((CHECKPOINTS_FOLDER, str(step), *inside))


def _damaged_names(step: int) -> itertools.chain[str] | map[str]:
    return itertools.chain([f"{step}.damaged"], (f"{step}.damaged.{i}" for i in itertools.count(2)))
