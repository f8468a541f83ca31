"""Output folders for prepared files: on this machine, or at an address of any fsspec file system (gs://, s3://)."""

import contextlib
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import hold_file_lock
from gigagan_jax.data.storage import is_local, local_path

# Inside the output folder: os.replace moves files only within one file system.
SCRATCH = ".scratch"
# The optional dependency group of this package that each scheme needs.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}


class Output:
    """A folder whose files appear whole or not at all. Created on first use; picklable.

    Args:
      folder: path or address.
    """

    def __init__(self, folder: str):
        self.local = is_local(folder)
        # Without a trailing slash, names of an address have no empty part.
        self.folder = local_path(folder) if self.local else folder.rstrip("/")
        # {name: (files, bytes)} of an address, listed once. Local folders are read anew each time.
        self._listing: dict[str, tuple[int, int]] | None = None

    def __str__(self) -> str:
        return self.folder

    # A listing may be large, and a worker needs a current one.
    def __getstate__(self):
        return {"local": self.local, "folder": self.folder, "_listing": None}

    def subfolder(self, name: str) -> "Output":
        """A folder in this one."""
        return Output(posixpath.join(self.folder, name))

    @contextlib.contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """A new local folder for unfinished files, removed afterwards; on the output's disk where that is local.

        Raises:
          UserError: the folder cannot be created, or work in it fails for want of space or rights.
        """
        with self._explain_errors():
            # A name of its own: several workers write at once.
            folder = Path(self.folder, SCRATCH, uuid.uuid4().hex) if self.local else Path(tempfile.mkdtemp())
            folder.mkdir(parents=True, exist_ok=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def clear_scratch(self) -> None:
        """Removes the unfinished files of killed tasks.

        A task of a killed run that still writes there fails and can publish nothing.
        """
        if not self.local:
            return
        # Renamed before files are removed. A task could otherwise publish a folder that has lost some of its files.
        with contextlib.suppress(OSError):
            os.rename(Path(self.folder, SCRATCH), Path(self.folder, f"{SCRATCH}-{uuid.uuid4().hex}"))
        # A kill may also have left renamed folders of earlier calls.
        for old in (Path(self.folder, SCRATCH), *Path(self.folder).glob(f"{SCRATCH}-*")):
            shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def hold_lock(self, name: str, by: str) -> Iterator[None]:
        """Holds a lock file of a local folder. The kernel releases it however this process ends.

        Args:
          name: of the file.
          by: the holder, for the error message.

        Raises:
          UserError: another process holds the lock, or the file cannot be written.
        """
        # Buckets have no locks.
        if not self.local:
            yield
            return

        def raise_held() -> None:
            raise UserError(f"{self.folder}/{name} is held: {by}; wait for its end, or end it")

        # The stack keeps the lock while leaving _explain_errors: OSErrors of the body are not about this folder.
        with contextlib.ExitStack() as stack:
            with self._explain_errors():
                Path(self.folder).mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold_file_lock(Path(self.folder, name), raise_held))
            yield

    def publish(self, unfinished: Path, name: str) -> None:
        """Moves or uploads a file or folder from `scratch_folder` to `name` and replaces what exists there.

        Raises:
          UserError: the target cannot be written.
        """
        with self._explain_errors():
            if self.local:
                target = Path(self.folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                # os.replace does not overwrite a folder that has files.
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(unfinished, target)
                return
            system, root = self._file_system()
            target_name = posixpath.join(root, name)
            # Buckets have no atomic move: a folder of files becomes visible file by file.
            if unfinished.is_file():
                _upload_file(system, unfinished, target_name)
                return
            for file in sorted(unfinished.rglob("*")):
                if file.is_file():
                    _upload_file(system, file, posixpath.join(target_name, file.relative_to(unfinished).as_posix()))

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file. Raises as `publish` does."""
        with self.scratch_folder() as folder:
            file = folder / "text"
            file.write_text(text, encoding="utf-8")
            self.publish(file, name)

    def read_text(self, name: str) -> str | None:
        """Reads a small file; None where it is missing or no text."""
        try:
            if self.local:
                return Path(self.folder, name).read_text(encoding="utf-8")
            system, root = self._file_system()
            return system.cat_file(posixpath.join(root, name)).decode("utf-8")
        # Text that is not UTF-8 is damaged, and counts as missing.
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None
        except OSError as e:
            raise UserError(f"{self.folder}/{name} cannot be read: {e.strerror or e}") from None

    def measure_extent(self, name: str) -> tuple[int, int]:
        """(files, bytes) of a file or of a folder of files; (0, 0) where it is missing. Addresses are listed once."""
        if self.local:
            place = Path(self.folder, name)
            if place.is_file():
                return 1, place.stat().st_size
            if not place.is_dir():
                return 0, 0
            with os.scandir(place) as entries:
                sizes = [entry.stat().st_size for entry in entries if entry.is_file()]
            return len(sizes), sum(sizes)
        # One listing for all shards, in place of a request for each.
        if self._listing is None:
            self._listing = self._list_files()
        return self._listing.get(name, (0, 0))

    def list_names(self) -> list[str]:
        """Sorted names of the files and folders directly in the folder, without hidden ones."""
        if self.local:
            place = Path(self.folder)
            found = {p.name for p in place.iterdir()} if place.is_dir() else set()
        else:
            found = {name.split("/")[0] for name in self._list_files()}
        return sorted(name for name in found if not name.startswith("."))

    def _list_files(self) -> dict[str, tuple[int, int]]:
        system, root = self._file_system()
        extents: dict[str, tuple[int, int]] = {}
        with self._explain_errors():
            # fsspec keeps listings from before the uploads of other processes.
            system.invalidate_cache()
            for path, info in (system.find(root, detail=True) or {}).items():
                name, size = posixpath.relpath(path, root), int(info["size"] or 0)
                extents[name] = 1, size
                # Buckets have no folders: a folder's extent is the sum of its files.
                parent = posixpath.dirname(name)
                if parent:
                    files, total = extents.get(parent, (0, 0))
                    extents[parent] = files + 1, total + size
        return extents

    def _file_system(self) -> tuple[Any, str]:
        import fsspec

        scheme = self.folder[: self.folder.index("://")].lower()
        try:
            return fsspec.core.url_to_fs(self.folder)
        except ImportError as e:
            how = f"pip install -e '.[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(e)
            raise UserError(f"{self.folder}: {scheme}:// needs another package: {how}") from None
        except ValueError:
            raise UserError(f"{self.folder}: no file system is known for {scheme}://") from None

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"{self.folder} cannot be written: {e.strerror or e}; free space, or choose another folder"
            ) from None


def _upload_file(system: Any, file: Path, target: str) -> None:
    try:
        system.put_file(str(file), target)
    # File systems other than buckets need the folder first.
    except FileNotFoundError:
        system.makedirs(posixpath.dirname(target), exist_ok=True)
        system.put_file(str(file), target)
