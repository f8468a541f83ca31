"""Looks at a path once and says what it is, before anything is read: kind, effective path, and a report of a few lines."""

import os
import re
from pathlib import Path

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.storage import Storage, is_local, local_path
from gigagan_jax.data.survey.report import OtherReading, PassedOver, Survey

__all__ = ["OtherReading", "PassedOver", "Survey", "survey_path"]

# Compressed tars too: their source refuses them with a reason.
_SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_NO_PATH = "config.data.path is empty: set it to the images (a folder, tars, Parquet files, a tfds name)"


def survey_path(
    path: str, data: DataConfig, condition: str, storage: Storage | None = None, workdir: Path | None = None
) -> Survey:
    """Finds out what a path holds. Reads names, and the heads of a few files.

    Args:
      path: as `DataConfig.path`, or a part of a mixture.
      data: the config's `data`. Its `source` other than "auto" fixes the kind.
      condition: "text", "class" or "none".
      storage: reads files.
      workdir: folder of the run, which is no data where it lies inside the data.

    Raises:
      UserError: the path is empty, or nothing exists there.
    """
    if not path:
        raise UserError(_NO_PATH)
    storage = storage or Storage(data.retry_seconds)
    # A kind that the user names is taken at its word.
    kind = _detect_kind(path, storage) if data.source == "auto" else data.source
    return Survey(given=path, path=local_path(path) if is_local(path) else path, kind=kind)


def _detect_kind(path: str, storage: Storage) -> str:
    # A pattern may end in a brace or a star behind the suffix: *.tar, {a.tar,b.tar}, x.array_record*.
    by_name = _kind_by_suffix([path.rstrip("}*/")])
    if by_name:
        return by_name
    if not is_local(path):
        return _kind_by_suffix(storage.expand_pattern(path if "*" in path else f"{path.rstrip('/')}/*")) or "tar"
    place = Path(local_path(path))
    if not place.exists() and not any(c in path for c in "*?[{"):
        # A TFDS name is NAME, NAME/CONFIG or NAME/CONFIG:VERSION; a local path of that name takes precedence.
        if re.fullmatch(r"[a-z][a-z0-9_]*(/[\w.]+)?(:[\d.*]+)?", path):
            return "tfds"
        raise UserError(f"{path}: there is nothing at this path; check config.data.path")
    if not place.is_dir():
        return _kind_by_suffix(storage.expand_pattern(path)) or "folder"
    # 10,000 entries bound the time in a folder with millions of images.
    with os.scandir(place) as entries:
        names = [e.name for _, e in zip(range(10_000), entries, strict=False) if e.is_file()]
    # Before the suffixes: a folder that TFDS made holds ArrayRecord files too.
    # Both files are needed: other tools write a dataset_info.json too.
    if "features.json" in names and "dataset_info.json" in names:
        return "tfds"
    return _kind_by_suffix(names) or "folder"


def _kind_by_suffix(names: list[str]) -> str | None:
    """Returns the first of tar, arrayrecord, parquet that matches a name, or None."""
    # Tar comes first: img2dataset writes a Parquet file with metadata beside each tar.
    lower = [n.lower() for n in names]
    if any(n.endswith(_SHARD_SUFFIXES) for n in lower):
        return "tar"
    if any(".array_record" in n for n in lower):
        return "arrayrecord"
    return "parquet" if any(n.endswith(".parquet") for n in lower) else None
