"""Reads tables that name pictures and their captions: metadata.jsonl, .csv, .parquet, .json, and COCO's captions."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.data.decoding import decode_text
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.survey.file_names import CAPTION_NAMES

# Columns that name a picture, in the order of preference; Hugging Face's imagefolder has the first.
FILE_NAMES = ("file_name", "filename", "file", "image", "image_path", "img", "image_name", "path", "name", "image_id")
# imagefolder's metadata, kohya's, and what people call a table of captions.
_TABLE_NAME = re.compile(
    r"(metadata|meta(_\w+)?|captions?|labels?|prompts?|annotations?|results?|data|dataset)\.(jsonl|ndjson|csv|tsv|json|parquet)",
    re.IGNORECASE,
)
_COCO_NAME = re.compile(r"captions[_-](.+)\.json", re.IGNORECASE)
# A field of csv holds 128 kB by default, and raises for more.
csv.field_size_limit(1 << 26)


class UnreadableTable(Exception):
    """A table that is damaged, or not of the form that its name promises."""


def is_table_name(name: str) -> bool:
    """Whether a file, by its name, may be a table of captions beside pictures."""
    return _TABLE_NAME.fullmatch(posixpath.basename(name)) is not None


def coco_split(name: str) -> str | None:
    """'train2017' for '.../captions_train2017.json'; None for other files."""
    found = _COCO_NAME.fullmatch(posixpath.basename(name))
    return found.group(1) if found else None


def read_table(path: Path, caption_keys: Sequence[str] = ()) -> dict[str, list[str]]:
    """Reads a table.

    Args:
      path: .jsonl, .ndjson, .csv, .tsv, .json or .parquet.
      caption_keys: columns with captions; empty: the first of CAPTION_NAMES that has text in any row.

    Returns:
      {file name as the table has it, with forward slashes: captions}; empty lists for files without a caption

    Raises:
      UnreadableTable: the file is damaged, or no column names files or holds captions.
    """
    suffix = path.suffix.lower()
    # One exception for all: the report names the file and goes on.
    try:
        if suffix == ".parquet":
            rows = _parquet_rows(path)
        elif suffix == ".json":
            rows = _json_rows(json.loads(decode_text(path.read_bytes())))
        elif suffix in (".jsonl", ".ndjson"):
            rows = _json_lines(decode_text(path.read_bytes()))
        else:
            rows = _csv_rows(decode_text(path.read_bytes()), "\t" if suffix == ".tsv" else None)
    except (BadExample, ValueError, RecursionError, csv.Error, OSError, LookupError) as error:
        raise UnreadableTable(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    return _pairs(rows, caption_keys)


def read_coco(path: Path) -> dict[str, list[str]]:
    """Reads COCO's captions: {file name: captions}. Raises UnreadableTable."""
    try:
        data = json.loads(decode_text(path.read_bytes()))
    except (BadExample, ValueError, RecursionError, OSError) as error:
        raise UnreadableTable(str(error).splitlines()[0]) from None
    if not isinstance(data, dict):
        raise UnreadableTable("no object with images and annotations")
    # Ids are numbers, and texts in what other tools write in this form.
    names: dict[Any, str] = {}
    captions: dict[str, list[str]] = {}
    for image in _dicts(data.get("images")):
        name = image.get("file_name")
        if isinstance(name, str) and name and _is_key(image.get("id")):
            names[image["id"]] = _normalize(name)
            captions.setdefault(names[image["id"]], [])
    for annotation in _dicts(data.get("annotations")):
        key = annotation.get("image_id")
        if _is_key(key) and key in names:
            captions[names[key]] += texts_of(annotation.get("caption"))
    if not captions:
        raise UnreadableTable("no images with a file_name in it")
    return captions


def texts_of(value: Any) -> list[str]:
    """The captions of a value: a text, a list of texts, or of COCO's and Karpathy's {"raw": text}."""
    if isinstance(value, str):
        # A cell with line breaks is one caption: only files have a caption a line.
        text = " ".join(value.split())
        return [text] if text else []
    if isinstance(value, Mapping):
        return texts_of(value.get("raw"))
    if isinstance(value, list | tuple):
        return [text for v in value if not isinstance(v, list | tuple) for text in texts_of(v)]
    return []


def choose_keys(names: Iterable[str], caption_keys: Sequence[str]) -> list[str]:
    """Those of the names that are captions by `caption_keys`, or by their usual names in the order of preference."""
    if caption_keys:
        return [k for k in caption_keys if k in set(names)]
    # TEXT and Caption are spellings too.
    by_lower = {name.lower(): name for name in reversed(list(names))}
    return [by_lower[k] for k in CAPTION_NAMES if k in by_lower]


def captions_of(row: Mapping[str, Any], caption_keys: Sequence[str]) -> list[str]:
    """Captions of a JSON object or of a row: all of `caption_keys`, or the first usual name that has text."""
    keys = choose_keys([k for k in row if isinstance(k, str)], caption_keys)
    # A usual name that is empty here does not hide the next one.
    found = [texts for k in keys if (texts := texts_of(row[k]))]
    return [t for texts in (found if caption_keys else found[:1]) for t in texts]


def _pairs(rows: Iterable[Mapping[str, Any]], caption_keys: Sequence[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for row in rows:
        name = _file_name(row)
        if name is not None:
            # Several rows of a file are several captions.
            out.setdefault(name, []).extend(captions_of(row, caption_keys))
    if not out:
        raise UnreadableTable(f"no column names files ({', '.join(FILE_NAMES[:4])} ...)")
    return out


def _file_name(row: Mapping[str, Any]) -> str | None:
    by_lower = {k.lower(): v for k, v in row.items() if isinstance(k, str)}
    # Hugging Face allows prefixes too: image_file_name.
    keys = [*FILE_NAMES, *(k for k in by_lower if k.endswith("_file_name"))]
    for key in keys:
        value = by_lower.get(key)
        if isinstance(value, str) and value.strip():
            return _normalize(value.strip())
    return None


def _normalize(name: str) -> str:
    # Tables made on Windows have backslashes. normpath takes ./ and doubled slashes away.
    return posixpath.normpath(name.replace("\\", "/"))


def _is_key(value: Any) -> bool:
    return isinstance(value, int | str)


def _dicts(values: Any) -> Iterator[dict[str, Any]]:
    return (v for v in values if isinstance(v, dict)) if isinstance(values, list) else iter(())


def _json_lines(text: str) -> list[dict[str, Any]]:
    rows, bad = [], 0
    # Not splitlines: captions may hold U+2028.
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            bad += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
    # One damaged line costs its picture's caption, which the report counts.
    if bad and not rows:
        raise UnreadableTable("its lines are not JSON")
    return rows


def _json_rows(data: Any) -> list[dict[str, Any]]:
    """Rows of a list of objects, or of kohya's {picture: {caption, tags}} and {picture: caption}."""
    if isinstance(data, dict):
        # {"images": [...]} of Karpathy's splits, {"data": [...]} of exports.
        for key in ("images", "data", "annotations", "items"):
            if isinstance(data.get(key), list):
                return list(_dicts(data[key]))
        rows = []
        for name, value in data.items():
            if isinstance(value, dict):
                rows.append(value | {"file_name": name})
            elif texts_of(value):
                rows.append({"file_name": name, "caption": value})
        return rows
    return list(_dicts(data))


def _csv_rows(text: str, delimiter: str | None) -> list[dict[str, Any]]:
    # A null byte is no text.
    text = text.replace("\0", "")
    if delimiter is None:
        # Spreadsheets of some countries write semicolons, Flickr30k bars.
        head = text.split("\n", 1)[0]
        delimiter = max(",;|\t", key=head.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return [{k.strip(): v for k, v in row.items() if isinstance(k, str)} for row in rows]


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        # Pictures in bytes would fill the memory.
        names = [f.name for f in schema if not str(f.type).startswith(("binary", "large_binary", "struct"))]
        return pyarrow.parquet.read_table(path, columns=names).to_pylist()
    # Damaged files raise exceptions of many types.
    except Exception as error:
        raise UnreadableTable(f"damaged Parquet: {str(error).splitlines()[0] if str(error) else type(error)}") from None


def find_names(
    table: Mapping[str, list[str]], folder: str, exists: Callable[[str], bool], stems: Callable[[str], str | None]
) -> tuple[dict[str, list[str]], int]:
    """Finds a table's files among the pictures.

    Args:
      table: {file name: captions}.
      folder: folder of the table relative to the surveyed one; "" for that one.
      exists: whether a picture has this path relative to the surveyed folder.
      stems: the picture whose path without its ending is this; None where none is.

    Returns:
      ({path of the picture: captions}, number of names without a picture)
    """
    out: dict[str, list[str]] = {}
    # Names without a picture: a table of a larger data set is usual.
    lost = 0
    for name, captions in table.items():
        # Relative to the table, as imagefolder has it, or to the surveyed folder.
        for place in (posixpath.normpath(posixpath.join(folder, name.lstrip("/"))), name.lstrip("/")):
            found = place if exists(place) else stems(place)
            if found is not None:
                out.setdefault(found, []).extend(captions)
                break
        else:
            lost += 1
    return out, lost
