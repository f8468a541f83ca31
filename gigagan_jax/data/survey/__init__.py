"""Looks at a path once and says what it is, before anything is read: kind, effective path, and a report of a few lines."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.storage import Storage, is_local, local_path
from gigagan_jax.data.survey.file_names import ZIPS
from gigagan_jax.data.survey.kinds import kind_by_suffix, survey_folder
from gigagan_jax.data.survey.report import OtherReading, PassedOver, Survey

__all__ = ["OtherReading", "PassedOver", "Survey", "survey_path"]

_NO_PATH = "config.data.path is empty: set it to the images (a folder, tars, Parquet files, a tfds name)"
# NAME, NAME/CONFIG or NAME/CONFIG:VERSION.
_TFDS_NAME = re.compile(r"[a-z][a-z0-9_]*(/[\w.]+)?(:[\d.*]+)?")
# ORG/NAME, ORG/NAME:CONFIGURATION, ORG/NAME@REVISION.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.+-]+)?(@[\w./-]+)?")


def survey_path(
    path: str, data: DataConfig, condition: str, storage: Storage | None = None, workdir: Path | None = None
) -> Survey:
    """Finds out what a path holds. Lists it once, and reads the heads of a few files.

    Args:
      path: as `DataConfig.path`, or a part of a mixture.
      data: the config's `data`. Its `source` other than "auto" fixes the kind.
      condition: "text", "class" or "none".
      storage: reads files.
      workdir: folder of the run, which is no data where it lies inside the data.

    Raises:
      UserError: the path is empty, nothing exists there, or a folder holds nothing that can be read.
    """
    if not path:
        raise UserError(_NO_PATH)
    storage = storage or Storage(data.retry_seconds)
    place = local_path(path) if is_local(path) else path
    is_folder = is_local(path) and Path(place).is_dir()
    # A kind that the user names is taken at its word.
    if data.source != "auto" and not (is_folder and data.source in ("folder", "tar", "parquet")):
        return Survey(given=path, path=place, kind=data.source)
    if is_folder:
        return dataclasses.replace(survey_folder(Path(place), data, condition, workdir), given=path)
    return Survey(given=path, path=place, kind=_kind_of_other(path, place, storage))


def _kind_of_other(path: str, place: str, storage: Storage) -> str:
    """The kind of what is no folder on this machine: a file, a pattern, an address, a name of TFDS or of the hub."""
    # A pattern may end in a brace or a star behind the suffix: *.tar, {a.tar,b.tar}, x.array_record*.
    by_name = kind_by_suffix([path.rstrip("}*/")])
    if by_name:
        return by_name
    if path.lower().endswith(ZIPS):
        raise UserError(
            f"{path} is an archive: examples in it are not read; unpack it, and set config.data.path to the folder"
        )
    if path.startswith("hf://datasets/"):
        return "hub"
    if not is_local(path):
        return kind_by_suffix(storage.expand_pattern(path if "*" in path else f"{path.rstrip('/')}/*")) or "tar"
    if Path(place).exists():
        return "folder"
    if any(c in path for c in "*?[{"):
        return kind_by_suffix(storage.expand_pattern(path)) or "folder"
    named = _TFDS_NAME.fullmatch(path)
    # A one-word name, or a version, is TFDS's. The hub's ids have an owner.
    if named and (":" in path or "/" not in path or path.split("/")[0] in _tfds_names()):
        return "tfds"
    # A folder of the first name is here: the second one is misspelled.
    if _HUB_ID.fullmatch(path) and not Path(place).parent.is_dir():
        return "hub"
    raise UserError(f"{path}: there is nothing at this path; check config.data.path")


@functools.cache
def _tfds_names() -> frozenset[str]:
    """Names of the data sets that TFDS knows, and of those in its folder on this machine."""
    import tensorflow_datasets as tfds

    return frozenset(tfds.list_builders(with_community_datasets=False))
