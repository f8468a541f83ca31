"""Source of Arrow files as Hugging Face `datasets` writes them: `save_to_disk` and its cache. Needs pyarrow alone."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources.arrow_files import ArrowFiles, find_arrow_files
from gigagan_jax.data.sources.parquet_schema import class_names_of, format_columns, is_image
from gigagan_jax.data.sources.table import DAMAGE, LruCache, TableSource, check_columns, explain_damage
from gigagan_jax.data.storage import Storage

_log = logging.getLogger(__name__)
# Files of which a process keeps the record batches. They are mapped, so they take address space, not memory.
_OPEN_FILES = 256
# How a file for random access begins; a stream has no such mark.
_FILE_MAGIC = b"ARROW1"


class ArrowSource(TableSource):
    """Rows of Arrow files, mapped into memory: a read takes the bytes of one row from its record batch.

    A record batch that is damaged or gone makes bad examples (`record_batch_corrupt`).

    Args:
      path: a folder that `save_to_disk` wrote, one of the cache of `datasets`, a file, or a pattern; on a local disk.
      split: which split, where there are several.
      image_key: column with the images, as `ParquetSource` takes it.
      caption_keys: columns with captions, text or lists of text.
      label_key: column with the class.
      caption_required: if True, an example without a caption is a bad example.
      files: instead of those found at `path`.
      rows: int [n], the rows to use, counted through all files; None: all.

    Attributes:
      paths: the files, in their order.
      split: name of the split; "" where the files have none.
      splits: names of all splits.

    Raises:
      UserError: there is no file or no row, a file is damaged, a column is missing or of another type, or the split is
        not there.
    """

    _kind, _damaged_block = "arrow", "record_batch_corrupt"
    _wrong_rows = ", but its order names others: save the data set again"

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        image_key: str = "",
        caption_keys: Sequence[str] = (),
        label_key: str = "label",
        caption_required: bool = True,
        files: ArrowFiles | None = None,
        rows: np.ndarray | None = None,
    ):
        super().__init__(Storage(), caption_required)
        files = files or find_arrow_files(path, split)
        self.paths, self.split, self.splits = list(files.paths), files.split, files.splits
        schema, _ = _open_batches(self._storage, self.paths[0])
        columns = self._choose_columns(schema, self.paths[0], image_key, caption_keys, label_key)
        # Files without metadata have the names of their classes in dataset_info.json.
        self.classes = self.classes or class_names_of(files.features, self._label_key)
        # Headers of all files are read at the start: they give the rows, and damage shows here.
        lengths = [_batch_lengths(self._storage, file, columns) for file in self.paths]
        self._place_rows(path, lengths, rows if rows is not None else self._read_indices(files.indices))
        self._reset_caches()

    def _read_indices(self, indices: Sequence[str]) -> np.ndarray | None:
        """Reads the order that `select` or `shuffle` left beside the data."""
        if not indices:
            return None
        parts = []
        for file in indices:
            schema, batches = _open_batches(self._storage, file)
            if len(schema) != 1 or str(schema.types[0]) not in ("uint64", "int64", "uint32", "int32"):
                raise UserError(f"{file} is no order of rows (one column of integers): {format_columns(schema)}")
            if any(b.column(0).null_count for b in batches):
                raise UserError(f"{file} is no order of rows: it has nulls; save the data set again")
            parts += [np.asarray(b.column(0)).astype(np.int64) for b in batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _reset_caches(self) -> None:
        self._open = LruCache(_OPEN_FILES)
        # (file, batch) that were found sound.
        self._sound: set[tuple[int, int]] = set()

    def __getstate__(self):
        # Mapped files and locks belong to one process.
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_sound")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset_caches()

    def _read_row(self, i: int, columns: list[str]) -> dict[str, Any]:
        file, batch, place, _ = self._locate_row(i)
        path = self.paths[file]
        try:
            batches = self._open.get_or_load(file, lambda: _open_batches(self._storage, path)[1], lambda b: 1)
            table = batches[batch]
            # Once for each batch and process: a check reads all of its offsets.
            if (file, batch) not in self._sound:
                _check_batch(table, self._columns)
                self._sound.add((file, batch))
        # IndexError, KeyError: the file was replaced after the start.
        except _damage_errors() as e:
            raise BadExample(self._damaged_block, f"{path}, record batch {batch}: {e}") from None
        return self._take_row(table, place, columns, path)


def _damage_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, UserError, OSError, *DAMAGE)


def _open_batches(storage: Storage, path: str) -> tuple[Any, list[Any]]:
    """Maps a file, a stream or one for random access: (schema, record batches). Raises UserError."""
    import pyarrow
    import pyarrow.ipc

    try:
        mapped = pyarrow.memory_map(path)
        if mapped.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            reader = pyarrow.ipc.open_file(mapped)
            batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
        else:
            mapped.seek(0)
            reader = pyarrow.ipc.open_stream(mapped)
            # Only the headers of the batches are read: their data stay on the disk.
            batches = list(reader)
        format_columns(reader.schema)
        # Names within structs too are decoded on access, and raise here if they are not UTF-8.
        for field in reader.schema:
            is_image(field.type)
        return reader.schema, batches
    except _damage_errors() as e:
        raise UserError(f"{path} cannot be read as Arrow: {explain_damage(storage, path, e)}") from None


def _batch_lengths(storage: Storage, path: str, columns: dict[str, Callable[[Any], bool]]) -> list[int]:
    """Lengths of the batches of a file. Raises UserError if columns differ from `columns`."""
    schema, batches = _open_batches(storage, path)
    check_columns(schema, columns, path)
    return [b.num_rows for b in batches]


def _check_batch(batch: Any, columns: Sequence[str]) -> None:
    """Raises ArrowException where lengths and offsets lead out of a batch: reading them would end the process."""
    import pyarrow

    for name in columns:
        column = batch.column(name)
        # Lengths first: a cast of a column of negative length ends the process.
        column.validate()
        try:
            # Reads offsets and texts, not images.
            column.validate(full=True)
        except pyarrow.ArrowInvalid:
            # A text that is not UTF-8 is one bad example, not a bad batch: offsets are checked without decoding.
            column.cast(_without_text(column.type)).validate(full=True)


def _without_text(kind: Any) -> Any:
    """A type with bytes in the place of texts."""
    import pyarrow
    from pyarrow import types

    # Arrow casts a text to bytes without looking at it.
    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_list(kind):
        return pyarrow.list_(_without_text(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(_without_text(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([f.with_type(_without_text(f.type)) for f in kind])
    return kind
