"""Which examples are used, by the metadata that LAION users have; with an account of how many each condition leaves."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.config import FilterConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import parallel
from gigagan_jax.data.sources import tar_index
from gigagan_jax.data.sources.tar_headers import BLOCK
from gigagan_jax.data.sources.tar_index import NOTHING, TarIndex
from gigagan_jax.data.storage import Storage

_log = logging.getLogger(__name__)

# Spellings of a column, by what it says; compared without regard to case. img2dataset, LAION-400M, 5B, aesthetics, DataComp.
ALIASES = {
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "clip_score": (
        *("clip_score", "similarity", "clip_similarity_vitl14"),
        *("clip_l14_similarity_score", "clip_b32_similarity_score"),
    ),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics_score", "prediction"),
    "watermark": ("pwatermark", "watermark", "watermark_score"),
    "unsafe": ("punsafe", "unsafe", "nsfw_score", "p_nsfw"),
    "nsfw": ("nsfw",),
    "language": ("language", "lang"),
    "caption": ("caption", "text"),
    "key": ("key",),
}  # fmt: skip
TEXTS = ("nsfw", "language", "caption", "key", "duplicates")
Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Step:
    """One condition: how it is called, the columns it reads, and from those to bool [N]; nulls (NaN, None) fail."""

    title: str
    needs: tuple[str, ...]
    holds: Callable[[Columns], np.ndarray]


def steps(f: FilterConfig) -> list[Step]:
    """The conditions that are switched on, cheap and common ones first."""
    out: list[Step] = []

    def add(on: Any, title: str, needs: tuple[str, ...], holds: Callable[[Columns], np.ndarray]) -> None:
        if on:
            out.append(Step(title, needs, holds))

    add(f.min_width, f"width >= {f.min_width}", ("width",), lambda c: c["width"] >= f.min_width)
    add(f.min_height, f"height >= {f.min_height}", ("height",), lambda c: c["height"] >= f.min_height)
    add(f.max_aspect, f"aspect ratio <= {f.max_aspect:g}", ("width", "height"), lambda c: _aspect(c) <= f.max_aspect)
    at_least = lambda name, least: lambda c: c[name] >= least
    at_most = lambda name, most: lambda c: c[name] <= most
    for name, least in (("clip_score", f.min_clip_score), ("aesthetic", f.min_aesthetic)):
        add(least, f"{name} >= {least:g}", (name,), at_least(name, least))
    for name, most in (("watermark", f.max_watermark), ("unsafe", f.max_nsfw)):
        add(most < 1, f"{name} <= {most:g}", (name,), at_most(name, most))
    for name, allowed in (("nsfw", f.nsfw), ("language", f.languages)):
        add(allowed, f"{name} in {', '.join(allowed)}", (name,), functools.partial(_among, name, allowed))
    length = lambda c: np.array([-1 if x is None else len(x) for x in c["caption"]])
    add(f.min_caption, f"caption >= {f.min_caption} characters", ("caption",), lambda c: length(c) >= f.min_caption)
    short = lambda c: (length(c) >= 0) & (length(c) <= f.max_caption)
    add(f.max_caption, f"caption <= {f.max_caption} characters", ("caption",), short)
    return out


def _aspect(c: Columns) -> np.ndarray:
    w, h = c["width"], c["height"]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.minimum(w, h) > 0, np.maximum(w, h) / np.minimum(w, h), np.nan)


def _among(name: str, allowed: Sequence[str], c: Columns) -> np.ndarray:
    wanted = {a.lower() for a in allowed}
    return np.array([x is not None and x.lower() in wanted for x in c[name]], bool)


def is_on(f: FilterConfig) -> bool:
    """Whether anything is asked for."""
    return bool(needed(f))


def digest(f: FilterConfig) -> str:
    """A short hash of the conditions."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(f), sort_keys=True).encode()).hexdigest()[:16]


def needed(f: FilterConfig) -> tuple[str, ...]:
    """What the conditions read, by the names of ALIASES; `duplicates` for the column of hashes."""
    names = dict.fromkeys(name for step in steps(f) for name in step.needs)
    return (*names, *(("duplicates",) if f.duplicates else ()))


def find_columns(names: Sequence[str], present: Sequence[str], f: FilterConfig, where: str) -> dict[str, str]:
    """For each of `names` the column that says it.

    Raises:
      UserError: one that is not there.
    """
    by_lower = {p.lower(): p for p in reversed(present)}
    out = {}
    for name in names:
        spellings = (f.duplicates,) if name == "duplicates" else ALIASES[name]
        column = next((by_lower[s.lower()] for s in spellings if s.lower() in by_lower), None)
        if column is None:
            raise UserError(
                f"{where} has no column for {name} (looked for {', '.join(spellings)}), which config.data.filters needs; "
                f"it has {', '.join(present) or 'none'}"
            )
        out[name] = column
    return out


def values(name: str, column: Sequence[Any]) -> np.ndarray:
    """A column as `Step` reads it: float64 with NaN for null, or objects with None for null."""
    if name in TEXTS:
        text = _key if name == "key" else _text
        out = np.empty(len(column), object)
        out[:] = [None if x is None or x != x else text(x) for x in column]
        return out

    def number(x: Any) -> float:
        try:
            return float(x)
        except (TypeError, ValueError, OverflowError):
            return float("nan")

    return np.array([number(x) for x in column], np.float64)


def _text(x: Any) -> str:
    """Bytes, which hashes may be, keep what is not UTF-8, as names of members do."""
    return x.decode("utf-8", "surrogateescape") if isinstance(x, bytes) else str(x)


def _key(x: Any) -> str | int:
    """A key as tars have it; numbers stay numbers (tables with nulls have them as floats)."""
    return int(x) if isinstance(x, int) or (isinstance(x, float) and x.is_integer()) else _text(x)


def apply(columns: Columns, f: FilterConfig, keep: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The examples that all conditions leave, duplicates aside.

    Args:
      columns: of N examples.
      f: the conditions.
      keep: bool [N], the examples to begin with.

    Returns:
      bool [N], and how many are left after each step
    """
    counts = []
    for step in steps(f):
        with np.errstate(invalid="ignore"):
            keep = keep & step.holds(columns)
        counts.append(int(keep.sum()))
    return keep, counts


def hashes(column: np.ndarray) -> np.ndarray:
    """uint64 [N] of texts; null is 0, and is nobody's duplicate."""
    digest = lambda x: hashlib.blake2b(x.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.array([0 if x is None else int.from_bytes(digest(x), "little") or 1 for x in column], np.uint64)


def first_of_each(hashed: np.ndarray) -> np.ndarray:
    """Sorted places of all that are no duplicate of an earlier one; zeros are all kept."""
    _, first = np.unique(hashed, return_index=True)
    kept = np.zeros(len(hashed), bool)
    kept[first] = True
    return np.flatnonzero(kept | (hashed == 0))


def funnel_of(
    f: FilterConfig, counts: Sequence[int], first: str, beginning: int, unique: int | None
) -> list[list[Any]]:
    """[title, how many are left] of every step."""
    titles = ["examples", first, *(s.title for s in steps(f))]
    out: list[list[Any]] = [[title, n] for title, n in zip(titles, [beginning, *counts], strict=True)]
    if unique is not None:
        out.append([f"no duplicates by {f.duplicates}", unique])
    return out


def table(funnel: dict[str, Any]) -> str:
    """The account as text: each step with what it left, and the share of all."""
    total = max(1, funnel["steps"][0][1])
    width = max(len(title) for title, _ in funnel["steps"])
    before = total
    lines = []
    for title, n in funnel["steps"]:
        lines.append(f"{title:<{width}}  {n:>13,}  {100 * n / total:6.2f} %  {n - before if n != before else 0:>+13,}")
        before = n
    return "\n".join(lines)


# ---------------------------------------------------------------- tars


def _shard(storage: Storage, folder: Path, f: FilterConfig, path: str, sidecar: str) -> dict[str, np.ndarray]:
    """Rows of one tar that pass, with hashes for duplicates, the counts of its steps, and whether its table is of other keys."""
    part = tar_index.load_part(tar_index.part_file(folder, path))
    if part is None:
        raise UserError(f"the index {folder} lacks its part for {path}: remove the folder and index again")
    n = len(part["fault"])
    whole = part["fault"] == 0
    names = needed(f)
    if sidecar:
        columns, known = _from_parquet(storage, sidecar, names, f, part)
    else:
        columns, known = _from_json(storage, path, names, f, part)
    keep, counts = apply(columns, f, whole & known)
    out = {"rows": np.flatnonzero(keep).astype(np.uint32), "n": np.array(n)}
    out["counts"] = np.array([int((whole & known).sum()), *counts])
    out["foreign"] = np.array(bool(sidecar) and bool(whole.any()) and not known[whole].any())
    if f.duplicates:
        out["hashes"] = hashes(columns["duplicates"])[out["rows"]]
    return out


def _keys(part: dict[str, np.ndarray]) -> list[str]:
    ends = part["key_end"].tolist()
    blob = part["keys"].tobytes()
    firsts = [0, *ends[:-1]]
    return [blob[a:b].decode("utf-8", "surrogateescape").rpartition("/")[2] for a, b in zip(firsts, ends, strict=True)]


def _from_parquet(
    storage: Storage, file: str, names: Sequence[str], f: FilterConfig, part: dict[str, np.ndarray]
) -> tuple[Columns, np.ndarray]:
    columns = read_parquet(storage, file, ("key", *names), f)
    place = {key: i for i, key in enumerate(columns.pop("key")) if key is not None}
    keys: list[Any] = list(_keys(part))
    if any(isinstance(key, int) for key in place):  # without the zeros in front
        for i in np.flatnonzero(part["fault"] == 0):
            if not re.fullmatch("[0-9]{1,999}", keys[i]):
                raise UserError(
                    f"{file} has numbers as keys, but its tar has {keys[i]!r}: write its column key as text"
                )
            keys[i] = int(keys[i])
    rows = np.array([place.get(key, -1) for key in keys], np.int64)
    # A row of nulls stands for what is not in the table.
    null = lambda x: np.append(x, np.array([None], object) if x.dtype == object else np.nan)[rows]
    return {name: null(x) for name, x in columns.items()}, rows >= 0


def read_parquet(storage: Storage, file: str, names: Sequence[str], f: FilterConfig) -> Columns:
    """Columns by the names of ALIASES. Raises UserError for a damaged file or a column that is not there, or is there twice."""
    import pyarrow
    import pyarrow.parquet

    try:
        with storage.open(file) as opened:
            parquet = pyarrow.parquet.ParquetFile(opened)
            present = parquet.schema_arrow.names
            found = find_columns(names, present, f, file)
            twice = [column for column in found.values() if present.count(column) > 1]
            if twice:
                raise UserError(
                    f"{file} has several columns {twice[0]!r}, which config.data.filters needs: leave one of them"
                )
            table = parquet.read(columns=list(dict.fromkeys(found.values())))
            return {name: values(name, _listed(table.column(column))) for name, column in found.items()}
    except (OSError, pyarrow.ArrowException, ValueError, LookupError, ArithmeticError, MemoryError) as e:
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{file} cannot be read as Parquet: {why}") from None


def _listed(column: Any) -> list[Any]:
    """Values of a column of Arrow; text that is not UTF-8 is null."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        out = [None] * len(column)
        for i, x in enumerate(column):
            with contextlib.suppress(UnicodeDecodeError):
                out[i] = x.as_py()
        return out


def _from_json(
    storage: Storage, path: str, names: Sequence[str], f: FilterConfig, part: dict[str, np.ndarray]
) -> tuple[Columns, np.ndarray]:
    """From the `.json` members; one that is missing or no object is as one that is not in the table."""
    n = len(part["fault"])
    rows: list[dict[str, Any]] = []
    known = np.zeros(n, bool)
    for i, (block, size, fault) in enumerate(
        zip(part["json_block"].tolist(), part["json_size"].tolist(), part["fault"].tolist(), strict=True)
    ):
        value: Any = None
        if size != NOTHING and not fault:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(storage.read(path, block * BLOCK, size))
        known[i] = isinstance(value, dict)
        rows.append(value if isinstance(value, dict) else {})
    present = list(dict.fromkeys(key for row in rows for key in row))
    if not known.any():
        return {name: values(name, [None] * n) for name in names}, known
    found = find_columns(names, present, f, f"{path} (.json members; there is no .parquet beside it)")
    return {name: values(name, [row.get(found[name]) for row in rows]) for name in names}, known


def _shard_to(storage: Storage, folder: Path, parts: Path, f: FilterConfig, item: tuple[str, str]) -> Columns:
    """`_shard` of (tar, its table or nothing), kept for a run that comes after one that was interrupted."""
    file = parts / tar_index.part_file(Path(), item[0]).name
    found = tar_index.load_part(file)
    if found is None:
        found = _shard(storage, folder, f, *item)
        mine = file.with_name(f"{uuid.uuid4().hex}.bin")
        with contextlib.suppress(FileNotFoundError):  # another process was faster and has cleared up
            tar_index.save_part(mine, found)
            os.replace(mine, file)
    return found


def _sidecar(storage: Storage, path: str) -> tuple[str, tuple[int, int]]:
    """The table beside a tar and its stamp; "" where there is none."""
    file = path.removesuffix(".tar") + ".parquet"
    try:
        return file, storage.stamp(file)
    except OSError:
        return "", (0, 0)


def select_tars(
    index: TarIndex, folder: Path, paths: Sequence[str], storage: Storage, f: FilterConfig, workers: int = 0
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Rows of a tar index that the filters leave; kept beside the index for as long as no tar and no table changes.

    Several processes may do this at once: what they write for the same tars and tables is the same.

    Returns:
      uint32 [n], mapped into memory, and {"identity", "steps": [[title, left], ...]}, the identity by index and rows alone;
      None where nothing is asked for

    Raises:
      UserError: metadata without a column that is needed, or that cannot be read; no metadata at all.
    """
    if not is_on(f):
        return None
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        sidecars = list(pool.map(functools.partial(_sidecar, storage), paths))
    made_of = [index.about["identity"], digest(f), index.stamps.tolist(), [s for _, s in sidecars]]
    target = index.folder / f"rows-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}"
    try:
        kept = _kept(target, len(index))
        if kept is None:
            parts = target.with_name(f"{target.name}.parts")
            parts.mkdir(parents=True, exist_ok=True)
            task = functools.partial(_shard_to, storage, folder, parts, f)
            items = [(path, file) for path, (file, _) in zip(paths, sidecars, strict=True)]
            done = list(parallel(task, items, workers, "filtering"))
            if foreign := [path for path, part in zip(paths, done, strict=True) if part["foreign"]]:
                said = "no example used of %d tars that share no key with the .parquet beside them: %s"
                _log.warning(said, len(foreign), ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else ""))
            kept = _kept(target, len(index)) or _merge(index, done, f, target)
            shutil.rmtree(parts, ignore_errors=True)
    except OSError as e:
        raise UserError(f"the index {target} cannot be written or read: {e.strerror or e}") from None
    return kept


def _kept(target: Path, n: int) -> tuple[np.ndarray, dict[str, Any]] | None:
    """What `_merge` wrote for an index of n examples; None where it is missing or damaged. Raises OSError."""
    try:
        funnel = json.loads((target / "funnel.json").read_text(encoding="utf-8"))
        left, _ = funnel["steps"][-1][1], funnel["identity"]
        if not left:
            return np.zeros(0, np.uint32), funnel
        rows = np.lib.format.open_memmap(target / "rows.npy", "r")
        some = rows[np.linspace(0, left - 1, min(left, 1000)).astype(np.int64)].astype(np.int64)
        whole = rows.dtype == np.uint32 and rows.shape == (left,) and some[-1] < n and bool(np.all(np.diff(some) > 0))
        return (rows, funnel) if whole else None
    except (FileNotFoundError, ValueError, LookupError, TypeError, EOFError):
        return None


def _merge(index: TarIndex, done: list[dict[str, np.ndarray]], f: FilterConfig, target: Path) -> tuple[np.ndarray, Any]:
    counts = np.sum([part["counts"] for part in done], axis=0).tolist()
    if len(index) and not counts[0]:
        raise UserError(
            "config.data.filters: the tars have no metadata: neither a .parquet beside them with their keys nor .json members"
        )
    starts = index.starts.astype(np.uint32)
    rows = np.concatenate([part["rows"] + start for part, start in zip(done, starts, strict=False)])
    unique = None
    if f.duplicates:
        rows = rows[first_of_each(np.concatenate([part["hashes"] for part in done]))]
        unique = len(rows)
    identity = hashlib.sha256(f"{index.about['identity']} ".encode())
    identity.update(np.ascontiguousarray(rows, "<u4").data)
    steps = funnel_of(f, counts, "whole, with metadata", len(index), unique)
    said = {"identity": identity.hexdigest()[:16], "steps": steps}
    target.mkdir(exist_ok=True)
    temporary = target / f"{uuid.uuid4().hex}.tmp.npy"
    try:
        np.save(temporary, rows)
        os.replace(temporary, target / "rows.npy")
        temporary.write_text(json.dumps(said, indent=1), encoding="utf-8")
        os.replace(temporary, target / "funnel.json")
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(target / "rows.npy", mmap_mode="r") if len(rows) else rows, said


def select_parquet(paths: Sequence[str], storage: Storage, f: FilterConfig) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows of Parquet files, counted through all of them, that the filters leave, if any is on; otherwise as `select_tars`."""
    rows, hashed, counts = [], [], []
    start = 0
    for path in paths:
        columns = read_parquet(storage, path, needed(f), f)
        n = len(next(iter(columns.values())))
        keep, after = apply(columns, f, np.ones(n, bool))
        counts.append([n, *after])
        rows.append(np.flatnonzero(keep) + start)
        if f.duplicates:
            hashed.append(hashes(columns["duplicates"])[keep])
        start += n
    chosen = np.concatenate(rows)
    unique = None
    if f.duplicates:
        chosen = chosen[first_of_each(np.concatenate(hashed))]
        unique = len(chosen)
    steps = funnel_of(f, np.sum(counts, axis=0).tolist(), "rows", start, unique)
    if not len(chosen):
        raise UserError(f"{paths[0]} ...: no example is left\n{table({'steps': steps})}")
    return chosen, {"identity": digest(f), "steps": steps}
