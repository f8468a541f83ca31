"""Where a run lives: a folder on a disk, or an address in a bucket with a folder of this machine for its small files."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from gigagan_jax.checkpoint import bucket_lock, run_lock
from gigagan_jax.checkpoint.bucket_lock import BucketLock, hold_bucket_lock
from gigagan_jax.checkpoint.mirror import Mirror
from gigagan_jax.checkpoint.object_store import ObjectStore, check_bucket
from gigagan_jax.checkpoint.step_folders import BucketSteps, LocalSteps, StagedSteps, StepFolders
from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.core.files import join_parts
from gigagan_jax.core.processes import at_any_exit, machine_identity, process_start
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER, CONFIG_FILE, REPORT_FILE, SNAPSHOTS_FOLDER, WEIGHTS_FILE
from gigagan_jax.data.storage import is_local, local_path

_log = logging.getLogger(__name__)

_SCHEMES = ("gs", "s3")


class RunFolder:
    """The place of a run.

    Attributes:
      address: as the user named it.
      folder: files of the run on this machine: the place itself, or what is uploaded to a bucket and downloaded from it.
      store: the objects of the place; None on a disk.
    """

    def __init__(self, address: str, folder: Path, store: ObjectStore | None = None):
        self.address, self.folder, self.store = address, folder, store
        self._lock: BucketLock | None = None
        # The run ended because its server did not answer.
        self._away = False
        self._mirror = None if store is None else Mirror(store, folder, self.check_lock)

    def __str__(self) -> str:
        return self.address

    @classmethod
    def open(cls, place: str | Path | RunFolder) -> RunFolder:
        """The place of a run, which need not exist.

        Args:
          place: a folder, gs://BUCKET/PATH, or s3://BUCKET/PATH.

        Raises:
          UserError: an address of another kind, or without a path in its bucket.
        """
        if isinstance(place, RunFolder):
            return place
        text = str(place)
        if isinstance(place, Path) or is_local(text):
            return cls(text, Path(local_path(text)))
        scheme, _, rest = text.partition("://")
        if scheme not in _SCHEMES:
            raise UserError(f"{text}: a run lives in a folder, at gs://BUCKET/PATH or at s3://BUCKET/PATH")
        bucket, _, path = rest.rstrip("/").partition("/")
        # Orbax, TensorStore and the clients of buckets would take these for other places.
        odd = {"", ".", ".."} & set(path.split("/")) if path else set()
        if odd or any(c in "?#[]*" or not c.isprintable() for c in rest):
            raise UserError(
                f"{text!r}: an address has no empty name, no . or .. between slashes, and none of ? # [ ] *"
            )
        if not bucket or not path:
            raise UserError(f"{text}: name a folder in the bucket too, as in {scheme}://{bucket or 'BUCKET'}/runs/one")
        address = f"{scheme}://{bucket}/{path}"
        return cls(address, _make_scratch(address), ObjectStore(address))

    def steps(self) -> StepFolders:
        """The checkpoints of the run."""
        if self.store is None:
            return LocalSteps(self.folder)
        # Orbax writes arrays to gs:// itself, each process its own. It knows no s3://.
        if self.store.scheme == "gs":
            return BucketSteps(self.store, self.check_lock)
        return StagedSteps(self.store, self.folder, self.check_lock)

    def check_usable(self) -> None:
        """Raises UserError where a run could not live there: a right is missing, or its processes are too many."""
        if self.store is None:
            return
        if self.store.scheme == "s3" and jax.process_count() > 1:
            raise UserError(
                f"--workdir={self.address}: a run of several processes cannot keep checkpoints at s3://, to which Orbax does not "
                "write: use gs://, or a folder that all machines have mounted"
            )
        # The others would ask the same server for the same rights.
        if jax.process_index() == 0:
            check_bucket(self.store)

    @contextlib.contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Keeps other runs out. Raises UserError where another one is in it, and Unreachable."""
        if self.store is None:
            with run_lock.hold_run_lock(self.folder):
                yield
            return
        with hold_bucket_lock(self.store) as self._lock:
            yield

    def check_lock(self) -> None:
        """Raises UserError or Unreachable where this run may not write to its bucket any more; returns on a disk."""
        # Process 0 has the lock; the others write nothing that counts before its marker.
        if self._lock is not None:
            self._lock.check()

    def read_run(self) -> str | None:
        """The random name of the run that holds the lock; None without one."""
        if self.store is None:
            # The lock of a disk is of the kernel; its heartbeat is the file that others can read.
            return run_lock.read_heartbeat(self.folder).get("run")
        return bucket_lock.read_run(self.store)

    def show(self, file: Path) -> str:
        """Where users find a file of the run."""
        return str(file) if self.store is None else self.store.path(file.relative_to(self.folder).as_posix())

    def download_settings(self) -> None:
        """Brings the config, and the weights of a published model, to this machine."""
        if self.store is not None:
            # Published weights may lie in a bucket too.
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                if self.store.info(name) is not None:
                    self.store.download([name], self.folder)

    def download_logs(self) -> None:
        """Brings everything that a report shows, but for the checkpoints, to this machine."""
        if self._mirror is not None:
            self._mirror.download(everything=True)

    @contextlib.contextmanager
    def synchronize(self) -> Iterator[None]:
        """Downloads the small files that a run goes on from; uploads what changes in the background, and the rest at the end.

        On a disk it only joins the files that a bucket has in parts.
        """
        if self._mirror is None:
            with contextlib.suppress(OSError):  # opening the workdir reports it
                join_parts(self.folder)
            yield
            return
        # Once more, with the lock held: another run may have written since the settings were read.
        self._mirror.download(everything=jax.process_index() == 0)
        self._mirror.start()
        # Entered before everything that writes, so that the last lines of all of it are uploaded.
        try:
            yield
        except BaseException as error:
            # The logs of a run that failed must not hide why, nor wait for a server that does not answer.
            self._away = isinstance(error, Unreachable)
            if not self._away:
                try:
                    self._mirror.close()
                except (UserError, OSError) as e:
                    _log.warning("the last lines of the logs were not uploaded: %s", e)
            raise
        self._mirror.close()

    def download_programs(self) -> None:
        """Brings the compiled programs of earlier starts to this machine."""
        if self._mirror is not None:
            self._mirror.download(everything=False)

    def upload(self) -> None:
        """Uploads what has changed. Raises UserError or Unreachable; does nothing on a disk."""
        if self._mirror is not None:
            self._mirror.upload()

    def prepare_report(self) -> dict[str, Any]:
        """Brings the grids of the run to this machine -> what a report says of a place in a bucket; {} on a disk."""
        if self._mirror is None or self.store is None:
            return {}
        if self._away:
            raise Unreachable(f"{self.address} does not answer")
        self._mirror.download_folder(SNAPSHOTS_FOLDER)
        sizes: dict[str, int] = {}
        times: dict[str, float] = {}
        for name, info in self.store.list_objects(CHECKPOINTS_FOLDER).items():
            step = name.split("/", 1)[0]
            # "12.damaged" too, as on a disk.
            if step[0].isdecimal():
                sizes[step] = sizes.get(step, 0) + info.size
                times[step] = max(times.get(step, 0.0), info.time)
        return {"address": self.address, "checkpoints": [(step, sizes[step], times[step]) for step in sizes]}

    def upload_report(self) -> None:
        """Uploads the report."""
        if self.store is not None:
            self.check_lock()
            self.store.upload([REPORT_FILE], self.folder)


def workdir_argument(text: str) -> RunFolder:
    """Type for argparse: a folder, gs:// or s3://."""
    return RunFolder.open(text)


def _make_scratch(address: str) -> Path:
    """An empty folder of this process, removed when it ends."""
    base = Path(os.environ.get("GIGAGAN_SCRATCH") or tempfile.gettempdir())
    machine = machine_identity()
    mark = f"gigagan_jax-{hashlib.sha256(f'{address} {machine}'.encode()).hexdigest()[:16]}"
    try:
        base.mkdir(parents=True, exist_ok=True)
        for old in base.glob(f"{mark}-*"):
            # Of a process that was killed. Those of other machines and containers may live: a folder can be shared.
            pid, start = old.name[len(mark) + 1 :].split("-")[:2]
            if machine and pid.isdecimal() and process_start(int(pid)) != start:
                shutil.rmtree(old, ignore_errors=True)
        # A new one for each process: several of a run may share a machine.
        me = f"{mark}-{os.getpid()}-{process_start(os.getpid())}-"
        folder = Path(tempfile.mkdtemp(prefix=me, dir=base))
    except OSError as e:
        raise UserError(
            f"{base} cannot be written ({e.strerror or e}): name another folder by GIGAGAN_SCRATCH"
        ) from None
    at_any_exit(lambda: shutil.rmtree(folder, ignore_errors=True))
    return folder


Place = str | Path | RunFolder
