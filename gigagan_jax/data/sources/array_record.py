"""Source of the ArrayRecord files that `tools/prepare_data.py convert` writes."""

import functools
import os
import re
from pathlib import Path

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.source import Source, identity_of, short_names
from gigagan_jax.data.sources import array_record_format, tf_example
from gigagan_jax.data.storage import Storage, expand_braces, is_local, local_path

# a.array_record, and TFDS's a-train.array_record-00000-of-00012
# Upper and lower case are equal, as in `data.survey`.
_FILE = re.compile(r"(?P<set>.+)\.array_record(-(?P<number>\d{5,})-of-(?P<count>\d{5,}))?", re.IGNORECASE)


class ArrayRecordSource(Source):
    """Our own ArrayRecord files. TfdsSource reads those of TFDS, whose features differ.

    Args:
      path: a local file, a folder, or a pattern for `Storage.expand_pattern`.
      storage: lists the files that match a pattern.
      caption_required: if True, an example without a caption is a bad example.

    Attributes:
      paths: the files, in their order.

    Raises:
      UserError: the path is an address; a file is missing, truncated or of another kind; a folder holds several data
        sets or lacks shards; the records have another format; there is no record.
    """

    def __init__(self, path: str, *, storage: Storage | None = None, caption_required: bool = True):
        self.paths = find_array_records(path, storage or Storage())
        self._caption_required = caption_required
        counts = array_record_format.count_all_records(self.paths)
        self._records = array_record_format.ShardedRecords(
            [array_record_format.FileSlice(p, 0, n) for p, n in zip(self.paths, counts, strict=True)]
        )
        self._names = short_names([Path(p).as_posix() for p in self.paths])
        if not len(self):
            raise UserError(f"{path} holds no example: its ArrayRecord files are all empty")
        # One record suffices: a file of another format has other features in every record.
        for values in array_record_format.sample_features(self._records, 1):
            if values and "image" not in values:
                raise UserError(
                    f"{path} holds features {', '.join(sorted(values))} and no image: not written by "
                    "tools/prepare_data.py; data of TFDS is read with config.data.source=tfds"
                )

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def has_labels(self) -> bool:
        """Whether any of up to 16 sampled examples has a label."""
        # Label -1 stands for unknown, so the feature is there in unlabelled files too.
        labels = (tf_example.first_value(v, "label", int) for v in array_record_format.sample_features(self._records))
        return any(label is not None and label >= 0 for label in labels)

    def read(self, i: int) -> Record:
        """Reads example i, without blank captions.

        Raises BadExample with cause `record_corrupt` (the file is damaged there), `record_undecodable`,
        `caption_undecodable` (not UTF-8), `caption_missing` or `caption_empty` (no text in it).
        """
        # The stored name is not used: `name` must answer without reading the record.
        name = self.name(i)
        stored = tf_example.deserialize_record(self._records.read(i), name)
        captions = tuple(c for c in stored.captions if c.strip())
        if self._caption_required and not captions:
            raise BadExample("caption_empty" if stored.captions else "caption_missing", f"stored name: {stored.name}")
        return Record(stored.image, captions, stored.label, name)

    def name(self, i: int) -> str:
        """File and place in it: "images-train.array_record-00000-of-00012:345"."""
        # The index counts within the file, so names stay when files are added.
        part, index = self._records.locate_record(i)
        return f"{self._names[part]}:{index}"

    def identity(self) -> str:
        return self._identity_hash

    @functools.cached_property
    def _identity_hash(self) -> str:
        # Names and counts only, so a moved data set keeps its identity.
        parts = zip(self._names, self._records.parts, strict=True)
        return identity_of("arrayrecord", (f"{name}:{part.take}" for name, part in parts))


def find_array_records(path: str, storage: Storage) -> list[str]:
    """Lists the ArrayRecord files of a path.

    Args:
      path: as for ArrayRecordSource.
      storage: lists the files that match a pattern.

    Returns:
      paths of the files, sorted within each alternative of the pattern

    Raises:
      UserError: as ArrayRecordSource, except for the contents of the files.
    """
    paths: list[str] = []
    # Each alternative of the braces may be a file, a folder or a pattern.
    for alternative in expand_braces(path):
        # The ArrayRecord package opens its files itself and knows no fsspec.
        if not is_local(alternative):
            raise UserError(
                f"{alternative}: ArrayRecord files are read from local disks only; copy them there, or read tars from the bucket"
            )
        alternative = local_path(alternative)
        # A star also matches temporary files and metadata, so the names are checked again.
        if any(c in alternative for c in "*?["):
            matches = [m for m in storage.expand_pattern(alternative) if _FILE.fullmatch(os.path.basename(m))]
            if not matches:
                raise UserError(f"{alternative} matches no ArrayRecord file (.array_record); check config.data.path")
            paths += matches
        elif os.path.isdir(alternative):
            paths += _list_shards(alternative)
        elif not os.path.exists(alternative):
            raise UserError(
                f"{alternative or 'config.data.path'} is not there: expected .array_record files, or a folder of them"
            )
        else:
            paths.append(alternative)
    return paths


def _list_shards(folder: str) -> list[str]:
    try:
        files = {name: m for name in os.listdir(folder) if (m := _FILE.fullmatch(name))}
    except OSError as e:
        raise UserError(f"{folder} cannot be listed: {e.strerror}; check its permissions") from None
    if not files:
        raise UserError(f"{folder} holds no ArrayRecord file (.array_record); check config.data.path")
    # Every shard states the number of shards, so one data set gives one pair.
    sharded = {(m["set"], int(m["count"])) for m in files.values() if m["count"]}
    if len(sharded) > 1:
        examples = " and ".join(f"{name}.array_record-*-of-{count:05d}" for name, count in sorted(sharded)[:3])
        raise UserError(f"{folder} holds several data sets: name one, such as {examples}, as config.data.path")
    for _, count in sharded:
        present = {int(m["number"]) for m in files.values() if m["count"]}
        # A missing shard would silently shrink the data set and change its order.
        missing = sorted(set(range(count)) - present)
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {count} shards, the first is {missing[0]:05d}-of-{count:05d}: "
                "copy them too, or name the files you want as config.data.path"
            )
    return [os.path.join(folder, name) for name in sorted(files)]
