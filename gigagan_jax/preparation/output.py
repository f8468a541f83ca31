"""Where prepared files go: a folder of this machine, or an address of any file system that fsspec knows (gs://, s3://)."""

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
from gigagan_jax.core.processes import locked
from gigagan_jax.data.storage import is_local, local

SCRATCH = ".scratch"
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}


class Output:
    """A folder whose files appear whole or not at all. Made on first use; may be pickled.

    Args:
      folder: path or address.
    """

    def __init__(self, folder: str):
        self.local = is_local(folder)
        self.folder = local(folder) if self.local else folder.rstrip("/")
        self._listing: dict[str, tuple[int, int]] | None = None

    def __str__(self) -> str:
        return self.folder

    def __getstate__(self):
        return {"local": self.local, "folder": self.folder, "_listing": None}

    def sub(self, name: str) -> "Output":
        """A folder in this one."""
        return Output(posixpath.join(self.folder, name))

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new local folder to make things in, removed afterwards; on the disk of the output where that is local.

        Raises:
          UserError: it cannot be made, or what is done in it fails for want of space or rights.
        """
        with self._explained():
            made = Path(self.folder, SCRATCH, uuid.uuid4().hex) if self.local else Path(tempfile.mkdtemp())
            made.mkdir(parents=True, exist_ok=True)
            try:
                yield made
            finally:
                shutil.rmtree(made, ignore_errors=True)

    def clear_scratch(self) -> None:
        """Removes what killed tasks left behind.

        A task of a killed run that still writes there fails: nothing of what it made can be published any more. It would
        publish less than it wrote if files were removed while they keep their place.
        """
        if not self.local:
            return
        with contextlib.suppress(OSError):
            os.rename(Path(self.folder, SCRATCH), Path(self.folder, f"{SCRATCH}-{uuid.uuid4().hex}"))
        for old in (Path(self.folder, SCRATCH), *Path(self.folder).glob(f"{SCRATCH}-*")):
            shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def held(self, name: str, by: str) -> Iterator[None]:
        """Holds a lock file of a local folder, which the kernel gives back however this process ends.

        Args:
          name: of the file.
          by: what holds it, for the error.

        Raises:
          UserError: another process holds it, or it cannot be written.
        """
        if not self.local:
            yield
            return

        def busy() -> None:
            raise UserError(f"{self.folder}/{name} is held: {by}; wait for its end, or end it")

        with contextlib.ExitStack() as stack:
            with self._explained():
                Path(self.folder).mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(Path(self.folder, name), busy))
            yield

    def publish(self, made: Path, name: str) -> None:
        """Moves or uploads a file or folder made in `scratch` to `name`, in place of what is there.

        Raises:
          UserError: it cannot be written.
        """
        with self._explained():
            if self.local:
                target = Path(self.folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_dir():  # of a conversion that was cut short by hand
                    shutil.rmtree(target)
                os.replace(made, target)
                return
            system, root = self._system()
            target_name = posixpath.join(root, name)
            if made.is_file():
                _put(system, made, target_name)
                return
            for file in sorted(made.rglob("*")):
                if file.is_file():
                    _put(system, file, posixpath.join(target_name, file.relative_to(made).as_posix()))

    def write_text(self, name: str, text: str) -> None:
        """A small file; raises as `publish` does."""
        with self.scratch() as folder:
            file = folder / "text"
            file.write_text(text, encoding="utf-8")
            self.publish(file, name)

    def read_text(self, name: str) -> str | None:
        """A small file; None where there is none, or one that is not text."""
        try:
            if self.local:
                return Path(self.folder, name).read_text(encoding="utf-8")
            system, root = self._system()
            return system.cat_file(posixpath.join(root, name)).decode("utf-8")
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None
        except OSError as e:
            raise UserError(f"{self.folder}/{name} cannot be read: {e.strerror or e}") from None

    def extent(self, name: str) -> tuple[int, int]:
        """(files, bytes) of a file or of a folder of files; (0, 0) where there is none. Addresses are listed once."""
        if self.local:
            place = Path(self.folder, name)
            if place.is_file():
                return 1, place.stat().st_size
            if not place.is_dir():
                return 0, 0
            with os.scandir(place) as entries:
                sizes = [entry.stat().st_size for entry in entries if entry.is_file()]
            return len(sizes), sum(sizes)
        if self._listing is None:
            self._listing = self._list()
        return self._listing.get(name, (0, 0))

    def names(self) -> list[str]:
        """What lies directly in the folder, hidden files left out; sorted."""
        if self.local:
            place = Path(self.folder)
            found = {p.name for p in place.iterdir()} if place.is_dir() else set()
        else:
            found = {name.split("/")[0] for name in self._list()}
        return sorted(name for name in found if not name.startswith("."))

    def _list(self) -> dict[str, tuple[int, int]]:
        system, root = self._system()
        out: dict[str, tuple[int, int]] = {}
        with self._explained():
            system.invalidate_cache()
            for path, about in (system.find(root, detail=True) or {}).items():
                name, size = posixpath.relpath(path, root), int(about["size"] or 0)
                out[name] = 1, size
                parent = posixpath.dirname(name)
                if parent:
                    files, total = out.get(parent, (0, 0))
                    out[parent] = files + 1, total + size
        return out

    def _system(self) -> tuple[Any, str]:
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
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"{self.folder} cannot be written: {e.strerror or e}; free space, or choose another folder"
            ) from None


def _put(system: Any, file: Path, target: str) -> None:
    try:
        system.put_file(str(file), target)
    except FileNotFoundError:  # a file system with folders; buckets have none
        system.makedirs(posixpath.dirname(target), exist_ok=True)
        system.put_file(str(file), target)
