"""The objects of a workdir in a bucket (gs://, s3://): whole reads and writes, conditional writes, listings, deletion.

Requests are retried as those of `data.storage.Storage`. A conditional write whose answer was lost counts as done.
"""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import datetime
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.storage import Storage, configure_clients, join_path

T = TypeVar("T")
# Names the seconds for which a failed request is repeated, and their default.
RETRY_VARIABLE, RETRY_SECONDS = "GIGAGAN_RETRY_SECONDS", 300.0
# Requests in flight of one listing, upload or deletion.
_THREADS = 16


class ChangedError(Exception):
    """The object is not at the version that a conditional write expects: somebody else wrote it."""


@dataclasses.dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of an object.

    size: bytes
    version: generation (gs://) or entity tag (s3://); another for each write
    md5: in hexadecimal digits, computed by the server; "" where it states none
    time: of the write, in seconds since the epoch; 0 where the server states none
    """

    size: int
    version: str
    md5: str
    time: float


class ObjectStore(Storage):
    """The objects under one address. Names are relative to it, with slashes.

    Args:
      address: gs://BUCKET/PATH or s3://BUCKET/PATH.
      retry_seconds: time for which failed requests are repeated before they become an error; None for the environment's.

    Raises:
      UserError: the environment's is no number.
    """

    retry_setting = RETRY_VARIABLE
    # Other processes write what this one looks for.
    caches_listings = False

    def __init__(self, address: str, retry_seconds: float | None = None):
        super().__init__(_retry_seconds() if retry_seconds is None else retry_seconds)
        self.address = address.rstrip("/")
        # Fixed here: rights, conditions and limits depend on it.
        self.scheme = address[: address.index("://")]
        # Orbax and JAX open file systems of their own for such addresses.
        configure_clients(self.scheme)

    def path(self, name: str) -> str:
        """The address of an object."""
        return join_path(self.address, name)

    def read_bytes(self, name: str) -> bytes:
        """Raises FileNotFoundError, and as `Storage.read`."""
        return self.read(self.path(name))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes an object whole. Raises UserError or Unreachable as `Storage.read`."""
        try:
            self._retry(name, lambda system, path: system.pipe_file(path, data))
        except FileNotFoundError:
            raise self._no_bucket() from None

    def _no_bucket(self) -> UserError:
        bucket = "/".join(self.address.split("/")[:3])
        return UserError(f"--workdir={self.address}: there is no bucket {bucket}: create it, or mend the name")

    def write_if(self, name: str, data: bytes, version: str | None) -> str:
        """Writes an object if it is at a version.

        Args:
          name: of the object.
          data: content. It must differ from everybody else's, or a lost answer could not be told from their write.
          version: expected version; None where there must be no object.

        Returns:
          the new version

        Raises:
          ChangedError: the object is at another version.
        """
        try:
            return self._retry(name, lambda system, path: _write_if(self.scheme, system, path, data, version))
        except FileExistsError:
            # The write may have happened while its answer was lost: the retry then finds its own object.
            found = self.read_versioned(name)
            if found is not None and found[0] == data:
                return found[1]
            raise ChangedError(self.path(name)) from None

    def read_versioned(self, name: str) -> tuple[bytes, str] | None:
        """(content, version) of one moment; None where there is no such object."""
        # Content and version come in two answers: a write in between shows in a third.
        while True:
            before = self.info(name)
            if before is None:
                return None
            try:
                data = self.read_bytes(name)
            except FileNotFoundError:
                return None
            after = self.info(name)
            if after is not None and after.version == before.version:
                return data, after.version

    def info(self, name: str) -> ObjectInfo | None:
        """None where there is no such object."""
        try:
            entry = self._retry(name, lambda system, path: system.info(path))
        except FileNotFoundError:
            return None
        # Clients invent folders where names have a slash.
        return None if entry.get("type") == "directory" else _object_info(entry)

    def list_objects(self, folder: str = "") -> dict[str, ObjectInfo]:
        """All objects under a folder, by names relative to it. Raises UserError for a bucket that is missing."""
        inside = self.path(folder) if folder else self.address
        # With the slash: "checkpoints/1" is not the folder of "checkpoints/12/state".
        prefix = inside[inside.index("://") + 3 :].rstrip("/") + "/"
        try:
            found = self._retry(folder, lambda system, path: system.find(prefix, detail=True))
        except FileNotFoundError:
            raise self._no_bucket() from None
        names = {name[len(prefix) :]: entry for name, entry in found.items() if name.startswith(prefix)}
        # A name such as "/etc/passwd" or "../x" would leave the folder that it is downloaded to; "a/" is a folder's mark.
        stays_inside = lambda name: not {"", ".", ".."} & set(name.split("/"))
        return {name: _object_info(entry) for name, entry in names.items() if stays_inside(name)}

    def list_folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder."""
        inside = self.path(folder)
        try:
            entries = self._retry(folder, lambda system, path: system.ls(inside, detail=True))
        except FileNotFoundError:
            return []
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that are missing are no error."""

        def delete_one(name: str) -> None:
            # One by one: a request for many answers that it went well where some of them did not.
            try:
                self._retry(name, lambda system, path: system.rm_file(path))
            except FileNotFoundError:
                return

        self._parallel(delete_one, names)

    def copy(self, source: str, target: str) -> None:
        """Copies all objects of a folder on the server."""

        def copy_one(name: str) -> None:
            # The bytes do not pass through this machine.
            to = self.path(join_path(target, name))
            self._retry(join_path(source, name), lambda system, path: system.cp_file(path, to))

        self._parallel(copy_one, self.list_objects(source))

    def download(self, names: Iterable[str], folder: Path) -> None:
        """Writes objects to files of the same names under a folder."""

        def download_one(name: str) -> None:
            target = folder / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(f"{self.path(name)} cannot be kept on this machine: {e.strerror or e}") from None
            self._retry(name, lambda system, path: system.get_file(path, str(target)))

        self._parallel(download_one, names)

    def upload(self, names: Iterable[str], folder: Path) -> None:
        """Writes files under a folder to objects of the same names."""

        def upload_one(name: str) -> None:
            file = folder / name
            size = file.stat().st_size
            # Small ones whole: one request, and one moment of a file that grows.
            if size < 64 << 20:
                self.write_bytes(name, file.read_bytes())
            else:
                # In pieces: a request of gigabytes would begin anew at each fault.
                self._retry(name, lambda system, path: system.put_file(str(file), path))

        self._parallel(upload_one, names)

    def _parallel(self, act: Callable[[str], None], names: Iterable[str]) -> None:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            # Consumed: the first error is raised, and the rest of the names is not begun.
            for _ in pool.map(act, names):
                pass

    def _retry(self, name: str, act: Callable[[Any, str], T]) -> T:
        path = self.path(name) if name else self.address
        return self._call_with_retries(path, lambda: act(self._file_system(path), path))


def check_bucket(store: ObjectStore) -> None:
    """Raises UserError, with the right that lacks, where a run could not write, read, list and delete at the address.

    Raises:
      UserError: the bucket is missing, or this machine may not do one of them.
      Unreachable: the server does not answer.
    """
    # Hidden: the mirror passes it over where it could not be deleted.
    probe = f".probe-{time.time_ns()}"
    doing = "list"
    try:
        store.list_folders("")
        doing = "create"
        store.write_bytes(probe, b"probe")
        doing = "read"
        store.read_bytes(probe)
        doing = "delete"
        store.delete([probe])
    except UserError as e:
        if e.code != UserError.code or "not allowed" not in str(e):
            raise
        raise UserError(
            f"--workdir={store.address}: this machine may not {doing} objects there ({e}); a run needs to list, create, read "
            "and delete them (docs/pods.md)"
        ) from None


def _retry_seconds() -> float:
    text = os.environ.get(RETRY_VARIABLE, "")
    try:
        seconds = float(text or RETRY_SECONDS)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{RETRY_VARIABLE}={text} is no number of seconds")
    return seconds


def _object_info(entry: dict[str, Any]) -> ObjectInfo:
    tag = str(entry.get("ETag", "")).strip('"')
    # Google's is of the content. The tag of S3 is one too, unless the object came in parts or is encrypted by a key service.
    md5 = base64.b64decode(entry["md5Hash"]).hex() if entry.get("md5Hash") else ""
    written = entry.get("mtime") or entry.get("LastModified")
    time_written = written.timestamp() if isinstance(written, datetime.datetime) else 0.0
    return ObjectInfo(int(entry.get("size") or 0), str(entry.get("generation") or tag), md5, time_written)


def _write_if(scheme: str, system: Any, path: str, data: bytes, version: str | None) -> str:
    bucket, key = path[path.index("://") + 3 :].split("/", 1)
    if scheme == "s3":
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            answer = system.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as e:
            code = getattr(e.__cause__, "response", {}).get("Error", {}).get("Code")
            # s3fs has an exception of its own for one of the two conditions only.
            if code in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                raise FileExistsError(path) from None
            raise
        return answer["ETag"].strip('"')
    # gcsfs has the condition of no object only. The name is in the body: some servers keep conditions of such requests alone.
    boundary = "==gigagan=="
    head = (
        f"--{boundary}\nContent-Type: application/json; charset=UTF-8\n\n{json.dumps({'name': key})}\n"
        f"--{boundary}\nContent-Type: application/octet-stream\n\n"
    )
    answer = system.call(
        "POST",
        f"{system.base.replace('/storage/v1/', '/upload/storage/v1/')}b/{bucket}/o",
        uploadType="multipart",
        ifGenerationMatch=version or "0",
        headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
        data=head.encode() + data + f"\n--{boundary}--".encode(),
        json_out=True,
    )
    return str(answer["generation"])
