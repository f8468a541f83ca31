"""Source of Parquet files with a column of images or paths, as Hugging Face datasets and LAION write them."""

import collections
import concurrent.futures
import functools
import hashlib
import logging
import posixpath
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.progress import ProgressBar
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

_log = logging.getLogger(__name__)
# Bytes of decoded row groups that a source keeps in each process, and of footers.
_KEPT_BYTES = 256 << 20
_KEPT_FOOTER_BYTES = 16 << 20
# Bytes of a row group from which on a warning is logged: a group is read whole for any of its rows.
_LARGE_GROUP = 64 << 20
# Footers of buckets cost requests, so more threads than cores help.
_OPENING_THREADS = 16
# Exceptions that damaged files raise, beside those of the disk and of Arrow.
_DAMAGE = (ValueError, LookupError, ArithmeticError, MemoryError)


class ParquetSource(Source):
    """Rows of Parquet files as examples. A read loads the whole row group; the latest groups are cached.

    Args:
      path: files: one, a folder, or a pattern for `Storage.expand_pattern`; buckets too.
      storage: reads the files.
      image_key: column with the images: bytes, a struct of bytes and path, or a path. A path is absolute, an address,
        or relative to the folder of the Parquet file. Empty: the first of IMAGE_KEYS that is present.
      caption_keys: columns with captions, text or lists of text. Empty: the first of CAPTION_KEYS that is present.
      label_key: column with the class.
      caption_required: if True, an example without a caption is a bad example.
      rows: int [n], the rows to use, counted through all files; None: all.
      filter_report: of the filter that chose `rows`.

    Attributes:
      paths: the files, in their order.
      has_labels: whether there is a column of labels.
      classes: names of the classes in the order of the labels, if Hugging Face datasets wrote them.

    Raises:
      UserError: there is no file or no row, a file is damaged, or a column is missing or of another type.
    """

    def __init__(
        self,
        path: str,
        *,
        storage: Storage | None = None,
        image_key: str = "",
        caption_keys: Sequence[str] = (),
        label_key: str = "label",
        caption_required: bool = True,
        rows: "np.ndarray | None" = None,
        filter_report: dict[str, Any] | None = None,
    ):
        self._storage = storage or Storage()
        self.filter_report = filter_report
        self.paths = self._storage.expand_pattern(path, (".parquet",))
        self._caption_required = caption_required
        # The first file decides the columns; `_groups_of` checks that all others have them.
        schema, _ = _read_row_groups(self._storage, self.paths[0])
        self._image_key = choose_image_key(schema, image_key, self.paths[0])
        self._caption_keys = choose_caption_keys(schema, tuple(caption_keys), caption_required, self.paths[0])
        self._label_key = choose_label_key(schema, label_key, self.paths[0])
        self.has_labels = bool(self._label_key)
        self.classes = read_class_names(schema, self._label_key)
        columns = {self._image_key: is_image, **dict.fromkeys(self._caption_keys, is_text)}
        self._index_row_groups(columns | ({self._label_key: is_label} if self._label_key else {}))
        self._rows = rows
        self._names = short_names(self.paths)
        if not len(self):
            raise UserError(f"{path}: " + ("the files have no row" if rows is None else "no example is left"))
        # Chosen rows may come from a filter that ran before the files changed.
        # The largest and the smallest row decide, so the check takes no memory.
        if rows is not None and not 0 <= int(np.min(rows)) <= int(np.max(rows)) < self._group_starts[-1]:
            raise UserError(
                f"{path} has {self._group_starts[-1]} rows: the chosen ones are not among them; filter again"
            )
        self._reset_caches()

    def _index_row_groups(self, columns: dict[str, Callable[[Any], bool]]) -> None:
        """Reads all footers: checks the columns, and notes the start and the size of each row group."""
        self._columns = list(columns)
        task = functools.partial(_groups_of, self._storage, columns)
        progress = ProgressBar("reading Parquet footers", len(self.paths))
        sizes: list[int] = []
        counts: list[int] = []
        # Index of the first row group of each file.
        firsts = [0]
        with concurrent.futures.ThreadPoolExecutor(_OPENING_THREADS) as pool:
            # map keeps the order of the files, whichever footer arrives first.
            for groups in pool.map(task, self.paths):
                counts += [n for n, _ in groups]
                sizes += [size for _, size in groups]
                firsts.append(len(counts))
                progress.step()
        self._group_starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._file_groups = np.array(firsts)
        if sizes and max(sizes) > _LARGE_GROUP:
            _log.warning(
                "%s: row groups of up to %d MB, each read whole for any of its rows: random access will be slow. Write smaller "
                "ones (pyarrow.parquet.write_table(table, file, row_group_size=100)), or use tools/prepare_data.py convert",
                self.paths[int(np.searchsorted(self._file_groups, int(np.argmax(sizes)), side="right")) - 1],
                max(sizes) >> 20,
            )

    def _reset_caches(self) -> None:
        self._tables = _LruCache(_KEPT_BYTES)
        self._footers = _LruCache(_KEPT_FOOTER_BYTES)

    def __getstate__(self):
        # Caches hold locks and up to 256 MiB: a worker process starts with empty ones.
        return {k: v for k, v in self.__dict__.items() if k not in ("_tables", "_footers")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset_caches()

    def __len__(self) -> int:
        return int(self._group_starts[-1]) if self._rows is None else len(self._rows)

    def _locate_row(self, i: int) -> tuple[int, int, int, int]:
        """Returns the place of row i: file, row group in the file, row in the group, row in the file."""
        row = i if self._rows is None else int(self._rows[i])
        # side="right" skips empty row groups and files.
        group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
        file = int(np.searchsorted(self._file_groups, group, side="right")) - 1
        first = int(self._file_groups[file])
        return file, group - first, row - int(self._group_starts[group]), row - int(self._group_starts[first])

    def name(self, i: int) -> str:
        """File and row: "train-00000.parquet:123"."""
        file, _, _, row = self._locate_row(i)
        return f"{self._names[file]}:{row}"

    def identity(self) -> str:
        return self._identity_hash

    @functools.cached_property
    def _identity_hash(self) -> str:
        ends = self._group_starts[self._file_groups]
        # The identity depends on names and row counts, not on the folder, so a moved data set stays the same.
        names = [f"{name}:{n}" for name, n in zip(self._names, np.diff(ends).tolist(), strict=True)]
        if self._rows is not None:
            # A filter that leaves other rows makes another data set. Little endian on every machine.
            names.append(hashlib.sha256(np.ascontiguousarray(self._rows, "<i8").tobytes()).hexdigest())
        return identity_of("parquet", names)

    def read(self, i: int) -> Record:
        """Reads row i.

        Raises BadExample with cause `image_missing` (null), `image_unreadable` (its file), `unsafe_name` (a relative
        path that leaves the folder), `caption_missing`, `caption_empty`, `caption_undecodable` (not UTF-8),
        `label_out_of_range` or `row_group_corrupt` (the Parquet file is damaged there, or gone).
        """
        row = self._read_row(i, self._columns)
        captions = self._extract_captions(row)
        image = self._load_image(row[self._image_key], self.paths[self._locate_row(i)[0]])
        label = label_of(row[self._label_key] if self._label_key else None)
        return Record(image, captions, label, self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        columns = list(self._caption_keys)
        # Only the caption columns are read: images make up nearly all bytes.
        return self._extract_captions(self._read_row(i, columns) if columns else {})

    def _read_row(self, i: int, columns: list[str]) -> dict[str, Any]:
        file, group, place, _ = self._locate_row(i)
        # A cached table with all columns serves a read of captions too.
        table = self._tables.get_cached((file, group, *self._columns))
        if table is None:
            load = functools.partial(self._load_row_group, self.paths[file], group, columns)
            table = self._tables.get_or_load((file, group, *columns), load, lambda t: t.nbytes)
        row = {}
        for name in columns:
            try:
                row[name] = table.column(name)[place].as_py()
            # IndexError: the file was replaced after the start by one with fewer rows.
            except (UnicodeDecodeError, IndexError) as e:
                cause = "image_unreadable" if name == self._image_key else "caption_undecodable"
                cause = "row_group_corrupt" if isinstance(e, IndexError) else cause
                raise BadExample(cause, f"{self.paths[file]}, column {name}: {e}") from None
        return row

    def _load_row_group(self, path: str, group: int, columns: list[str]) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            # Without a given footer, pyarrow reads it again for every row group.
            footer = self._footers.get_or_load(
                path, lambda: _read_footer(self._storage, path)[1], lambda f: f.serialized_size
            )
            with self._storage.open(path) as opened:
                # With pre_buffer, Arrow's own threads hold the Python file. One that lets go of it while Python
                # shuts down aborts the process.
                file = pyarrow.parquet.ParquetFile(opened, metadata=footer, pre_buffer=False)
                # Reads already run in many threads.
                return file.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pyarrow.ArrowException, *_DAMAGE) as e:
            raise BadExample("row_group_corrupt", f"{path}, row group {group}: {_first_line(e)}") from None

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
        path = _resolve_image_path(value, file)
        try:
            return self._storage.read(path)
        # ValueError: the path holds a zero byte.
        except (OSError, ValueError) as e:
            raise BadExample("image_unreadable", f"{value}: {_first_line(e)}") from None


class _LruCache:
    """Least-recently-used cache, limited in bytes; the newest value always stays. Threads share one load of a key."""

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


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def _resolve_image_path(path: str, file: str) -> str:
    """Resolves an image's path against the folder of its Parquet file. Raises BadExample with cause `unsafe_name`."""
    if not is_local(path) or path.startswith(("/", "file://")):
        return path
    # normpath first: a/../../b leaves the folder too.
    inside = posixpath.normpath(path)
    if inside == ".." or inside.startswith("../"):
        raise BadExample("unsafe_name", path)
    return join_path(posixpath.dirname(file) or ".", inside)


def _read_footer(storage: Storage, path: str) -> tuple[Any, Any]:
    """Reads (Arrow schema, metadata) of a Parquet file. Raises OSError or ArrowException."""
    import pyarrow.parquet

    with storage.open(path) as opened:
        file = pyarrow.parquet.ParquetFile(opened)
        return file.schema_arrow, file.metadata


def _read_row_groups(storage: Storage, path: str) -> tuple[Any, list[tuple[int, int]]]:
    """Reads the Arrow schema and the (rows, decoded bytes) of each row group of a file. Raises UserError."""
    import pyarrow

    try:
        schema, footer = _read_footer(storage, path)
        # Names are decoded on access, so this raises here if one is not UTF-8.
        format_columns(schema)
        # Metadata of single columns is not read: if it is damaged, pyarrow 25 aborts the whole process.
        groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
        sizes = [(g.num_rows, g.total_byte_size) for g in groups]
        # A damaged footer may parse, with numbers that would send later reads to wrong rows.
        if any(n < 0 for n, _ in sizes) or sum(n for n, _ in sizes) != footer.num_rows:
            raise ValueError("its row groups do not add up to its rows")
    except (OSError, pyarrow.ArrowException, *_DAMAGE) as e:
        raise UserError(f"{path} cannot be read as Parquet: {getattr(e, 'strerror', None) or _first_line(e)}") from None
    return schema, sizes


def _groups_of(storage: Storage, columns: dict[str, Callable[[Any], bool]], path: str) -> list[tuple[int, int]]:
    """Lists (rows, decoded bytes) of each row group of a file. Raises UserError if columns differ from `columns`."""
    schema, groups = _read_row_groups(storage, path)
    for name, fits in columns.items():
        if schema.names.count(name) > 1:
            raise UserError(
                f"{path} has several columns {name!r}: leave one of them; columns: {format_columns(schema)}"
            )
        if name not in schema.names or not fits(column_type(schema, name)):
            raise UserError(
                f"{path} lacks the column {name!r} of the first file, or has it as another type: {format_columns(schema)}"
            )
    return groups
