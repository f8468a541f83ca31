"""Filters select examples by metadata such as LAION's, and report how many examples each condition leaves."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gigagan_jax.config import FilterConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.filter_columns import Columns, read_parquet_columns
from gigagan_jax.data.storage import Storage


@dataclasses.dataclass(frozen=True)
class FilterStep:
    """One condition of the filters. Null values (NaN, None) fail it.

    Attributes:
      title: the condition as text, for the report.
      needs: names of the columns it reads, as in ALIASES.
      holds: maps the columns of N examples to bool [N].
    """

    title: str
    needs: tuple[str, ...]
    holds: Callable[[Columns], np.ndarray]


def filter_steps(config: FilterConfig) -> list[FilterStep]:
    """Lists the enabled conditions, cheap and common ones first."""
    # Every condition is a comparison that NaN fails: an example without the value is dropped.
    steps: list[FilterStep] = []

    def add_step(on: Any, title: str, needs: tuple[str, ...], passes: Callable[[Columns], np.ndarray]) -> None:
        if on:
            steps.append(FilterStep(title, needs, passes))

    add_step(config.min_width, f"width >= {config.min_width}", ("width",), lambda c: c["width"] >= config.min_width)
    add_step(
        config.min_height, f"height >= {config.min_height}", ("height",), lambda c: c["height"] >= config.min_height
    )
    add_step(
        config.max_aspect,
        f"aspect ratio <= {config.max_aspect:g}",
        ("width", "height"),
        lambda c: _aspect_ratio(c) <= config.max_aspect,
    )
    # Functions that return functions bind `name` and the limit now. A lambda in the loop would see the last values.
    at_least = lambda name, least: lambda c: c[name] >= least
    at_most = lambda name, most: lambda c: c[name] <= most
    for name, least in (("clip_score", config.min_clip_score), ("aesthetic", config.min_aesthetic)):
        add_step(least, f"{name} >= {least:g}", (name,), at_least(name, least))
    # 1 is the largest probability, so a limit of 1 or above (or NaN) drops nothing and is no condition.
    for name, most in (("watermark", config.max_watermark), ("unsafe", config.max_nsfw)):
        add_step(most < 1, f"{name} <= {most:g}", (name,), at_most(name, most))
    for name, allowed in (("nsfw", config.nsfw), ("language", config.languages)):
        add_step(allowed, f"{name} in {', '.join(allowed)}", (name,), functools.partial(_is_among, name, allowed))
    # A null caption has length -1, so that it fails both limits.
    lengths = lambda c: np.array([-1 if x is None else len(x) for x in c["caption"]])
    add_step(
        config.min_caption,
        f"caption >= {config.min_caption} characters",
        ("caption",),
        lambda c: lengths(c) >= config.min_caption,
    )
    is_short = lambda c: (lengths(c) >= 0) & (lengths(c) <= config.max_caption)
    add_step(config.max_caption, f"caption <= {config.max_caption} characters", ("caption",), is_short)
    return steps


def _aspect_ratio(c: Columns) -> np.ndarray:
    # The longer side over the shorter one, so the limit holds for portraits and landscapes.
    w, h = c["width"], c["height"]
    # A side of 0 gives NaN, which fails every limit.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.minimum(w, h) > 0, np.maximum(w, h) / np.minimum(w, h), np.nan)


def _is_among(name: str, allowed: Sequence[str], c: Columns) -> np.ndarray:
    # Metadata spells values differently: UNLIKELY and unlikely, EN and en.
    allowed_lower = {a.lower() for a in allowed}
    return np.array([x is not None and x.lower() in allowed_lower for x in c[name]], bool)


def is_any_enabled(config: FilterConfig) -> bool:
    """Returns whether any condition, duplicates included, is enabled."""
    return bool(required_columns(config))


def filters_digest(config: FilterConfig) -> str:
    """Returns a hash of the conditions, 16 hexadecimal digits."""
    # Sorted keys: the order of the fields in the config class may change.
    return hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()[:16]


def required_columns(config: FilterConfig) -> tuple[str, ...]:
    """Lists the columns that the conditions read, by the names of ALIASES; `duplicates` is the column of hashes."""
    # A dict keeps the first occurrence in order; a set would change the order between processes.
    names = dict.fromkeys(name for step in filter_steps(config) for name in step.needs)
    return (*names, *(("duplicates",) if config.duplicates else ()))


def apply_filters(columns: Columns, config: FilterConfig, keep: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Applies all conditions except duplicates.

    Args:
      columns: values of N examples.
      config: the conditions.
      keep: bool [N], the examples to begin with.

    Returns:
      bool [N], and the number of examples left after each step
    """
    # Duplicates need the hashes of all shards, so they are removed after the merge.
    counts = []
    for step in filter_steps(config):
        # Comparisons with NaN are intended.
        with np.errstate(invalid="ignore"):
            keep = keep & step.holds(columns)
        counts.append(int(keep.sum()))
    return keep, counts


def hash_texts(column: np.ndarray) -> np.ndarray:
    """Hashes texts to uint64 [N]. Null becomes 0, which duplicates nothing."""
    # 64 bits keep memory at 8 bytes an example. surrogatepass: texts may hold bytes that are not UTF-8.
    # A text that hashes to 0 becomes 1, because 0 is reserved for null.
    digest = lambda x: hashlib.blake2b(x.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.array([0 if x is None else int.from_bytes(digest(x), "little") or 1 for x in column], np.uint64)


def first_occurrences(hashed: np.ndarray) -> np.ndarray:
    """Returns the sorted indices of all values that do not repeat an earlier one; every 0 is kept."""
    # np.unique returns the first occurrence of each value, so the earliest example of a group stays.
    _, first = np.unique(hashed, return_index=True)
    kept = np.zeros(len(hashed), bool)
    kept[first] = True
    return np.flatnonzero(kept | (hashed == 0))


def report_steps(
    config: FilterConfig, counts: Sequence[int], first: str, beginning: int, unique: int | None
) -> list[list[Any]]:
    """Lists [title, number of examples left] for every step.

    Args:
      config: the conditions.
      counts: number left after the step `first` and after each condition.
      first: title of the step before the conditions.
      beginning: number of all examples.
      unique: number left without duplicates; None if duplicates are kept.
    """
    titles = ["examples", first, *(s.title for s in filter_steps(config))]
    rows: list[list[Any]] = [[title, n] for title, n in zip(titles, [beginning, *counts], strict=True)]
    if unique is not None:
        rows.append([f"no duplicates by {config.duplicates}", unique])
    return rows


def format_report(report: dict[str, Any]) -> str:
    """Formats a report as text, one line a step: examples left, their share of all, and the change."""
    # At least 1, for a data set without examples.
    total = max(1, report["steps"][0][1])
    width = max(len(title) for title, _ in report["steps"])
    before = total
    lines = []
    for title, n in report["steps"]:
        lines.append(f"{title:<{width}}  {n:>13,}  {100 * n / total:6.2f} %  {n - before if n != before else 0:>+13,}")
        before = n
    return "\n".join(lines)


def select_parquet_rows(
    paths: Sequence[str], storage: Storage, config: FilterConfig
) -> tuple[np.ndarray, dict[str, Any]]:
    """Selects rows of Parquet files by filters, at least one of which is enabled.

    Args:
      paths: the files, in their order.
      storage: reads the files.
      config: the conditions.

    Returns:
      int64 [n], row numbers counted through all files, and the report as from `select_tar_examples`

    Raises:
      UserError: a column is missing, a file cannot be read, or no row is left.
    """
    rows, hashed, counts = [], [], []
    start = 0
    for path in paths:
        columns = read_parquet_columns(storage, path, required_columns(config), config)
        # Every column has one value a row; there is at least one column, because a filter is enabled.
        n = len(next(iter(columns.values())))
        keep, left = apply_filters(columns, config, np.ones(n, bool))
        counts.append([n, *left])
        rows.append(np.flatnonzero(keep) + start)
        if config.duplicates:
            hashed.append(hash_texts(columns["duplicates"])[keep])
        start += n
    chosen = np.concatenate(rows)
    unique = None
    if config.duplicates:
        # Duplicates are removed across files, and only among rows that pass the other conditions.
        chosen = chosen[first_occurrences(np.concatenate(hashed))]
        unique = len(chosen)
    steps = report_steps(config, np.sum(counts, axis=0).tolist(), "rows", start, unique)
    if not len(chosen):
        raise UserError(f"{paths[0]} ...: no example is left\n{format_report({'steps': steps})}")
    return chosen, {"identity": filters_digest(config), "steps": steps}
