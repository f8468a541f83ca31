"""Opens the source that a config's `data` names. The path decides the kind where `data.source` is "auto"."""

import os
import re
from pathlib import Path
from typing import Any

from gigagan_jax.config import SOURCE_KINDS, DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.source import Source
from gigagan_jax.data.sources import filters
from gigagan_jax.data.sources.tar_index import SHARD_SUFFIXES
from gigagan_jax.data.storage import Storage, is_local, local_path

# The values of `data.source` beside "auto".


def make_source(
    data: DataConfig, *, condition: str = "text", workdir: Path | None = None, workers: int = 0, refresh: bool = False
) -> Source:
    """Opens a config's data set, or its mixture.

    Args:
      data: the config's `data`.
      condition: "text" (captions may be required), "class" (a folder's sub-folders are classes) or "none".
      workdir: folder of the run. An index that cannot be written beside the data goes there.
      workers: processes for indexing; 0: one for each core.
      refresh: compares every tar with its index, in buckets too.

    Raises:
      UserError: the source refuses its path, or filters are set for a source without metadata.
    """
    if data.source == "shapes" and (data.path or data.mixture):
        raise UserError("config.data.source='shapes' draws its pictures: config.data.path and mixture must be empty")
    if not data.mixture:
        return _open_source(data, data.path, condition, workdir, workers, refresh)
    from gigagan_jax.data.sources.mixture import MixtureSource

    # Paths inside a mixture would silently shadow data.path.
    if data.path:
        raise UserError("config.data.mixture and config.data.path are both set: a mixture names its own paths")
    parts = []
    for text in data.mixture:
        # The first colon separates: addresses such as s3://bucket hold further ones.
        weight, colon, path = text.partition(":")
        # The pattern excludes what float() also accepts: nan, inf, signs and exponents.
        if not colon or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or not float(weight) or not path:
            raise UserError(
                f"config.data.mixture: {text!r} is not WEIGHT:PATH with a positive weight, such as 0.3:photos/"
            )
        parts.append((float(weight), _open_source(data, path, condition, workdir, workers, refresh)))
    return MixtureSource(parts)


def _open_source(
    data: DataConfig, path: str, condition: str, workdir: Path | None, workers: int, refresh: bool
) -> Source:
    storage = Storage(data.retry_seconds)
    kind = detect_kind(path, storage) if data.source == "auto" else data.source
    # Only text conditioning needs captions.
    required = data.captions == "required" and condition == "text"
    keys: dict[str, Any] = {"caption_keys": data.caption_keys, "caption_required": required}
    filtered = filters.is_any_enabled(data.filters)
    if filtered and kind not in ("tar", "parquet"):
        raise UserError(
            f"config.data.filters: data of kind {kind!r} has no metadata to filter by; tars and Parquet have"
        )
    # Each branch imports its own source, so a missing optional package fails only the source that needs it.
    if kind == "digits":
        from gigagan_jax.data.sources.digits import DigitsSource

        return DigitsSource()
    if kind == "shapes":
        from gigagan_jax.data.sources.shapes import ShapesSource

        return ShapesSource(data.shapes)
    if not path:
        raise UserError("config.data.path is empty: set it to the images (a folder, tars, Parquet files, a tfds name)")
    if kind == "folder":
        from gigagan_jax.data.sources.folder import FolderSource

        if not is_local(path):
            raise UserError(
                f"{path}: folders of images are read from local disks only; pack them into tars for buckets"
            )
        labels = "folder" if condition == "class" else None
        return FolderSource(local_path(path), caption_required=required, labels=labels)
    if kind == "tar":
        from gigagan_jax.data.sources.tar import TarSource

        return TarSource(
            path,
            index=data.index,
            workdir=workdir,
            storage=storage,
            filters=data.filters,
            workers=workers,
            refresh=refresh,
            **keys,
        )
    if kind == "arrayrecord":
        from gigagan_jax.data.sources.array_record import ArrayRecordSource

        return ArrayRecordSource(path, storage=storage, caption_required=required)
    keys |= {"image_key": data.image_key, "label_key": data.label_key}
    if kind == "parquet":
        from gigagan_jax.data.sources.parquet import ParquetSource

        if filtered:
            paths = storage.expand_pattern(path, (".parquet",))
            keys["rows"], keys["filter_report"] = filters.select_parquet_rows(paths, storage, data.filters)
        return ParquetSource(path, storage=storage, **keys)
    if kind == "tfds":
        from gigagan_jax.data.sources.tfds import TfdsSource

        return TfdsSource(path, split=data.split, **keys)
    raise UserError(f"config.data.source={kind!r}: must be one of auto, {', '.join(SOURCE_KINDS)}")


def detect_kind(path: str, storage: Storage) -> str:
    """Finds the kind of data at a path by the names of its files.

    Raises:
      UserError: the path is empty, or nothing exists there.
    """
    if not path:
        raise UserError("config.data.path is empty: set it to the images (a folder, tars, Parquet files, a tfds name)")
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
    if any(n.endswith(SHARD_SUFFIXES) for n in lower):
        return "tar"
    if any(".array_record" in n for n in lower):
        return "arrayrecord"
    return "parquet" if any(n.endswith(".parquet") for n in lower) else None
