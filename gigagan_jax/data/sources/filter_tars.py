"""Selects examples of tars by their metadata, and keeps the selection beside the index."""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.config import FilterConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import map_parallel
from gigagan_jax.data.sources import tar_index
from gigagan_jax.data.sources.filter_columns import Columns, convert_column, find_columns, read_parquet_columns
from gigagan_jax.data.sources.filters import (
    apply_filters,
    filters_digest,
    first_occurrences,
    hash_texts,
    is_any_enabled,
    report_steps,
    required_columns,
)
from gigagan_jax.data.sources.tar_headers import BLOCK
from gigagan_jax.data.sources.tar_index import NO_MEMBER, TarIndex
from gigagan_jax.data.storage import Storage

_log = logging.getLogger(__name__)


def _filter_shard(
    storage: Storage, folder: Path, config: FilterConfig, path: str, sidecar: str
) -> dict[str, np.ndarray]:
    """Filters the examples of one tar.

    Args:
      storage: reads the metadata.
      folder: of the index.
      config: the conditions.
      path: of the tar.
      sidecar: Parquet file beside the tar; "" reads the `.json` members.

    Returns:
      rows: uint32, examples that pass; n: examples of the tar; counts: examples left after each step; foreign: whether
      the sidecar has none of the tar's keys; hashes: uint64, one a row, if duplicates are removed.
    """
    part = tar_index.load_part(tar_index.part_file(folder, path))
    if part is None:
        raise UserError(f"the index {folder} lacks its part for {path}: remove the folder and index again")
    n = len(part["fault"])
    # Bad examples have no reliable key, so they are dropped before the conditions.
    undamaged = part["fault"] == 0
    names = required_columns(config)
    if sidecar:
        columns, has_metadata = _columns_from_parquet(storage, sidecar, names, config, part)
    else:
        columns, has_metadata = _columns_from_json(storage, path, names, config, part)
    keep, counts = apply_filters(columns, config, undamaged & has_metadata)
    result = {"rows": np.flatnonzero(keep).astype(np.uint32), "n": np.array(n)}
    result["counts"] = np.array([int((undamaged & has_metadata).sum()), *counts])
    # A sidecar without any key of the tar drops all examples; the caller warns about it.
    result["foreign"] = np.array(bool(sidecar) and bool(undamaged.any()) and not has_metadata[undamaged].any())
    if config.duplicates:
        result["hashes"] = hash_texts(columns["duplicates"])[result["rows"]]
    return result


def _key_names(part: dict[str, np.ndarray]) -> list[str]:
    ends = part["key_end"].tolist()
    # All keys lie in one buffer; key_end holds the end of each.
    blob = part["keys"].tobytes()
    firsts = [0, *ends[:-1]]
    # The sidecar has the key without its folder. surrogateescape: names in tars are bytes.
    return [blob[a:b].decode("utf-8", "surrogateescape").rpartition("/")[2] for a, b in zip(firsts, ends, strict=True)]


def _columns_from_parquet(
    storage: Storage, file: str, names: Sequence[str], config: FilterConfig, part: dict[str, np.ndarray]
) -> tuple[Columns, np.ndarray]:
    columns = read_parquet_columns(storage, file, ("key", *names), config)
    # Of rows with equal keys the last one counts.
    row_of_key = {key: i for i, key in enumerate(columns.pop("key")) if key is not None}
    keys: list[Any] = list(_key_names(part))
    # Keys that are stored as numbers have lost their leading zeros.
    if any(isinstance(key, int) for key in row_of_key):
        for i in np.flatnonzero(part["fault"] == 0):
            # At most 999 digits: int() is slow on long texts and refuses more than 4,300 digits.
            if not re.fullmatch("[0-9]{1,999}", keys[i]):
                raise UserError(
                    f"{file} has numbers as keys, but its tar has {keys[i]!r}: write its column key as text"
                )
            keys[i] = int(keys[i])
    rows = np.array([row_of_key.get(key, -1) for key in keys], np.int64)
    # A row of nulls is appended; index -1 selects it for keys that the table lacks.
    take_rows = lambda x: np.append(x, np.array([None], object) if x.dtype == object else np.nan)[rows]
    return {name: take_rows(x) for name, x in columns.items()}, rows >= 0


def _columns_from_json(
    storage: Storage, path: str, names: Sequence[str], config: FilterConfig, part: dict[str, np.ndarray]
) -> tuple[Columns, np.ndarray]:
    """Reads columns from the `.json` members, and whether each example has one that is an object."""
    n = len(part["fault"])
    rows: list[dict[str, Any]] = []
    has_metadata = np.zeros(n, bool)
    for i, (block, size, fault) in enumerate(
        zip(part["json_block"].tolist(), part["json_size"].tolist(), part["fault"].tolist(), strict=True)
    ):
        value: Any = None
        if size != NO_MEMBER and not fault:
            # Deeply nested JSON raises RecursionError.
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(storage.read(path, block * BLOCK, size))
        has_metadata[i] = isinstance(value, dict)
        rows.append(value if isinstance(value, dict) else {})
    # The union over all rows: members may omit keys, so a column may first occur in the last row.
    present = list(dict.fromkeys(key for row in rows for key in row))
    if not has_metadata.any():
        return {name: convert_column(name, [None] * n) for name in names}, has_metadata
    found = find_columns(names, present, config, f"{path} (.json members; there is no .parquet beside it)")
    return {name: convert_column(name, [row.get(found[name]) for row in rows]) for name in names}, has_metadata


def _filter_shard_cached(
    storage: Storage, folder: Path, parts: Path, config: FilterConfig, item: tuple[str, str]
) -> Columns:
    """Calls `_filter_shard` for (tar, sidecar or ""). A run that follows an interrupted one loads the kept result."""
    file = parts / tar_index.part_file(Path(), item[0]).name
    result = tar_index.load_part(file)
    if result is None:
        result = _filter_shard(storage, folder, config, *item)
        temporary = file.with_name(f"{uuid.uuid4().hex}.bin")
        # Another process may have finished first and removed the folder.
        with contextlib.suppress(FileNotFoundError):
            tar_index.save_part(temporary, result)
            os.replace(temporary, file)
    return result


def _find_sidecar(storage: Storage, path: str) -> tuple[str, tuple[int, int]]:
    """Returns the Parquet file beside a tar and its version stamp, or "" if there is none."""
    file = path.removesuffix(".tar") + ".parquet"
    try:
        return file, storage.version_stamp(file)
    except OSError:
        return "", (0, 0)


def select_tar_examples(
    index: TarIndex, folder: Path, paths: Sequence[str], storage: Storage, config: FilterConfig, workers: int = 0
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Selects rows of a tar index by filters, and keeps them beside the index until a tar or a sidecar changes.

    Several processes may run this at once: they write equal files for equal tars and sidecars.

    Returns:
      uint32 [n], mapped into memory, and {"identity", "steps": [[title, left], ...]}. The identity depends on index and
      rows only. None if no filter is enabled.

    Raises:
      UserError: metadata lacks a column that a condition reads, cannot be read, or is missing altogether.
    """
    if not is_any_enabled(config):
        return None
    # Sidecars of buckets cost a request each; 16 threads overlap the waiting.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        sidecars = list(pool.map(functools.partial(_find_sidecar, storage), paths))
    # The name of the folder is a hash of all inputs: a changed tar or sidecar leads to a new selection.
    inputs = [index.about["identity"], filters_digest(config), index.stamps.tolist(), [s for _, s in sidecars]]
    target = index.folder / f"rows-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]}"
    try:
        selection = _load_selection(target, len(index))
        if selection is None:
            parts = target.with_name(f"{target.name}.parts")
            parts.mkdir(parents=True, exist_ok=True)
            task = functools.partial(_filter_shard_cached, storage, folder, parts, config)
            items = [(path, file) for path, (file, _) in zip(paths, sidecars, strict=True)]
            results = list(map_parallel(task, items, workers, "filtering"))
            if foreign := [path for path, part in zip(paths, results, strict=True) if part["foreign"]]:
                message = "no example used of %d tars that share no key with the .parquet beside them: %s"
                _log.warning(message, len(foreign), ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else ""))
            # Loaded again, because another process may have written the selection meanwhile.
            selection = _load_selection(target, len(index)) or _merge_shards(index, results, config, target)
            shutil.rmtree(parts, ignore_errors=True)
    except OSError as e:
        raise UserError(f"the index {target} cannot be written or read: {e.strerror or e}") from None
    return selection


def _load_selection(target: Path, n: int) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Loads the selection of an index of n examples; None if it is missing or damaged. Raises OSError."""
    try:
        report = json.loads((target / "funnel.json").read_text(encoding="utf-8"))
        left, _ = report["steps"][-1][1], report["identity"]
        # NumPy cannot map an empty file.
        if not left:
            return np.zeros(0, np.uint32), report
        rows = np.lib.format.open_memmap(target / "rows.npy", "r")
        # 1,000 rows are checked: reading all rows of a large selection would delay the start.
        sample = rows[np.linspace(0, left - 1, min(left, 1000)).astype(np.int64)].astype(np.int64)
        intact = (
            rows.dtype == np.uint32 and rows.shape == (left,) and sample[-1] < n and bool(np.all(np.diff(sample) > 0))
        )
        return (rows, report) if intact else None
    except (FileNotFoundError, ValueError, LookupError, TypeError, EOFError):
        return None


def _merge_shards(
    index: TarIndex, results: list[dict[str, np.ndarray]], config: FilterConfig, target: Path
) -> tuple[np.ndarray, Any]:
    counts = np.sum([part["counts"] for part in results], axis=0).tolist()
    if len(index) and not counts[0]:
        raise UserError(
            "config.data.filters: the tars have no metadata: neither a .parquet beside them with their keys nor .json members"
        )
    # Row numbers of a tar become row numbers of the set. `starts` has one more entry than there are tars.
    starts = index.starts.astype(np.uint32)
    rows = np.concatenate([part["rows"] + start for part, start in zip(results, starts, strict=False)])
    unique = None
    if config.duplicates:
        rows = rows[first_occurrences(np.concatenate([part["hashes"] for part in results]))]
        unique = len(rows)
    identity = hashlib.sha256(f"{index.about['identity']} ".encode())
    # Little endian on every machine.
    identity.update(np.ascontiguousarray(rows, "<u4").data)
    steps = report_steps(config, counts, "whole, with metadata", len(index), unique)
    report = {"identity": identity.hexdigest()[:16], "steps": steps}
    target.mkdir(exist_ok=True)
    temporary = target / f"{uuid.uuid4().hex}.tmp.npy"
    try:
        # funnel.json is written last: `_load_selection` reads it first, so a selection without it does not count.
        np.save(temporary, rows)
        os.replace(temporary, target / "rows.npy")
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
        os.replace(temporary, target / "funnel.json")
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(target / "rows.npy", mmap_mode="r") if len(rows) else rows, report
