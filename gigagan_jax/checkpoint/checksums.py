"""Checksums of a checkpoint: a file in its folder that names every other one with its size and SHA-256."""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
METADATA = "_CHECKPOINT_METADATA"  # Orbax writes the time of the commit into it last of all, after the checksums
COMMITTED = "commit_success.txt"  # likewise; it has a name, and no content that is ever read
# What every checkpoint has, of those that were written without checksums too.
_PARTS = (METADATA, "state/_METADATA", "state/manifest.ocdbt", "data/metadata", "config/metadata")
_THREADS = 16
_CHUNK = 1 << 22


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files of a folder; the folder is complete, and not yet where anybody would read it."""
    files = [f for f in _files(folder) if f not in (CHECKSUMS, METADATA, COMMITTED)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda f: _digest(folder / f), files))
    sizes = [(folder / f).stat().st_size for f in files]
    entries = {f: [size, digest] for f, size, digest in zip(files, sizes, digests, strict=True)}
    with open(folder / CHECKSUMS, "w", encoding="utf-8") as out:
        json.dump({"files": entries, "sha256": _digest_of(entries)}, out, indent=0)
        out.flush()
        os.fsync(out.fileno())


def has_checksums(folder: Path) -> bool:
    """Was it written with checksums? By what its metadata say, where the file itself is gone."""
    if (folder / CHECKSUMS).exists():
        return True
    try:
        return json.loads((folder / METADATA).read_text())["custom_metadata"]["checksums"] == CHECKSUMS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, beginning with the name of a file of it; None where nothing is."""
    for part in _PARTS:
        if not (folder / part).is_file():
            return f"{part} is missing"
    try:
        json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        return f"{METADATA} is not readable ({e})"
    if not has_checksums(folder):
        return None
    try:
        stored: Any = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        entries = {str(f): (int(size), str(digest)) for f, (size, digest) in stored["files"].items()}
        if stored["sha256"] != _digest_of(stored["files"]):
            return f"{CHECKSUMS} does not have the checksum that it states"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{CHECKSUMS} is not readable ({type(e).__name__}: {e})"
    # Names and sizes first: they cost nothing.
    for file, (size, _) in entries.items():
        try:
            found = (folder / file).stat().st_size
        except OSError:
            return f"{file} is missing"
        if found != size:
            return f"{file} has {found} bytes and not {size}"
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        wrong = pool.map(lambda item: _wrong(folder, item[0], item[1][1]), entries.items())
        return next((w for w in wrong if w), None)


def _wrong(folder: Path, file: str, digest: str) -> str | None:
    try:
        return (
            None if _digest(folder / file) == digest else f"{file} does not have the checksum that it was written with"
        )
    except OSError as e:
        return f"{file} is not readable ({e.strerror or e})"


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _digest(file: Path) -> str:
    total = hashlib.sha256()
    with open(file, "rb") as source:
        while chunk := source.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def _digest_of(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
