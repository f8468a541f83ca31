"""Sources of tables: Parquet and Arrow files with a column of images or paths, as Hugging Face datasets write them."""

import abc
import collections
import concurrent.futures
import functools
import hashlib
import posixpath
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.source import Source, identity_of, short_names
from gigagan_jax.data.sources.parquet_schema import (
    choose_caption_keys,
    choose_image_key,
    choose_label_key,
    column_type,
    format_columns,
    is_image,
    is_label,
    is_text,
    read_class_names,
)
from gigagan_jax.data.sources.tf_example import label_of
from gigagan_jax.data.storage import Storage, is_local, join_path

# Exceptions that damaged files raise, beside those of the disk and of Arrow.
DAMAGE = (ValueError, LookupError, ArithmeticError, MemoryError)
# How a pointer of Git LFS begins, which a clone has in place of a large file.
_LFS_POINTER = b"version https://git-lfs"


class TableSource(Source):
    """Rows of tables as examples. A subclass reads rows; this class finds images, captions and labels in them.

    A file consists of blocks that are read whole: row groups of Parquet, record batches of Arrow.

    Args:
      storage: reads image files that a row names.
      caption_required: if True, an example without a caption is a bad example.

    Attributes:
      paths: the files, in their order.
      has_labels: whether there is a column of labels.
      classes: names of the classes in the order of the labels, if Hugging Face datasets wrote them.
    """

    # Part of the identity.
    _kind: ClassVar[str]
    # Cause of a bad example whose block is damaged, or gone.
    _damaged_block: ClassVar[str]
    # Said of rows that the files do not have.
    _wrong_rows: ClassVar[str]
    paths: list[str]

    def __init__(self, storage: Storage | None, caption_required: bool):
        # Paths in a table may be addresses.
        self._storage = storage or Storage()
        self._caption_required = caption_required
        self.has_labels = False
        self.classes: tuple[str, ...] = ()

    def _choose_columns(
        self, schema: Any, path: str, image_key: str, caption_keys: Sequence[str], label_key: str
    ) -> dict[str, Callable[[Any], bool]]:
        """Chooses the columns by the schema of the first file.

        Returns:
          {column: whether another file's type of it fits}

        Raises:
          UserError: a column is missing or of another type.
        """
        self._image_key = choose_image_key(schema, image_key, path)
        self._caption_keys = choose_caption_keys(schema, tuple(caption_keys), self._caption_required, path)
        self._label_key = choose_label_key(schema, label_key, path)
        self.has_labels = bool(self._label_key)
        self.classes = read_class_names(schema, self._label_key)
        columns: dict[str, Callable[[Any], bool]] = {self._image_key: is_image}
        columns |= dict.fromkeys(self._caption_keys, is_text)
        columns |= {self._label_key: is_label} if self._label_key else {}
        self._columns = list(columns)
        return columns

    @abc.abstractmethod
    def _read_row(self, i: int, columns: list[str]) -> dict[str, Any]:
        """Reads some columns of row i. Raises BadExample."""

    def _place_rows(self, path: str, blocks: Sequence[Sequence[int]], rows: np.ndarray | None) -> None:
        """Notes where each row lies.

        Args:
          path: as the user named the files.
          blocks: the number of rows of each block, for each file.
          rows: int [n], the rows to use, counted through all files; None: all.

        Raises:
          UserError: there is no row, or the files do not have all of `rows`.
        """
        self._names = short_names(self.paths)
        self._block_starts = np.cumsum([0, *(n for file in blocks for n in file)], dtype=np.int64)
        self._file_blocks = np.cumsum([0, *map(len, blocks)], dtype=np.int64)
        self._rows, total = rows, int(self._block_starts[-1])
        if not len(self):
            raise UserError(f"{path}: " + ("the files have no row" if rows is None else "no example is left"))
        # The largest and the smallest row decide, so the check takes no memory.
        if rows is not None and not 0 <= int(np.min(rows)) <= int(np.max(rows)) < total:
            raise UserError(f"{path} has {total} rows{self._wrong_rows}")

    def __len__(self) -> int:
        return int(self._block_starts[-1]) if self._rows is None else len(self._rows)

    def _locate_row(self, i: int) -> tuple[int, int, int, int]:
        """Returns the place of row i: file, block in the file, row in the block, row in the file."""
        row = i if self._rows is None else int(self._rows[i])
        # side="right" skips empty blocks and files.
        block = int(np.searchsorted(self._block_starts, row, side="right")) - 1
        file = int(np.searchsorted(self._file_blocks, block, side="right")) - 1
        first = int(self._file_blocks[file])
        return file, block - first, row - int(self._block_starts[block]), row - int(self._block_starts[first])

    def name(self, i: int) -> str:
        """File and row: "train-00000.parquet:123"."""
        file, _, _, row = self._locate_row(i)
        return f"{self._names[file]}:{row}"

    def identity(self) -> str:
        return self._identity_hash

    @functools.cached_property
    def _identity_hash(self) -> str:
        ends = self._block_starts[self._file_blocks]
        # Names and row counts, not the folder: a moved data set stays the same.
        names = [f"{name}:{n}" for name, n in zip(self._names, np.diff(ends).tolist(), strict=True)]
        # Other rows, or another order of them, make another data set. Little endian on every machine.
        if self._rows is not None:
            names.append(hashlib.sha256(np.ascontiguousarray(self._rows, "<i8").tobytes()).hexdigest())
        return identity_of(self._kind, names)

    def read(self, i: int) -> Record:
        """Reads row i.

        Raises BadExample with cause `image_missing` (null), `image_unreadable` (its file), `unsafe_name` (a relative
        path that leaves the folder), `caption_missing`, `caption_empty`, `caption_undecodable` (not UTF-8),
        `label_out_of_range`, or a cause of the kind of file for one that is damaged there, or gone.
        """
        row = self._read_row(i, self._columns)
        captions = self._extract_captions(row)
        # Relative paths of images start at the folder of the file.
        image = self._load_image(row[self._image_key], self.paths[self._locate_row(i)[0]])
        label = label_of(row[self._label_key] if self._label_key else None)
        return Record(image, captions, label, self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        columns = list(self._caption_keys)
        # Only the caption columns are read: images make up nearly all bytes.
        return self._extract_captions(self._read_row(i, columns) if columns else {})

    def _extract_captions(self, row: dict[str, Any]) -> tuple[str, ...]:
        stored: list[str] = []
        for key in self._caption_keys:
            # A column is text or a list of texts; nulls occur in both.
            value = row[key]
            stored += [v for v in (value if isinstance(value, list) else [value]) if v is not None]
        captions = tuple(c.strip() for c in stored if c.strip())
        if self._caption_required and not captions:
            raise BadExample("caption_empty" if stored else "caption_missing", f"null or blank {self._caption_keys}")
        return captions

    def _load_image(self, value: Any, file: str) -> bytes:
        # Hugging Face datasets: {bytes, path}. The path is only a name if bytes are present.
        if isinstance(value, dict):
            data = value.get("bytes")
            value = value.get("path") if data is None else data
        if value is None or value == "":
            raise BadExample("image_missing", f"null {self._image_key}")
        if isinstance(value, bytes):
            return value
        path = resolve_image_path(value, file)
        try:
            return self._storage.read(path)
        # ValueError: the path holds a zero byte.
        except (OSError, ValueError) as e:
            raise BadExample("image_unreadable", f"{value}: {first_line(e)}") from None

    def _take_row(self, table: Any, place: int, columns: list[str], file: str) -> dict[str, Any]:
        """Takes some columns of a row out of its block. Raises BadExample."""
        row = {}
        for name in columns:
            try:
                row[name] = table.column(name)[place].as_py()
            except (UnicodeDecodeError, LookupError) as e:
                # Of an image's struct, only the path is text.
                cause = "image_unreadable" if name == self._image_key else "caption_undecodable"
                # The file was replaced after the start by one with fewer rows, or other columns.
                cause = self._damaged_block if isinstance(e, LookupError) else cause
                raise BadExample(cause, f"{file}, column {name}: {e}") from None
        return row


def check_columns(schema: Any, columns: dict[str, Callable[[Any], bool]], path: str) -> None:
    """Raises UserError if a file's columns differ from those of the first file, {column: whether a type fits}."""
    for name, fits in columns.items():
        if schema.names.count(name) > 1:
            raise UserError(
                f"{path} has several columns {name!r}: leave one of them; columns: {format_columns(schema)}"
            )
        if name not in schema.names or not fits(column_type(schema, name)):
            raise UserError(
                f"{path} lacks the column {name!r} of the first file, or has it as another type: {format_columns(schema)}"
            )


def resolve_image_path(path: str, file: str) -> str:
    """Resolves an image's path against the folder of its table. Raises BadExample with cause `unsafe_name`."""
    if not is_local(path) or path.startswith(("/", "file://")):
        return path
    # normpath first: a/../../b leaves the folder too.
    inside = posixpath.normpath(path)
    if inside == ".." or inside.startswith("../"):
        raise BadExample("unsafe_name", path)
    return join_path(posixpath.dirname(file) or ".", inside)


def first_line(e: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    return (str(e).splitlines() or [type(e).__name__])[0]


def explain_damage(storage: Storage, path: str, error: Exception) -> str:
    """Says in one line why a file cannot be read: a pointer of Git LFS, or the error's own words."""
    try:
        if storage.read(path, 0, len(_LFS_POINTER)) == _LFS_POINTER:
            return f"it is a pointer of Git LFS, not the data: run `git lfs pull` in {posixpath.dirname(path) or '.'}"
    # The same error again: the file is not there.
    except OSError:
        pass
    return getattr(error, "strerror", None) or first_line(error)


class LruCache:
    """Least-recently-used cache, limited in size; the newest value always stays. Threads share one load of a key."""

    def __init__(self, most: int):
        self._most, self._bytes = most, 0
        self._lock = threading.Lock()
        self._futures: collections.OrderedDict[Hashable, concurrent.futures.Future] = collections.OrderedDict()
        self._sizes: dict[Hashable, int] = {}

    def get_cached(self, key: Hashable) -> Any:
        """Returns the value of a key that is loaded or being loaded, or None."""
        with self._lock:
            future = self._futures.get(key)
            if future is None:
                return None
            self._futures.move_to_end(key)
        return future.result()

    def get_or_load(self, key: Hashable, load: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """Returns the value of a key, loading it if necessary. An exception of `load` reaches all waiting threads."""
        with self._lock:
            future = self._futures.get(key)
            if future is not None:
                self._futures.move_to_end(key)
            else:
                own_future = self._futures[key] = concurrent.futures.Future()
        # Waiting happens outside the lock, so that other keys stay available.
        if future is not None:
            return future.result()
        try:
            value = load()
        # Removed, so that the next read tries again; set_exception wakes the threads that wait now.
        except BaseException as e:
            with self._lock:
                del self._futures[key]
            own_future.set_exception(e)
            raise
        with self._lock:
            self._sizes[key] = size(value)
            self._bytes += self._sizes[key]
            while self._bytes > self._most:
                # The least recently used value goes first. Values still being loaded have no size yet and stay.
                oldest = next((k for k in self._futures if k in self._sizes and k != key), None)
                if oldest is None:
                    break
                del self._futures[oldest]
                self._bytes -= self._sizes.pop(oldest)
        own_future.set_result(value)
        return value
