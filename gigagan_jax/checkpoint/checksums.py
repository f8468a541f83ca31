"""Checksums of a checkpoint. One file in its folder lists every other file with its size and its digest.

A digest is a SHA-256, or `md5:` and the MD5 that an object store has computed of what it received.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from gigagan_jax.checkpoint.object_store import ObjectInfo, ObjectStore

CHECKSUMS_FILE = "checksums.json"
# Orbax writes the commit time into it after the checksums are computed, so it cannot have one.
METADATA_FILE = "_CHECKPOINT_METADATA"
# Orbax may also write this marker after the checksums. Nothing reads its content.
COMMIT_FILE = "commit_success.txt"
# Every checkpoint has these files, including checkpoints that were written without checksums.
_PARTS = (METADATA_FILE, "state/_METADATA", "state/manifest.ocdbt", "data/metadata", "config/metadata")
# hashlib releases the GIL, so threads hash in parallel.
_THREADS = 16
# Bytes per read: a checkpoint file can be larger than the host's free memory.
_CHUNK = 1 << 22
_MD5 = "md5:"


class CheckpointFiles(Protocol):
    """The files of one checkpoint. Names have slashes; `read`, `size` and `chunks` raise OSError."""

    def names(self) -> list[str]:
        """All of them, in order."""

    def size(self, file: str) -> int:
        """In bytes."""

    def read(self, file: str) -> bytes:
        """The whole content."""

    def chunks(self, file: str) -> Iterator[bytes]:
        """The content in pieces."""

    def stated_md5(self, file: str) -> str:
        """The MD5 that the storage states, in hexadecimal digits; "" without one."""

    def write(self, file: str, data: bytes) -> None:
        """Writes a file whole."""


class FolderFiles:
    """The files of a folder on a disk."""

    def __init__(self, folder: Path):
        self._folder = folder

    def names(self) -> list[str]:
        return sorted(p.relative_to(self._folder).as_posix() for p in self._folder.rglob("*") if p.is_file())

    def size(self, file: str) -> int:
        return (self._folder / file).stat().st_size

    def read(self, file: str) -> bytes:
        return (self._folder / file).read_bytes()

    def chunks(self, file: str) -> Iterator[bytes]:
        with open(self._folder / file, "rb") as source:
            while chunk := source.read(_CHUNK):
                yield chunk

    def stated_md5(self, file: str) -> str:
        return ""

    def write(self, file: str, data: bytes) -> None:
        with open(self._folder / file, "wb") as out:
            out.write(data)
            out.flush()
            # The rename that follows must not become durable before the checksums do.
            os.fsync(out.fileno())


class ObjectFiles:
    """The objects of a folder in a bucket, as one listing has them."""

    def __init__(self, store: ObjectStore, folder: str):
        self._store, self._folder = store, folder
        self._listing: dict[str, ObjectInfo] = store.list_objects(folder)

    def names(self) -> list[str]:
        return sorted(self._listing)

    def size(self, file: str) -> int:
        return self._entry(file).size

    def read(self, file: str) -> bytes:
        # What came after the listing is not part of the checkpoint.
        self._entry(file)
        return self._store.read_bytes(f"{self._folder}/{file}")

    def chunks(self, file: str) -> Iterator[bytes]:
        # Larger than on a disk: each is a request.
        size, chunk = self._entry(file).size, 16 * _CHUNK
        for offset in range(0, size, chunk):
            yield self._store.read(self._store.path(f"{self._folder}/{file}"), offset, min(chunk, size - offset))

    def stated_md5(self, file: str) -> str:
        return self._entry(file).md5

    def write(self, file: str, data: bytes) -> None:
        self._store.write_bytes(f"{self._folder}/{file}", data)

    def _entry(self, file: str) -> ObjectInfo:
        if file not in self._listing:
            raise FileNotFoundError(file)
        return self._listing[file]


def write_checksums(folder: Path | CheckpointFiles) -> None:
    """Writes the checksums of all files of a checkpoint that is complete and not yet committed."""
    files = _as_files(folder)
    names = [f for f in files.names() if f not in (CHECKSUMS_FILE, METADATA_FILE, COMMIT_FILE)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda f: _digest(files, f), names))
    entries = {f: [files.size(f), digest] for f, digest in zip(names, digests, strict=True)}
    text = json.dumps({"files": entries, "sha256": _hash_entries(entries)}, indent=0)
    files.write(CHECKSUMS_FILE, text.encode())


def has_checksums(folder: Path | CheckpointFiles) -> bool:
    """Returns whether the checkpoint was written with checksums."""
    files = _as_files(folder)
    if _has(files, CHECKSUMS_FILE):
        return True
    # The metadata repeats it, so that a lost checksum file is not mistaken for an old checkpoint.
    try:
        return json.loads(files.read(METADATA_FILE))["custom_metadata"]["checksums"] == CHECKSUMS_FILE
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verify_checksums(folder: Path | CheckpointFiles) -> str | None:
    """Compares a checkpoint with its checksums.

    Returns:
      the first damage found, starting with the name of the damaged file; None for an intact checkpoint
    """
    files = _as_files(folder)
    for part in _PARTS:
        if not _has(files, part):
            return f"{part} is missing"
    try:
        json.loads(files.read(METADATA_FILE).decode())
    except (OSError, ValueError) as e:
        return f"{METADATA_FILE} is not readable ({e})"
    # Earlier versions wrote no checksums: the presence of the files is all that can be verified.
    if not has_checksums(files):
        return None
    try:
        stored: Any = json.loads(files.read(CHECKSUMS_FILE).decode())
        entries = {str(f): (int(size), str(digest)) for f, (size, digest) in stored["files"].items()}
        # The list has a checksum of its own: a flipped bit in it must not condemn an intact file.
        if stored["sha256"] != _hash_entries(stored["files"]):
            return f"{CHECKSUMS_FILE} does not have the checksum that it states"
    except FileNotFoundError:
        return f"{CHECKSUMS_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{CHECKSUMS_FILE} is not readable ({type(e).__name__}: {e})"
    # Names and sizes come first: they need no read of the content.
    for file, (size, _) in entries.items():
        try:
            found = files.size(file)
        except OSError:
            return f"{file} is missing"
        if found != size:
            return f"{file} has {found} bytes and not {size}"
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        damages = pool.map(lambda item: _compare_checksum(files, item[0], item[1][1]), entries.items())
        return next((damage for damage in damages if damage), None)


def _as_files(folder: Path | CheckpointFiles) -> CheckpointFiles:
    return FolderFiles(folder) if isinstance(folder, Path) else folder


def _has(files: CheckpointFiles, file: str) -> bool:
    try:
        files.size(file)
    except OSError:
        return False
    return True


def _digest(files: CheckpointFiles, file: str) -> str:
    # Where the storage has hashed what it received, nothing is read back.
    stated = files.stated_md5(file)
    return f"{_MD5}{stated}" if stated else _hash(files, file, "sha256")


def _compare_checksum(files: CheckpointFiles, file: str, digest: str) -> str | None:
    try:
        if digest.startswith(_MD5):
            found = _MD5 + (files.stated_md5(file) or _hash(files, file, "md5"))
        else:
            found = _hash(files, file, "sha256")
    except OSError as e:
        return f"{file} is not readable ({e.strerror or e})"
    return None if found == digest else f"{file} does not have the checksum that it was written with"


def _hash(files: CheckpointFiles, file: str, kind: str) -> str:
    total = hashlib.new(kind, usedforsecurity=False)
    for chunk in files.chunks(file):
        total.update(chunk)
    return total.hexdigest()


def _hash_entries(entries: Any) -> str:
    # Sorted keys: the order of the files is no part of what is protected.
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
