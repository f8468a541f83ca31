"""Finds the Arrow files of a data set of Hugging Face `datasets`, without that package.

Three layouts: `save_to_disk` of a DatasetDict (`dataset_dict.json`, a folder for each split), of one split (`state.json`
lists the files), and the package's own cache (`NAME-SPLIT-00000-of-00004.arrow` beside `dataset_info.json`).
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.storage import Storage, is_local, local_path

# Where earlier releases of datasets list the files of a selection or a shuffled order.
_INDEX_LISTS = ("_indices_data_files", "_indices_files")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclasses.dataclass(frozen=True)
class ArrowFiles:
    """The files of one split.

    Attributes:
      paths: in the order of their rows.
      indices: files whose only column is the order of the rows; empty: all rows in their order.
      features: as `dataset_info.json` has them, for names of classes; may be empty.
      split: its name; "" where the files have none.
      splits: all that there are.
    """

    paths: tuple[str, ...]
    indices: tuple[str, ...] = ()
    features: dict[str, Any] = dataclasses.field(default_factory=dict)
    split: str = ""
    splits: tuple[str, ...] = ()


def find_arrow_files(path: str, split: str) -> ArrowFiles:
    """Finds the files of a split at a path: a folder of one of the layouts, a file, or a pattern.

    Raises:
      UserError: there is none, the split is not among them, or a listed file is missing.
    """
    if not is_local(path):
        raise UserError(
            f"{path}: Arrow files are mapped into memory, so they are read from local disks only; copy them"
        )
    folder = Path(local_path(path))
    # A single file of a data set that has several is taken at its word.
    if not folder.is_dir():
        return ArrowFiles(tuple(Storage().expand_pattern(path, (".arrow",))))
    if (folder / "dataset_dict.json").is_file():
        splits = tuple(map(str, _as_list(_read_json(folder / "dataset_dict.json").get("splits"))))
        chosen = choose_split(splits, split, path)
        # Each split is a data set of its own, with a state.json.
        found = _saved_files(folder / chosen)
        return dataclasses.replace(found, split=chosen, splits=splits)
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    return _cached_files(folder, split)


def choose_split(splits: Sequence[str], split: str, path: str) -> str:
    """Returns the split that is asked for, or the only one.

    Raises:
      UserError: there are several, and none has this name.
    """
    # A name that is asked for and there needs no thought.
    if split in splits:
        return split
    # "train" is the default: the only split of a data set may have another name.
    if len(splits) == 1 and split in ("", "train"):
        return splits[0]
    if not splits:
        raise UserError(f"{path} holds no split: its dataset_dict.json lists none; save the data set again")
    raise UserError(f"{path} has no split {split!r}: set config.data.split to one of {', '.join(splits)}")


def _saved_files(folder: Path) -> ArrowFiles:
    """Files of one `save_to_disk`."""
    state = _read_json(folder / "state.json")
    listed = {
        name: tuple(
            str(folder / str(entry.get("filename")))
            for entry in _as_list(state.get(name))
            if isinstance(entry, dict) and entry.get("filename")
        )
        for name in ("_data_files", *_INDEX_LISTS)
    }
    # A copy that was interrupted would otherwise train on a part.
    missing = next((p for paths in listed.values() for p in paths if not os.path.isfile(p)), None)
    if missing:
        raise UserError(f"{missing} is not there, but {folder / 'state.json'} lists it: copy the data set again")
    if not listed["_data_files"]:
        raise UserError(f"{folder / 'state.json'} lists no data file: the data set is empty, or was not saved whole")
    # Today's datasets writes the rows in their new order, and no list of indices.
    indices = next((listed[name] for name in _INDEX_LISTS if listed[name]), ())
    return ArrowFiles(listed["_data_files"], indices, _read_features(folder))


def _cached_files(folder: Path, split: str) -> ArrowFiles:
    """Files of the cache of `datasets`, or any folder of Arrow files."""
    # cache-*.arrow are results of map and filter, not the data set.
    names = [
        n for n in sorted(os.listdir(folder)) if n.lower().endswith(".arrow") and not n.startswith(("cache-", "."))
    ]
    if not names:
        raise UserError(f"{folder} holds no .arrow file; check config.data.path")
    known = _read_json(folder / "dataset_info.json").get("splits") if (folder / "dataset_info.json").is_file() else None
    # Without dataset_info.json, nothing says which part of a name is a split.
    of_split: dict[str, list[str]] = {str(name): [] for name in (known if isinstance(known, dict) else {})}
    for name in names:
        # The name of the data set comes first and may itself end in the name of a split.
        stem = _SHARD.sub("", name.removesuffix(".arrow"))
        owner = next((s for s in of_split if stem == s or stem.endswith(f"-{s}")), None)
        if owner is not None:
            of_split[owner].append(str(folder / name))
    splits = tuple(s for s, files in of_split.items() if files)
    if not splits:
        return ArrowFiles(tuple(str(folder / n) for n in names), (), _read_features(folder))
    chosen = choose_split(splits, split, str(folder))
    return ArrowFiles(tuple(of_split[chosen]), (), _read_features(folder), chosen, splits)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_features(folder: Path) -> dict[str, Any]:
    # Names of classes are optional: a missing or damaged file is no error.
    try:
        features = _read_json(folder / "dataset_info.json").get("features")
    except UserError:
        return {}
    return features if isinstance(features, dict) else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    # RecursionError: deeply nested JSON.
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(
            f"{file} cannot be read ({getattr(e, 'strerror', None) or 'it is no JSON'}): save the data set again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{file} cannot be read (it is no JSON object): save the data set again")
    return value
