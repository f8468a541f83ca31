"""Opens the source that a config's `data` names. A survey of the path decides the kind where `data.source` is "auto"."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gigagan_jax.config import SOURCE_KINDS, DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.source import Source
from gigagan_jax.data.sources import filters
from gigagan_jax.data.storage import Storage, is_local
from gigagan_jax.data.survey import Survey, survey_path

# Takes the report of a path as one text.
Report = Callable[[str], Any]


def make_source(
    data: DataConfig,
    *,
    condition: str = "text",
    workdir: Path | None = None,
    workers: int = 0,
    refresh: bool = False,
    report: Report = lambda text: None,
    surveys: Mapping[str, Survey] | None = None,
) -> Source:
    """Opens a config's data set, or its mixture.

    Args:
      data: the config's `data`.
      condition: "text" (captions may be required), "class" (a folder's sub-folders are classes) or "none".
      workdir: folder of the run. An index that cannot be written beside the data goes there.
      workers: processes for indexing; 0: one for each core.
      refresh: compares every tar with its index, in buckets too.
      report: called with the report of each path (`Survey.lines`, joined) before the source is opened.
      surveys: {path: survey} of paths that were looked at already (`survey_data`).

    Raises:
      UserError: the source refuses its path, or filters are set for a source without metadata.
    """
    if data.source == "shapes" and (data.path or data.mixture):
        raise UserError("config.data.source='shapes' draws its pictures: config.data.path and mixture must be empty")
    open_one = lambda path: _open_source(data, path, condition, workdir, workers, refresh, report, surveys or {})
    if not data.mixture:
        return open_one(data.path)
    from gigagan_jax.data.sources.mixture import MixtureSource

    return MixtureSource([(weight, open_one(path)) for weight, path in _parse_mixture(data)])


def _parse_mixture(data: DataConfig) -> list[tuple[float, str]]:
    """(weight, path) of each part of a mixture. Raises UserError."""
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
        parts.append((float(weight), path))
    return parts


def survey_data(data: DataConfig, condition: str, workdir: Path | None = None) -> dict[str, Survey]:
    """{path: survey} of a config's data set, or of the parts of its mixture; empty for data without a path.

    Raises:
      UserError: there is nothing at a path, or the mixture is none.
    """
    if data.source in ("digits", "shapes"):
        return {}
    storage = Storage(data.retry_seconds)
    paths = [path for _, path in _parse_mixture(data)] if data.mixture else [data.path]
    return {path: survey_path(path, data, condition, storage, workdir) for path in paths}


def _open_source(
    data: DataConfig,
    path: str,
    condition: str,
    workdir: Path | None,
    workers: int,
    refresh: bool,
    report: Report,
    surveys: Mapping[str, Survey],
) -> Source:
    if data.source not in ("auto", *SOURCE_KINDS):
        raise UserError(f"config.data.source={data.source!r}: must be one of auto, {', '.join(SOURCE_KINDS)}")
    _check_filters(data, data.source)
    # These need no path.
    if data.source == "digits":
        from gigagan_jax.data.sources.digits import DigitsSource

        return DigitsSource()
    if data.source == "shapes":
        from gigagan_jax.data.sources.shapes import ShapesSource

        return ShapesSource(data.shapes)
    storage = Storage(data.retry_seconds)
    survey = surveys.get(path) or survey_path(path, data, condition, storage, workdir)
    filtered = _check_filters(data, survey.kind)
    # Before the source is opened: the report explains a refusal.
    report("\n".join(survey.lines()))
    # Only text conditioning needs captions.
    required = data.captions == "required" and condition == "text"
    # A folder's source takes the listing of the survey: a second one would take minutes on a network file system.
    if survey.kind == "folder":
        return _open_folder(survey, data, condition, required)
    if survey.kind == "tar":
        from gigagan_jax.data.sources.tar import TarSource

        return TarSource(
            survey.path,
            index=data.index,
            workdir=workdir,
            storage=storage,
            filters=data.filters,
            workers=workers,
            refresh=refresh,
            caption_keys=data.caption_keys,
            caption_required=required,
        )
    return _open_table(survey, data, storage, required, filtered)


def _check_filters(data: DataConfig, kind: str) -> bool:
    """Whether filters are set; raises UserError where they are, for a kind without metadata."""
    filtered = filters.is_any_enabled(data.filters)
    if filtered and kind not in ("auto", "tar", "parquet"):
        raise UserError(
            f"config.data.filters: data of kind {kind!r} has no metadata to filter by; tars and Parquet have"
        )
    return filtered


def _open_folder(survey: Survey, data: DataConfig, condition: str, required: bool) -> Source:
    from gigagan_jax.data.sources.folder import FolderSource

    if not is_local(survey.path):
        raise UserError(
            f"{survey.path}: folders of images are read from local disks only; pack them into tars for buckets"
        )
    labels = "folder" if condition == "class" else None
    source = FolderSource(survey.path, caption_required=required, labels=labels, contents=survey.contents)
    if required and survey.uncaptioned and survey.uncaptioned > data.max_bad_fraction * len(source):
        # The quarantine would end the run with this, after its programs were compiled.
        raise UserError(
            f"{survey.path}: {survey.uncaptioned} of {len(source)} images have no caption, more than "
            f"config.data.max_bad_fraction={data.max_bad_fraction:g} allows: write them, raise that limit to leave those "
            "images out, or accept uncaptioned images with --config.data.captions=optional"
        )
    return source


# Each branch imports its own source, so a missing optional package fails only the source that needs it.
def _open_table(survey: Survey, data: DataConfig, storage: Storage, required: bool, filtered: bool) -> Source:
    path = survey.path
    if survey.kind == "arrayrecord":
        from gigagan_jax.data.sources.array_record import ArrayRecordSource

        return ArrayRecordSource(path, storage=storage, caption_required=required)
    keys: dict[str, Any] = {
        "caption_keys": data.caption_keys,
        "caption_required": required,
        "image_key": data.image_key,
        "label_key": data.label_key,
    }
    if survey.kind == "parquet":
        from gigagan_jax.data.sources.parquet import ParquetSource

        if filtered:
            paths = storage.expand_pattern(path, (".parquet",))
            keys["rows"], keys["filter_report"] = filters.select_parquet_rows(paths, storage, data.filters)
        return ParquetSource(path, storage=storage, **keys)
    if survey.kind == "arrow":
        from gigagan_jax.data.sources.arrow import ArrowSource

        return ArrowSource(path, split=data.split, **keys)
    if survey.kind == "hub":
        from gigagan_jax.data.sources.hub import HubSource

        return HubSource(path, split=data.split, **keys)
    from gigagan_jax.data.sources.tfds import TfdsSource

    return TfdsSource(path, split=data.split, **keys)
