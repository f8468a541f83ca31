"""Checksums of a checkpoint. One file in its folder lists every other file with its size and SHA-256."""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path
from typing import Any

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


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files of a folder, which is complete and not yet renamed into place."""
    files = [f for f in _list_files(folder) if f not in (CHECKSUMS_FILE, METADATA_FILE, COMMIT_FILE)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda f: _hash_file(folder / f), files))
    sizes = [(folder / f).stat().st_size for f in files]
    entries = {f: [size, digest] for f, size, digest in zip(files, sizes, digests, strict=True)}
    with open(folder / CHECKSUMS_FILE, "w", encoding="utf-8") as out:
        json.dump({"files": entries, "sha256": _hash_entries(entries)}, out, indent=0)
        out.flush()
        # The rename that follows must not become durable before the checksums do.
        os.fsync(out.fileno())


def has_checksums(folder: Path) -> bool:
    """Returns whether the checkpoint was written with checksums."""
    if (folder / CHECKSUMS_FILE).exists():
        return True
    # The metadata repeats it, so that a lost checksum file is not mistaken for an old checkpoint.
    try:
        return json.loads((folder / METADATA_FILE).read_text())["custom_metadata"]["checksums"] == CHECKSUMS_FILE
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verify_checksums(folder: Path) -> str | None:
    """Compares a checkpoint with its checksums.

    Returns:
      the first damage found, starting with the name of the damaged file; None for an intact checkpoint
    """
    for part in _PARTS:
        if not (folder / part).is_file():
            return f"{part} is missing"
    try:
        json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        return f"{METADATA_FILE} is not readable ({e})"
    # Earlier versions wrote no checksums: the presence of the files is all that can be verified.
    if not has_checksums(folder):
        return None
    try:
        stored: Any = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
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
            found = (folder / file).stat().st_size
        except OSError:
            return f"{file} is missing"
        if found != size:
            return f"{file} has {found} bytes and not {size}"
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        damages = pool.map(lambda item: _compare_checksum(folder, item[0], item[1][1]), entries.items())
        return next((damage for damage in damages if damage), None)


def _compare_checksum(folder: Path, file: str, digest: str) -> str | None:
    try:
        return (
            None
            if _hash_file(folder / file) == digest
            else f"{file} does not have the checksum that it was written with"
        )
    except OSError as e:
        return f"{file} is not readable ({e.strerror or e})"


def _list_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _hash_file(file: Path) -> str:
    total = hashlib.sha256()
    with open(file, "rb") as source:
        while chunk := source.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def _hash_entries(entries: Any) -> str:
    # Sorted keys: the order of the files is no part of what is protected.
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
