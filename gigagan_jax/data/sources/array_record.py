"""ArrayRecord files as `tools/prepare_data.py convert` writes them."""

import functools
import os
import re
from pathlib import Path

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.source import Source, identity_of, short_names
from gigagan_jax.data.sources import array_record_format
from gigagan_jax.data.storage import Storage, braces, is_local, local

# a.array_record, and TFDS's a-train.array_record-00000-of-00012
_FILE = re.compile(r"(?P<set>.+)\.array_record(-(?P<number>\d{5,})-of-(?P<count>\d{5,}))?", re.IGNORECASE)


class ArrayRecordSource(Source):
    """Our own ArrayRecord files; those of TFDS with other features are read by TfdsSource.

    Args:
      path: files: one, a folder, or a pattern for `Storage.expand`. Local: ArrayRecord opens its files itself.
      storage: to list with.
      caption_required: whether an example without a caption is bad; otherwise it has none.

    Attributes:
      paths: the files, in their order.

    Raises:
      UserError: an address; no such file there, one that is missing, cut short or of another kind, a folder with several
        data sets or with only some of a set's shards; examples of another format; none at all.
    """

    def __init__(self, path: str, *, storage: Storage | None = None, caption_required: bool = True):
        self.paths = find_files(path, storage or Storage())
        self._caption_required = caption_required
        counts = array_record_format.count_all(self.paths)
        self._records = array_record_format.Records(
            [array_record_format.Part(p, 0, n) for p, n in zip(self.paths, counts, strict=True)]
        )
        self._names = short_names([Path(p).as_posix() for p in self.paths])
        if not len(self):
            raise UserError(f"{path} holds no example: its ArrayRecord files are all empty")
        for values in array_record_format.samples(self._records, 1):
            if values and "image" not in values:
                raise UserError(
                    f"{path} holds features {', '.join(sorted(values))} and no image: not written by "
                    "tools/prepare_data.py; data of TFDS is read with config.data.source=tfds"
                )

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def has_labels(self) -> bool:
        """Whether examples have labels, judged by some of them."""
        labels = (array_record_format.first(v, "label", int) for v in array_record_format.samples(self._records))
        return any(label is not None and label >= 0 for label in labels)

    def read(self, i: int) -> Record:
        """Example i, without blank captions. The name stored in it is not used: it is not known without reading.

        Raises BadExample with cause `record_corrupt` (the file is damaged there), `record_undecodable`,
        `caption_undecodable` (not UTF-8), `caption_missing` or `caption_empty` (no text in it).
        """
        name = self.name(i)
        stored = array_record_format.decode(self._records.read(i), name)
        captions = tuple(c for c in stored.captions if c.strip())
        if self._caption_required and not captions:
            raise BadExample("caption_empty" if stored.captions else "caption_missing", f"stored name: {stored.name}")
        return Record(stored.image, captions, stored.label, name)

    def name(self, i: int) -> str:
        """File and place in it: "images-train.array_record-00000-of-00012:345"."""
        part, index = self._records.place(i)
        return f"{self._names[part]}:{index}"

    def identity(self) -> str:
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        parts = zip(self._names, self._records.parts, strict=True)
        return identity_of("arrayrecord", (f"{name}:{part.take}" for name, part in parts))


def find_files(path: str, storage: Storage) -> list[str]:
    """ArrayRecord files by path.

    Args:
      path: as for ArrayRecordSource.
      storage: to list with.

    Returns:
      their paths, sorted within each alternative of the pattern

    Raises:
      UserError: as ArrayRecordSource does, but for what is in the files.
    """
    found: list[str] = []
    for one in braces(path):
        if not is_local(one):
            raise UserError(
                f"{one}: ArrayRecord files are read from local disks only; copy them there, or read tars from the bucket"
            )
        one = local(one)
        if any(c in one for c in "*?["):
            matches = [m for m in storage.expand(one) if _FILE.fullmatch(os.path.basename(m))]
            if not matches:
                raise UserError(f"{one} matches no ArrayRecord file (.array_record); check config.data.path")
            found += matches
        elif os.path.isdir(one):
            found += _in_folder(one)
        elif not os.path.exists(one):
            raise UserError(
                f"{one or 'config.data.path'} is not there: expected .array_record files, or a folder of them"
            )
        else:
            found.append(one)
    return found


def _in_folder(folder: str) -> list[str]:
    try:
        files = {name: m for name in os.listdir(folder) if (m := _FILE.fullmatch(name))}
    except OSError as e:
        raise UserError(f"{folder} cannot be listed: {e.strerror}; check its permissions") from None
    if not files:
        raise UserError(f"{folder} holds no ArrayRecord file (.array_record); check config.data.path")
    sharded = {(m["set"], int(m["count"])) for m in files.values() if m["count"]}
    if len(sharded) > 1:
        named = " and ".join(f"{name}.array_record-*-of-{count:05d}" for name, count in sorted(sharded)[:3])
        raise UserError(f"{folder} holds several data sets: name one, such as {named}, as config.data.path")
    for _, count in sharded:
        there = {int(m["number"]) for m in files.values() if m["count"]}
        missing = sorted(set(range(count)) - there)
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {count} shards, the first is {missing[0]:05d}-of-{count:05d}: "
                "copy them too, or name the files you want as config.data.path"
            )
    return [os.path.join(folder, name) for name in sorted(files)]
