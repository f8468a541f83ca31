"""The small files of a run in a bucket: written to a folder of this machine, and uploaded whole.

An object store has no append. Files of JSON lines are cut into parts, so that what is uploaded again and again stays small.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from gigagan_jax.checkpoint.object_store import ObjectStore
from gigagan_jax.core.files import PART_BYTES, join_parts, part_names, split_lines
from gigagan_jax.core.workdir_files import (
    CHECKPOINTS_FOLDER,
    COMPILATION_CACHE_FOLDER,
    LOCK_FILE,
    PROFILE_TRIGGER_FILE,
    PROFILES_FOLDER,
    SNAPSHOTS_FOLDER,
    TENSORBOARD_FOLDER,
)

_log = logging.getLogger(__name__)

# Seconds between two uploads of what has changed.
UPLOAD_SECONDS = 30.0
# Folders that a resumed run does not read: they are not downloaded at its start.
_NOT_READ = (CHECKPOINTS_FOLDER, PROFILES_FOLDER, SNAPSHOTS_FOLDER, TENSORBOARD_FOLDER)


class Mirror:
    """Uploads the files of a folder to a bucket, and downloads them from there.

    Args:
      store: of the workdir.
      folder: on this machine.
      guard: called before each upload; raises where this run may not write any more.
    """

    def __init__(self, store: ObjectStore, folder: Path, guard: Callable[[], None] = lambda: None):
        self._store, self._folder = store, folder
        self.guard = guard
        # (size, time stamp in ns) of a file, and the digests of its parts, as they were uploaded.
        self._uploaded: dict[str, tuple[tuple[int, int], list[str]]] = {}
        self._finished = threading.Event()
        # The checkpoint's thread uploads too.
        self._uploading = threading.Lock()
        self._thread: threading.Thread | None = None

    def download(self, everything: bool) -> None:
        """Downloads the small files of the run.

        Args:
          everything: False for what processes other than 0 need only: their programs and the index of the data.
        """
        found = self._store.list_objects()
        shared = (COMPILATION_CACHE_FOLDER, "gigagan_index")
        # Hidden objects are probes; the lock and the trigger are no files of the run.
        wanted = [
            name
            for name in found
            if (everything or name.split("/", 1)[0] in shared)
            and name.split("/", 1)[0] not in (*_NOT_READ, LOCK_FILE, PROFILE_TRIGGER_FILE)
            and not name.startswith(".")
        ]
        self._store.download(wanted, self._folder)
        # The parts as the bucket has them: a copy from a disk has one of any size.
        stored = {
            name: [_digest((self._folder / part).read_bytes()) for part in _existing_parts(self._folder, name)]
            for name in wanted
            if name.endswith(".jsonl")
        }
        # Readers and writers of this machine know one file of lines.
        join_parts(self._folder)
        for name in wanted:
            self._remember(name, stored.get(name, []))
        if everything and any(name.startswith(f"{TENSORBOARD_FOLDER}/") for name in found):
            # Hidden: it tells the logger of metrics that there are events of an earlier start, and is not uploaded.
            (self._folder / TENSORBOARD_FOLDER).mkdir(parents=True, exist_ok=True)
            (self._folder / TENSORBOARD_FOLDER / ".elsewhere").touch()

    def download_folder(self, name: str) -> None:
        """Downloads the files of a folder that this machine lacks."""
        # Grids never change: those of this machine are not asked for again.
        missing = [n for n in self._store.list_objects(name) if not (self._folder / name / n).exists()]
        self._store.download([f"{name}/{n}" for n in missing], self._folder)
        for n in missing:
            self._remember(f"{name}/{n}")

    def start(self) -> None:
        """Begins to upload in the background what changes."""
        self._thread = threading.Thread(target=self._upload_periodically, daemon=True, name="mirror")
        self._thread.start()

    def upload(self) -> None:
        """Uploads what has changed since the last upload.

        Raises:
          UserError: this run may not write any more, or this machine may not.
          Unreachable: the server does not answer.
        """
        with self._uploading:
            # Sizes and times of files, and no digests: a round must cost next to nothing where nothing has changed.
            changed = [n for n in self._list_files() if self._stamp(n) != self._uploaded.get(n, (None, []))[0]]
            for name in changed:
                # Before each and not once: a round may take longer than the lock is trusted.
                self.guard()
                # A file may have been replaced or removed meanwhile: the next upload has it.
                if (self._folder / name).exists():
                    self._upload_file(name)

    def close(self) -> None:
        """Stops the background uploads and uploads what is left. Raises as `upload`."""
        # No round begins after this.
        self._finished.set()
        if self._thread is not None:
            # It may be uploading; `upload` below waits for it in any case.
            self._thread.join(UPLOAD_SECONDS)
        self.upload()

    def _upload_periodically(self) -> None:
        while not self._finished.wait(UPLOAD_SECONDS):
            try:
                self.upload()
                self._look_for_trigger()
            # The next round, or the next checkpoint, tries again; the checkpoint's failure ends the run.
            except Exception as e:
                _log.warning("the logs of this run cannot be uploaded now: %s", e)

    def _look_for_trigger(self) -> None:
        """An object `profile` requests a trace, as the file does in a local workdir."""
        data = self._store.info(PROFILE_TRIGGER_FILE)
        if data is not None:
            (self._folder / PROFILE_TRIGGER_FILE).touch()
            # Other processes look as often.
            self._finished.wait(2 * UPLOAD_SECONDS)
            self._store.delete([PROFILE_TRIGGER_FILE])

    def _list_files(self) -> list[str]:
        names = []
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            # Hidden files and .tmp are half written.
            unfinished = name.endswith(".tmp") or any(part.startswith(".") for part in name.split("/"))
            if not unfinished and name != PROFILE_TRIGGER_FILE and path.is_file():
                names.append(name)
        return names

    def _stamp(self, name: str) -> tuple[int, int]:
        try:
            status = (self._folder / name).stat()
        except OSError:
            return (0, 0)
        return status.st_size, status.st_mtime_ns

    def _upload_file(self, name: str) -> None:
        # Before the read: what is appended meanwhile belongs to the next upload.
        stamp = self._stamp(name)
        before = self._uploaded.get(name, (None, []))[1]
        if name.endswith(".jsonl"):
            parts = split_lines((self._folder / name).read_bytes(), PART_BYTES)
            digests = [_digest(part) for part in parts]
            for part_name, part, digest, old in zip(
                part_names(name), parts, digests, before + [""] * len(parts), strict=False
            ):
                if digest != old:
                    self._store.write_bytes(part_name, part)
            # A rollback takes lines out.
            surplus = [n for n, _ in zip(part_names(name), before, strict=False)][len(parts) :]
            self._store.delete(surplus)
        else:
            # Images, events, settings: written once, or small.
            digests = []
            self._store.upload([name], self._folder)
        self._uploaded[name] = (stamp, digests)

    def _remember(self, name: str, parts: Sequence[str] = ()) -> None:
        # What was just downloaded is not uploaded again.
        path = self._folder / name
        if not path.exists():
            return
        stamp = self._stamp(name)
        if name.endswith(".jsonl") and [_digest(p) for p in split_lines(path.read_bytes(), PART_BYTES)] != list(parts):
            # Cut in another way: the next upload writes it anew.
            stamp = (-1, -1)
        self._uploaded[name] = (stamp, list(parts))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _existing_parts(folder: Path, name: str) -> list[str]:
    return list(itertools.takewhile(lambda part: (folder / part).exists(), part_names(name)))
