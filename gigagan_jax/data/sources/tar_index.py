"""An index of the examples in a set of webdataset tars, for random access.

The folder of an index has two parts. `parts/` holds the scan of each tar; any set with that tar uses it. `sets/DIGEST/`
holds one list of shards as `index.json` and columns that are mapped into memory:

    image_block, image_size      uint32 [N], of the data, in blocks of 512 bytes and in bytes
    caption_block, caption_size  uint32 [N], size 2**32 - 1: no caption
    label                        int32 [N], only if there are `.cls` members
    fault                        uint8 [N], an index into FAULTS
    key_end                      uint32 [N], end of the key, counted from the first key of its shard
    keys                         uint8, all keys one after the other
"""

import contextlib
import filecmp
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import hold_file_lock, map_parallel
from gigagan_jax.data.source import short_names
from gigagan_jax.data.sources.tar_examples import NO_MEMBER, TarExample, iter_examples, join_scattered
from gigagan_jax.data.sources.tar_headers import BLOCK
from gigagan_jax.data.storage import Storage, is_local

_log = logging.getLogger(__name__)
# Part of the digest of a set: another version makes another folder, so old indexes are not misread.
VERSION = 2
# Rules by which members are grouped. Scans by older rules stay valid where all examples were found whole.
GROUPING = 2
# Indices into this tuple are stored: new faults go to the end.
FAULTS = ("", "tar_truncated", "tar_corrupt", "unsafe_name", "image_missing", "member_too_large")
_DAMAGE = [FAULTS.index("tar_truncated"), FAULTS.index("tar_corrupt")]
COLUMNS = {
    **{f"{what}_{place}": np.uint32 for what in ("image", "caption") for place in ("block", "size")},
    "fault": np.uint8,
    "key_end": np.uint32,
}


def scan_tar(storage: Storage, path: str) -> dict[str, np.ndarray]:
    """Scans one tar into columns: those of the module's docstring, with `text` and `json` instead of `caption`.

    Raises:
      UserError: the tar is missing or compressed.
    """
    try:
        length, changed = storage.version_stamp(path)
        examples = join_scattered(list(iter_examples(storage, path, length)))
    except (OSError, FileNotFoundError) as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}): check config.data.path") from None
    # Even an empty tar has two blocks, so a file of 0 bytes is a failed download.
    if not length:
        examples = [TarExample("?@0", fault="tar_truncated")]
    elif not examples and storage.read(path, 0, length).strip(b"\0"):
        examples = [TarExample("?@0", fault="tar_corrupt")]
    columns: dict[str, np.ndarray] = {}
    for name, places in (
        ("image", [f.image for f in examples]),
        ("text", [f.text for f in examples]),
        ("json", [f.json for f in examples]),
    ):
        columns[f"{name}_block"] = np.array([p[0] // BLOCK if p else 0 for p in places], np.uint32)
        columns[f"{name}_size"] = np.array([p[1] if p else NO_MEMBER for p in places], np.uint32)
    faults = [f.fault or ("" if f.image else "image_missing") for f in examples]
    columns["fault"] = np.array([FAULTS.index(f) for f in faults], np.uint8)
    keys = [f.key.encode("utf-8", "surrogateescape") for f in examples]
    columns["key_end"] = np.cumsum([len(k) for k in keys], dtype=np.uint32)
    columns["keys"] = np.frombuffer(b"".join(keys), np.uint8)
    # The column is optional: most tars have no labels.
    if any(f.label is not None for f in examples):
        columns["label"] = np.array([-1 if f.label is None else f.label for f in examples], np.int32)
    unused = [f.unused_images for f in examples]
    # Optional too: their number, and the first example that has one.
    if any(unused):
        columns["unused_images"] = np.array([sum(unused), np.flatnonzero(unused)[0]], np.int64)
    columns["grouping"] = np.array([GROUPING], np.int64)
    # Size and time of change: `scan_to_part` compares them to find out whether the tar changed.
    columns["stamp"] = np.array([length, changed], np.int64)
    return columns


def part_file(folder: Path, path: str) -> Path:
    """Returns the file that keeps the columns of a tar."""
    # The whole path is hashed: tars of different folders often share their names.
    return folder / "parts" / f"{hashlib.sha256(path.encode()).hexdigest()[:20]}.bin"


def scan_to_part(folder: Path, storage: Storage, path: str) -> int:
    """Scans one tar into its part file unless that is up to date. Returns the number of examples."""
    file = part_file(folder, path)
    known = load_part(file)
    try:
        fresh = known is not None and "stamp" in known and tuple(known["stamp"].tolist()) == storage.version_stamp(path)
        fresh = fresh and not _needs_regrouping(known)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}): check config.data.path") from None
    if known is None or not fresh:
        known = scan_tar(storage, path)
        save_part(file, known)
    return len(known["fault"])


def _needs_regrouping(part: dict[str, np.ndarray] | None) -> bool:
    """Whether a scan by older rules lost something that today's rules may find: an image, or all texts."""
    if part is None or "grouping" in part:
        return False
    texts = (part["text_size"] != NO_MEMBER) | (part["json_size"] != NO_MEMBER)
    return bool((part["fault"] == FAULTS.index("image_missing")).any() or not texts.any())


def save_part(file: Path, columns: dict[str, np.ndarray]) -> None:
    """Writes columns as a line of JSON, {name: [type, shape]}, followed by their bytes."""
    # Ten times as fast as NumPy's archives. The name is random because hosts may share the folder.
    temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
    about = {name: [x.dtype.str, x.shape] for name, x in columns.items()}
    temporary.write_bytes(b"".join([json.dumps(about).encode(), b"\n", *(x.tobytes() for x in columns.values())]))
    os.replace(temporary, file)


def load_part(file: Path) -> dict[str, np.ndarray] | None:
    """Reads what `save_part` wrote; None if it is missing or damaged."""
    try:
        data = file.read_bytes()
        offset = data.index(b"\n") + 1
        columns = {}
        for name, (kind, shape) in json.loads(data[:offset]).items():
            columns[name] = np.frombuffer(data, kind, math.prod(shape), offset).reshape(shape)
            offset += columns[name].nbytes
        # Another length means a file that was cut short or overwritten.
        return columns if offset == len(data) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def shard_set_digest(paths: Sequence[str], captions: str) -> str:
    """Returns the folder name of a set of shards and its kind of captions."""
    return hashlib.sha256(json.dumps([VERSION, captions, *paths]).encode()).hexdigest()[:16]


def build_index(
    folder: Path,
    storage: Storage,
    paths: Sequence[str],
    *,
    captions: str = "text",
    workers: int = 0,
    quiet: bool = False,
) -> Path:
    """Indexes tars. Scans of earlier calls are reused.

    Args:
      folder: folder of the index.
      storage: reads the tars.
      paths: the tars, in their order.
      captions: "text" or "json", the member that holds the captions.
      workers: processes; 0 uses one for each core, 1 uses this one.
      quiet: shows no progress.

    Returns:
      the folder of this set of shards, for TarIndex. A set by text that holds none leaves the set by JSON beside it.

    Raises:
      UserError: a tar is missing or compressed, or the folder cannot be written.
    """
    try:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        task = functools.partial(scan_to_part, folder, storage)
        total = 0
        for done in map_parallel(task, paths, workers, "indexing tars", quiet):
            total += done
        target = _merge_parts(folder, paths, captions)
        # Captions of such tars are read from the JSON members: from the same scans, without another look at each tar.
        if captions == "text" and TarIndex(target).has_captions_in_json:
            _merge_parts(folder, paths, "json")
        return target
    except OSError as e:
        raise UserError(f"the index {folder} cannot be written: {e.strerror or e}; choose config.data.index") from None


def _merge_parts(folder: Path, paths: Sequence[str], captions: str) -> Path:
    """Merges parts into columns and returns the folder of the set."""
    # Shard by shard, so that memory does not grow with the data set.
    target = folder / "sets" / shard_set_digest(paths, captions)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    counts, key_bytes, stamps, damaged = [], [], [], []
    identity = hashlib.sha256(b"tar")
    names = short_names(paths)
    faults = np.zeros(len(FAULTS), np.int64)
    without_caption, others, unused_images, first_unused = 0, 0, 0, ""
    files = {c: open(temporary / f"{c}.bin", "wb") for c in (*COLUMNS, "keys", "label")}  # noqa: SIM115
    labelled = False
    try:
        for path, name in zip(paths, names, strict=True):
            part = load_part(part_file(folder, path))
            if part is None:
                raise UserError(f"{part_file(folder, path)} is damaged: remove it and index again")
            for place in ("block", "size"):
                # A part holds places of both caption members; a set keeps one of them.
                part[f"caption_{place}"] = part[f"{captions}_{place}"]
            n = len(part["fault"])
            # Labels are written for every tar and removed at the end if no tar has any.
            labels = part.get("label")
            labelled |= labels is not None
            for column in (*COLUMNS, "keys"):
                files[column].write(part[column].astype(COLUMNS.get(column, np.uint8)).tobytes())
            files["label"].write((np.full(n, -1, np.int32) if labels is None else labels).tobytes())
            # Everything kept here is one number a tar; columns go to the disk.
            counts.append(n)
            key_bytes.append(len(part["keys"]))
            # A list, not the view, which would keep the whole part in memory.
            stamps.append(part["stamp"].tolist())
            fault_counts = np.bincount(part["fault"], minlength=len(FAULTS))
            faults += fault_counts
            if fault_counts[_DAMAGE].any():
                damaged.append(name)
            if "unused_images" in part:
                unused_images += int(part["unused_images"][0])
                first_unused = first_unused or f"{name}/{_key_of(part, int(part['unused_images'][1]))}"
            without_caption += int(((part["caption_size"] == NO_MEMBER) & (part["fault"] == 0)).sum())
            others += int((part[f"{'json' if captions == 'text' else 'text'}_size"] != NO_MEMBER).sum())
            # The identity depends on names and keys, not on places: repacked tars remain the same data set.
            identity.update(f"\0{name}\0{n}\0".encode() + part["keys"].tobytes())
    finally:
        for file in files.values():
            file.close()
    if not labelled:
        (temporary / "label.bin").unlink()
    metadata: dict[str, Any] = {
        "version": VERSION,
        "captions": captions,
        "identity": identity.hexdigest()[:16],
        "examples": sum(counts),
        "without_caption": without_caption,
        "faults": {f: int(k) for f, k in zip(FAULTS, faults, strict=True) if f and k},
        "damaged": damaged,
        "labelled": labelled,
    }
    # Only where older rules may have found less: other sets stay as they are, byte for byte.
    if _may_hold_more(metadata):
        metadata |= {"grouping": GROUPING, "other_captions": others}
    if unused_images:
        metadata |= {"unused_images": unused_images, "first_unused": first_unused}
    np.savez(temporary / "shards.npz", counts=counts, key_bytes=key_bytes, stamps=np.array(stamps, np.int64))
    (temporary / "shards.txt").write_text("\n".join(names), encoding="utf-8")
    (temporary / "index.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    names = [p.name for p in temporary.iterdir()]
    # shallow=False compares contents: damage may keep size and time of a file.
    if len(filecmp.cmpfiles(target, temporary, names, shallow=False)[0]) == len(names):
        # An equal set stays in place: runs may use it, and it holds the selections of filters.
        shutil.rmtree(temporary)
        return target
    replaced = target.with_name(f"{target.name}.{uuid.uuid4().hex}.old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, replaced)
    os.rename(temporary, target)
    # Processes that have mapped the replaced files keep them until they unmap them.
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _key_of(part: dict[str, np.ndarray], row: int) -> str:
    start, end = int(part["key_end"][row - 1]) if row else 0, int(part["key_end"][row])
    return part["keys"][start:end].tobytes().decode("utf-8", "replace")


def _may_hold_more(about: dict[str, Any]) -> bool:
    """Whether images are missing in an index, or all captions are."""
    return bool(about["faults"].get("image_missing")) or _has_no_caption(about)


def _has_no_caption(about: dict[str, Any]) -> bool:
    """Whether no sound example of an index has a caption."""
    return about["without_caption"] >= about["examples"] - sum(about["faults"].values())


class TarIndex:
    """A built index, mapped into memory and picklable. The time to open it does not depend on its length.

    Args:
      folder: the result of `build_index`.

    Raises:
      UserError: the index is missing or damaged.
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
            self.columns = {
                c: np.memmap(folder / f"{c}.bin", t, "r") for c, t in self._column_types() if self.starts[-1]
            }
            # A length check finds files that were cut short without reading them.
            short = [c for c, x in self.columns.items() if c != "keys" and len(x) != self.starts[-1]]
            if short or (self.columns and len(self.columns["keys"]) != self.key_starts[-1]):
                raise ValueError(f"{short or 'keys'} of another length")
            if len(self.shards) != len(counts) or self.about["version"] != VERSION:
                raise ValueError("another number of tars, or another version")
        # NumPy and zipfile raise many kinds of exceptions on damaged files.
        except Exception as e:
            raise UserError(f"the index {folder} cannot be read ({e}): remove it and index again") from None

    def _column_types(self) -> Iterable[tuple[str, Any]]:
        yield from COLUMNS.items()
        yield "keys", np.uint8
        if self.about["labelled"]:
            yield "label", np.int32

    def __getstate__(self):
        return self.folder, self.about

    def __setstate__(self, state):
        folder, about = state
        self.__init__(folder)  # type: ignore[misc]
        # A worker process must not read a newer index with the old order of examples.
        if self.about != about:
            raise UserError(f"the index {folder} was made anew while it was in use: start again")

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def has_captions_in_json(self) -> bool:
        """Of an index of texts: whether no sound example has one, and there are JSON members."""
        return bool(self.about.get("other_captions")) and _has_no_caption(self.about)

    def shard_of(self, i: int) -> int:
        """Returns the index in `shards` of the tar that holds example i."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def key_of(self, i: int) -> str:
        """Returns the key of example i, the common name of its members."""
        shard = self.shard_of(i)
        ends, base = self.columns["key_end"], int(self.key_starts[shard])
        first = int(ends[i - 1]) if i > self.starts[shard] else 0
        return self.columns["keys"][base + first : base + int(ends[i])].tobytes().decode("utf-8", "surrogateescape")


def open_index(
    folder: Path, storage: Storage, paths: Sequence[str], captions: str, workers: int = 0, refresh: bool = False
) -> TarIndex:
    """Opens the index of some tars, and builds it first if it is missing or stale.

    Raises:
      UserError: as `build_index`.
    """
    set_folder = folder / "sets" / shard_set_digest(paths, captions)
    try:
        if not refresh and not is_stale(set_folder, storage, paths):
            return TarIndex(set_folder)
        folder.mkdir(parents=True, exist_ok=True)
        # One process builds while the others wait: several builders would read all tars several times.
        with hold_file_lock(
            folder / "lock", lambda: _log.info("another process indexes into %s: waiting for it", folder)
        ):
            # Checked again, because another process may have built the index meanwhile.
            if refresh or is_stale(set_folder, storage, paths):
                _log.info("indexing %d tars into %s", len(paths), folder)
                set_folder = build_index(folder, storage, paths, captions=captions, workers=workers)
            return TarIndex(set_folder)
    except OSError as e:
        raise UserError(f"the index {folder} cannot be written: {e.strerror or e}; choose config.data.index") from None


def is_stale(folder: Path, storage: Storage, paths: Sequence[str]) -> bool:
    """Returns whether a set must be indexed: it is missing or damaged, or local tars changed."""
    # Stamps of tars in buckets cost a request each. Those tars are compared with the index when they are read.
    try:
        index = TarIndex(folder)
        # An index where nothing can be written is used as it is.
        if "grouping" not in index.about and _may_hold_more(index.about) and os.access(folder, os.W_OK):
            return True
        return len(index.stamps) != len(paths) or any(
            is_local(p) and storage.version_stamp(p) != tuple(s)
            for p, s in zip(paths, index.stamps.tolist(), strict=True)
        )
    except (UserError, OSError):
        return True
