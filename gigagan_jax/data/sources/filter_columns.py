"""Reads the columns of metadata that filters need, found by the spellings that data sets use."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gigagan_jax.config import FilterConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.storage import Storage

# Spellings in img2dataset, LAION-400M, LAION-5B, LAION-Aesthetics and DataComp; upper and lower case are equal.
# The first match wins: img2dataset's width is that of the resized image, so original_width comes first.
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
# Columns that hold texts; all others hold numbers.
TEXTS = ("nsfw", "language", "caption", "key", "duplicates")
Columns = dict[str, np.ndarray]


def find_columns(names: Sequence[str], present: Sequence[str], config: FilterConfig, where: str) -> dict[str, str]:
    """Maps each of `names` to a present column.

    Args:
      names: names as in ALIASES, or "duplicates".
      present: names of the columns that the data has.
      config: names the column for duplicates.
      where: the file, for the message.

    Raises:
      UserError: no spelling of a name is present.
    """
    # Reversed, so that the first of several columns that differ only in case wins.
    by_lower = {p.lower(): p for p in reversed(present)}
    columns = {}
    for name in names:
        spellings = (config.duplicates,) if name == "duplicates" else ALIASES[name]
        column = next((by_lower[s.lower()] for s in spellings if s.lower() in by_lower), None)
        if column is None:
            raise UserError(
                f"{where} has no column for {name} (looked for {', '.join(spellings)}), which config.data.filters needs; "
                f"it has {', '.join(present) or 'none'}"
            )
        columns[name] = column
    return columns


def convert_column(name: str, column: Sequence[Any]) -> np.ndarray:
    """Converts a column for `FilterStep`: float64 with NaN for null, or objects with None for null."""
    if name in TEXTS:
        to_key_or_text = _normalize_key if name == "key" else _to_text
        # Filled by slice: np.array() would make a string array of fixed width.
        texts = np.empty(len(column), object)
        # x != x holds for NaN only, the null of pandas.
        texts[:] = [None if x is None or x != x else to_key_or_text(x) for x in column]
        return texts

    def to_float(x: Any) -> float:
        try:
            return float(x)
        # Text among numbers, and integers beyond float64, count as null.
        except (TypeError, ValueError, OverflowError):
            return float("nan")

    return np.array([to_float(x) for x in column], np.float64)


def _to_text(x: Any) -> str:
    """Converts a value to text. Bytes that are not UTF-8 become surrogates, as in names of tar members."""
    # Hash columns may hold raw bytes.
    return x.decode("utf-8", "surrogateescape") if isinstance(x, bytes) else str(x)


def _normalize_key(x: Any) -> str | int:
    """Converts a key to the form that tars have, or to an integer."""
    # A pandas column of integers with nulls is stored as floats.
    return int(x) if isinstance(x, int) or (isinstance(x, float) and x.is_integer()) else _to_text(x)


def read_parquet_columns(storage: Storage, file: str, names: Sequence[str], config: FilterConfig) -> Columns:
    """Reads columns by the names of ALIASES.

    Raises:
      UserError: the file is damaged, or a column is missing or occurs twice.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with storage.open(file) as opened:
            parquet = pyarrow.parquet.ParquetFile(opened)
            present = parquet.schema_arrow.names
            found = find_columns(names, present, config, file)
            repeated = [column for column in found.values() if present.count(column) > 1]
            if repeated:
                raise UserError(
                    f"{file} has several columns {repeated[0]!r}, which config.data.filters needs: leave one of them"
                )
            # Two names may map to one column, and pyarrow would return it twice.
            table = parquet.read(columns=list(dict.fromkeys(found.values())))
            return {name: convert_column(name, _to_pylist(table.column(column))) for name, column in found.items()}
    # A damaged file raises any of these from pyarrow, not only its own exceptions.
    except (OSError, pyarrow.ArrowException, ValueError, LookupError, ArithmeticError, MemoryError) as e:
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{file} cannot be read as Parquet: {why}") from None


def _to_pylist(column: Any) -> list[Any]:
    """Converts an Arrow column to Python values. Text that is not UTF-8 becomes null."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        # Slow path: value by value, so that one bad text does not cost the whole column.
        values = [None] * len(column)
        for i, x in enumerate(column):
            with contextlib.suppress(UnicodeDecodeError):
                values[i] = x.as_py()
        return values
