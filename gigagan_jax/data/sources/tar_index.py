"""Where each example lies in a set of webdataset tars, so that they can be read by random access.

A folder: `parts/` holds what was found in each tar (made in parallel, kept, and valid for any set of shards that the tar is
in); `sets/DIGEST/` holds one list of shards as columns that are mapped into memory, and `index.json`:

    image_block, image_size      uint32 [N], of the data, in blocks of 512 bytes and in bytes
    caption_block, caption_size  uint32 [N], size 2**32 - 1: there is none
    label                        int32 [N], only where there are `.cls` members
    fault                        uint8 [N], a place in FAULTS
    key_end                      uint32 [N], end of the key, counted from the first key of its shard
    keys                         uint8, all keys one after the other
"""

import contextlib
import dataclasses
import filecmp
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import locked, parallel
from gigagan_jax.data.source import short_names
from gigagan_jax.data.sources.tar_headers import BLOCK, compression, members
from gigagan_jax.data.storage import Storage, is_local

_log = logging.getLogger(__name__)
VERSION = 2
NOTHING = 2**32 - 1
FAULTS = ("", "tar_truncated", "tar_corrupt", "unsafe_name", "image_missing", "member_too_large")
_DAMAGE = [FAULTS.index("tar_truncated"), FAULTS.index("tar_corrupt")]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
COLUMNS = {
    **{f"{what}_{place}": np.uint32 for what in ("image", "caption") for place in ("block", "size")},
    "fault": np.uint8,
    "key_end": np.uint32,
}
# Between two members of an example lie a header and, with img2dataset, the other text member.
_LOCAL_WINDOW, _REMOTE_WINDOW = 8 << 10, 8 << 20


class _Window:
    """Reads a file forwards in windows, so that neighbouring headers cost one read."""

    def __init__(self, storage: Storage, path: str, length: int):
        self._storage, self._path, self._length = storage, path, length
        self._size = _LOCAL_WINDOW if is_local(path) else _REMOTE_WINDOW
        self._at, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        place = offset - self._at
        if place < 0 or place + size > len(self._data):
            self._at, place = offset, 0
            self._data = self._storage.read(self._path, offset, min(max(size, self._size), self._length - offset))
        return self._data[place : place + size]


@dataclasses.dataclass
class _Found:
    """One example while its members are gathered."""

    key: str
    image: tuple[int, int] | None = None
    text: tuple[int, int] | None = None
    json: tuple[int, int] | None = None
    label: int | None = None
    fault: str = ""
    suffixes: set[str] = dataclasses.field(default_factory=set)


def examples_of(storage: Storage, path: str, length: int) -> Iterator[_Found]:
    """The examples of a tar, in their order: members that follow each other and share their name up to the first dot.

    Raises:
      UserError: the tar is compressed.
    """
    window = _Window(storage, path, length)
    kind = compression(window.read(0, min(length, BLOCK)))
    if kind:
        raise UserError(
            f"{path} is compressed ({kind}): examples in it cannot be read one by one; decompress the tars (images are "
            "compressed already: nothing is lost by it)"
        )
    current: _Found | None = None
    for member in members(window.read, length):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        key, suffix = folder + slash + stem, (dot + suffix).lower()
        if member.fault == "tar_corrupt" or not member.name:
            if current:
                yield current
            current = None
            yield _Found(f"{key or '?'}@{member.offset}", fault=member.fault or "tar_corrupt")
            continue
        if base.startswith("."):  # hidden files that archivers add
            continue
        if current is None or key != current.key or suffix in current.suffixes:
            if current:
                yield current
            current = _Found(key)
        current.suffixes.add(suffix)
        place = (member.offset, member.size)
        if member.fault:
            current.fault = member.fault
        if key.startswith("/") or "/../" in f"/{key}/":
            current.fault = "unsafe_name"
        if member.size >= NOTHING or member.offset // BLOCK >= NOTHING:
            current.fault = "member_too_large"
        elif suffix in IMAGE_SUFFIXES and current.image is None:
            current.image = place
        elif suffix == ".txt":
            current.text = place
        elif suffix == ".json":
            current.json = place
        elif suffix == ".cls" and member.size <= 16:
            digits = window.read(*place).strip()
            current.label = int(digits) if digits.isdigit() and int(digits) < 2**31 else None
    if current:
        yield current


def scan(storage: Storage, path: str) -> dict[str, np.ndarray]:
    """Columns of one tar, those of the module's docstring with `text` and `json` for `caption`.

    Raises:
      UserError: a tar that is missing or compressed.
    """
    try:
        length, changed = storage.stamp(path)
        found = list(examples_of(storage, path, length))
    except (OSError, FileNotFoundError) as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}): check config.data.path") from None
    if not length:
        found = [_Found("?@0", fault="tar_truncated")]  # even an empty tar has two blocks
    elif not found and storage.read(path, 0, length).strip(b"\0"):
        found = [_Found("?@0", fault="tar_corrupt")]
    out: dict[str, np.ndarray] = {}
    for name, places in (
        ("image", [f.image for f in found]),
        ("text", [f.text for f in found]),
        ("json", [f.json for f in found]),
    ):
        out[f"{name}_block"] = np.array([p[0] // BLOCK if p else 0 for p in places], np.uint32)
        out[f"{name}_size"] = np.array([p[1] if p else NOTHING for p in places], np.uint32)
    faults = [f.fault or ("" if f.image else "image_missing") for f in found]
    out["fault"] = np.array([FAULTS.index(f) for f in faults], np.uint8)
    keys = [f.key.encode("utf-8", "surrogateescape") for f in found]
    out["key_end"] = np.cumsum([len(k) for k in keys], dtype=np.uint32)
    out["keys"] = np.frombuffer(b"".join(keys), np.uint8)
    if any(f.label is not None for f in found):
        out["label"] = np.array([-1 if f.label is None else f.label for f in found], np.int32)
    out["stamp"] = np.array([length, changed], np.int64)
    return out


def part_file(folder: Path, path: str) -> Path:
    """Where the columns of a tar are kept."""
    return folder / "parts" / f"{hashlib.sha256(path.encode()).hexdigest()[:20]}.bin"


def scan_to(folder: Path, storage: Storage, path: str) -> int:
    """Scans one tar into its part file, unless that is there and of this very tar; returns how many examples."""
    file = part_file(folder, path)
    known = load_part(file)
    try:
        fresh = known is not None and "stamp" in known and tuple(known["stamp"].tolist()) == storage.stamp(path)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}): check config.data.path") from None
    if known is None or not fresh:
        known = scan(storage, path)
        save_part(file, known)
    return len(known["fault"])


def save_part(file: Path, columns: dict[str, np.ndarray]) -> None:
    """Writes columns as a line of JSON, {name: [type, shape]}, and their bytes; ten times as fast as NumPy's archives."""
    temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")  # hosts may share the folder
    about = {name: [x.dtype.str, x.shape] for name, x in columns.items()}
    temporary.write_bytes(b"".join([json.dumps(about).encode(), b"\n", *(x.tobytes() for x in columns.values())]))
    os.replace(temporary, file)


def load_part(file: Path) -> dict[str, np.ndarray] | None:
    """Reads what `save_part` wrote; None where it is missing or damaged, for it to be made again."""
    try:
        data = file.read_bytes()
        at = data.index(b"\n") + 1
        out = {}
        for name, (kind, shape) in json.loads(data[:at]).items():
            out[name] = np.frombuffer(data, kind, math.prod(shape), at).reshape(shape)
            at += out[name].nbytes
        return out if at == len(data) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def digest_of(paths: Sequence[str], captions: str) -> str:
    """Name of a set of shards with its kind of captions."""
    return hashlib.sha256(json.dumps([VERSION, captions, *paths]).encode()).hexdigest()[:16]


def build(
    folder: Path,
    storage: Storage,
    paths: Sequence[str],
    *,
    captions: str = "text",
    workers: int = 0,
    quiet: bool = False,
) -> Path:
    """Indexes tars; what was done before is not done again.

    Args:
      folder: of the index.
      storage: to read the tars.
      paths: of the tars.
      captions: "text" or "json": the member that holds them.
      workers: processes; 0 uses one for each core, 1 this one.
      quiet: without progress.

    Returns:
      the folder of this set of shards, for TarIndex

    Raises:
      UserError: a tar that is missing or compressed, or a folder that cannot be written.
    """
    try:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        task = functools.partial(scan_to, folder, storage)
        total = 0
        for done in parallel(task, paths, workers, "indexing tars", quiet):
            total += done
        return _merge(folder, paths, captions)
    except OSError as e:
        raise UserError(f"the index {folder} cannot be written: {e.strerror or e}; choose config.data.index") from None


def _merge(folder: Path, paths: Sequence[str], captions: str) -> Path:
    """Parts to columns, shard by shard, so that memory does not grow with the data set."""
    target = folder / "sets" / digest_of(paths, captions)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    counts, key_bytes, stamps, damaged = [], [], [], []
    identity = hashlib.sha256(b"tar")
    names = short_names(paths)
    faults = np.zeros(len(FAULTS), np.int64)
    without_caption = 0
    files = {c: open(temporary / f"{c}.bin", "wb") for c in (*COLUMNS, "keys", "label")}  # noqa: SIM115
    labelled = False
    try:
        for path, name in zip(paths, names, strict=True):
            part = load_part(part_file(folder, path))
            if part is None:
                raise UserError(f"{part_file(folder, path)} is damaged: remove it and index again")
            for place in ("block", "size"):
                part[f"caption_{place}"] = part[f"{captions}_{place}"]
            n = len(part["fault"])
            labels = part.get("label")
            labelled |= labels is not None
            for column in (*COLUMNS, "keys"):
                files[column].write(part[column].astype(COLUMNS.get(column, np.uint8)).tobytes())
            files["label"].write((np.full(n, -1, np.int32) if labels is None else labels).tobytes())
            counts.append(n)
            key_bytes.append(len(part["keys"]))
            stamps.append(part["stamp"].tolist())  # not the view: it would keep the whole part
            found = np.bincount(part["fault"], minlength=len(FAULTS))
            faults += found
            if found[_DAMAGE].any():
                damaged.append(name)
            without_caption += int(((part["caption_size"] == NOTHING) & (part["fault"] == 0)).sum())
            identity.update(f"\0{name}\0{n}\0".encode() + part["keys"].tobytes())
    finally:
        for file in files.values():
            file.close()
    if not labelled:
        (temporary / "label.bin").unlink()
    about = {
        "version": VERSION,
        "captions": captions,
        "identity": identity.hexdigest()[:16],
        "examples": sum(counts),
        "without_caption": without_caption,
        "faults": {f: int(k) for f, k in zip(FAULTS, faults, strict=True) if f and k},
        "damaged": damaged,
        "labelled": labelled,
    }
    np.savez(temporary / "shards.npz", counts=counts, key_bytes=key_bytes, stamps=np.array(stamps, np.int64))
    (temporary / "shards.txt").write_text("\n".join(names), encoding="utf-8")
    (temporary / "index.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    names = [p.name for p in temporary.iterdir()]
    if len(filecmp.cmpfiles(target, temporary, names, shallow=False)[0]) == len(names):
        shutil.rmtree(temporary)  # runs may be using what is there, and what filters left lies in it
        return target
    old = target.with_name(f"{target.name}.{uuid.uuid4().hex}.old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)  # who has it mapped into memory keeps it
    return target


class TarIndex:
    """An index that was built, mapped into memory. Opening does not depend on its length; may be pickled.

    Args:
      folder: what `build` returned.

    Raises:
      UserError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            with open(folder / "shards.npz", "rb") as file, np.load(file) as shards:
                counts, key_bytes, self.stamps = shards["counts"], shards["key_bytes"], shards["stamps"]
            self.shards = (folder / "shards.txt").read_text(encoding="utf-8").split("\n")
            self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            self.key_starts = np.concatenate([[0], np.cumsum(key_bytes)]).astype(np.int64)
            self.columns = {c: np.memmap(folder / f"{c}.bin", t, "r") for c, t in self._types() if self.starts[-1]}
            short = [c for c, x in self.columns.items() if c != "keys" and len(x) != self.starts[-1]]
            if short or (self.columns and len(self.columns["keys"]) != self.key_starts[-1]):
                raise ValueError(f"{short or 'keys'} of another length")
            if len(self.shards) != len(counts) or self.about["version"] != VERSION:
                raise ValueError("another number of tars, or another version")
        except Exception as e:  # whatever NumPy and zipfile make of damaged files
            raise UserError(f"the index {folder} cannot be read ({e}): remove it and index again") from None

    def _types(self) -> Iterable[tuple[str, Any]]:
        yield from COLUMNS.items()
        yield "keys", np.uint8
        if self.about["labelled"]:
            yield "label", np.int32

    def __getstate__(self):
        return self.folder, self.about

    def __setstate__(self, state):
        folder, about = state
        self.__init__(folder)  # type: ignore[misc]
        if self.about != about:
            raise UserError(f"the index {folder} was made anew while it was in use: start again")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shard_of(self, i: int) -> int:
        """Place in `shards` of the tar that holds example i."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def key(self, i: int) -> str:
        """Key of example i: its members' common name."""
        shard = self.shard_of(i)
        ends, base = self.columns["key_end"], int(self.key_starts[shard])
        first = int(ends[i - 1]) if i > self.starts[shard] else 0
        return self.columns["keys"][base + first : base + int(ends[i])].tobytes().decode("utf-8", "surrogateescape")


def opened(
    folder: Path, storage: Storage, paths: Sequence[str], captions: str, workers: int = 0, refresh: bool = False
) -> TarIndex:
    """The index of some tars, made first where there is none that fits; by one process where several ask at once.

    Raises:
      UserError: as `build` does.
    """
    made = folder / "sets" / digest_of(paths, captions)
    try:
        if not refresh and not stale(made, storage, paths):
            return TarIndex(made)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", lambda: _log.info("another process indexes into %s: waiting for it", folder)):
            if refresh or stale(made, storage, paths):  # another process may have made it meanwhile
                _log.info("indexing %d tars into %s", len(paths), folder)
                made = build(folder, storage, paths, captions=captions, workers=workers)
            return TarIndex(made)
    except OSError as e:
        raise UserError(f"the index {folder} cannot be written: {e.strerror or e}; choose config.data.index") from None


def stale(folder: Path, storage: Storage, paths: Sequence[str]) -> bool:
    """Whether a set must be indexed: there is none, or local tars changed since. Tars in buckets are not asked, but compared
    with the index when they are read."""
    try:
        index = TarIndex(folder)
        return len(index.stamps) != len(paths) or any(
            is_local(p) and storage.stamp(p) != tuple(s) for p, s in zip(paths, index.stamps.tolist(), strict=True)
        )
    except (UserError, OSError):
        return True
