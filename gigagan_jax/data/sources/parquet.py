"""Parquet files with a column of images, or of their paths, as Hugging Face datasets and LAION's tables have it."""

import collections
import concurrent.futures
import functools
import hashlib
import json
import logging
import posixpath
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.progress import Progress
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.source import Source, identity_of, short_names
from gigagan_jax.data.sources.array_record_format import label_of
from gigagan_jax.data.storage import Storage, is_local, join

_log = logging.getLogger(__name__)
IMAGE_KEYS = ("image", "jpg", "png", "webp", "image_bytes", "bytes", "image_path", "path", "file_name")
CAPTION_KEYS = ("caption", "captions", "text", "TEXT")
# Types by Arrow's names. A file whose values are all null may have nothing but nulls where others have text.
_BYTES = ("binary", "large_binary", "binary_view")
_TEXT = ("string", "large_string", "string_view")
_KEPT_BYTES = 256 << 20  # of row groups, for each source in each process
_KEPT_FOOTER_BYTES = 16 << 20
_LARGE_GROUP = 64 << 20  # bytes that are read for one example
_OPENING_THREADS = 16
# What Python or pyarrow may say of a damaged file, beside errors of the disk and of Arrow.
_DAMAGE = (ValueError, LookupError, ArithmeticError, MemoryError)


class ParquetSource(Source):
    """Rows of Parquet files as examples. Whole row groups are read, and the last ones kept.

    Args:
      path: files: one, a folder, or a pattern for `Storage.expand`; buckets too.
      storage: to read with.
      image_key: column with the images: bytes, a struct of bytes and path, or a path (absolute, an address, or relative to
        the folder of the Parquet file); empty: the first of IMAGE_KEYS that is there.
      caption_keys: columns with captions: text, or lists of it; empty: the first of CAPTION_KEYS that is there.
      label_key: column with the class.
      caption_required: whether an example without a caption is bad; otherwise it has none.
      rows: int [n], the rows to use, counted through all files; None: all.

    Attributes:
      paths: the files, in their order.
      has_labels: whether there is a column of labels.
      classes: their names in the order of the labels, if Hugging Face datasets wrote them.

    Raises:
      UserError: no file there, a damaged one, a column that is missing or of another type, no row.
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
    ):
        self._storage = storage or Storage()
        self.paths = self._storage.expand(path, (".parquet",))
        self._caption_required = caption_required
        schema, _ = _footer(self._storage, self.paths[0])
        self._image_key = _image_key(schema, image_key, self.paths[0])
        self._caption_keys = _caption_keys(schema, tuple(caption_keys), caption_required, self.paths[0])
        self._label_key = _label_key(schema, label_key, self.paths[0])
        self.has_labels = bool(self._label_key)
        self.classes = _class_names(schema, self._label_key)
        columns = {self._image_key: _is_image, **dict.fromkeys(self._caption_keys, _is_texts)}
        self._index(columns | ({self._label_key: _is_label} if self._label_key else {}))
        self._rows = rows
        self._names = short_names(self.paths)
        if not len(self):
            raise UserError(f"{path}: " + ("the files have no row" if rows is None else "no example is left"))
        if rows is not None and not 0 <= int(np.min(rows)) <= int(np.max(rows)) < self._group_starts[-1]:
            raise UserError(
                f"{path} has {self._group_starts[-1]} rows: the chosen ones are not among them; filter again"
            )
        self._fresh()

    def _index(self, columns: dict[str, Callable[[Any], bool]]) -> None:
        """Reads all footers: whether all columns are there, where each row group starts, and how large it is."""
        self._columns = list(columns)
        task = functools.partial(_groups_of, self._storage, columns)
        progress = Progress("reading Parquet footers", len(self.paths))
        sizes: list[int] = []
        counts: list[int] = []
        firsts = [0]  # of each file: its first row group
        with concurrent.futures.ThreadPoolExecutor(_OPENING_THREADS) as pool:
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

    def _fresh(self) -> None:
        self._tables = _Kept(_KEPT_BYTES)
        self._footers = _Kept(_KEPT_FOOTER_BYTES)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_tables", "_footers")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._fresh()

    def __len__(self) -> int:
        return int(self._group_starts[-1]) if self._rows is None else len(self._rows)

    def _place(self, i: int) -> tuple[int, int, int, int]:
        """Where row i is: file, row group in the file, row in the group, row in the file."""
        row = i if self._rows is None else int(self._rows[i])
        group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
        file = int(np.searchsorted(self._file_groups, group, side="right")) - 1
        first = int(self._file_groups[file])
        return file, group - first, row - int(self._group_starts[group]), row - int(self._group_starts[first])

    def name(self, i: int) -> str:
        """File and row: "train-00000.parquet:123"."""
        file, _, _, row = self._place(i)
        return f"{self._names[file]}:{row}"

    def identity(self) -> str:
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        ends = self._group_starts[self._file_groups]
        names = [f"{name}:{n}" for name, n in zip(self._names, np.diff(ends).tolist(), strict=True)]
        if self._rows is not None:
            names.append(hashlib.sha256(np.ascontiguousarray(self._rows, "<i8").tobytes()).hexdigest())
        return identity_of("parquet", names)

    def read(self, i: int) -> Record:
        """Row i.

        Raises BadExample with cause `image_missing` (null), `image_unreadable` (its file), `unsafe_name` (a relative path
        that leaves the folder), `caption_missing`, `caption_empty`, `caption_undecodable` (not UTF-8), `label_out_of_range` or
        `row_group_corrupt` (the Parquet file is damaged there, or gone).
        """
        row = self._row(i, self._columns)
        captions = self._texts(row)
        image = self._image(row[self._image_key], self.paths[self._place(i)[0]])
        label = label_of(row[self._label_key] if self._label_key else None)
        return Record(image, captions, label, self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        columns = list(self._caption_keys)
        return self._texts(self._row(i, columns) if columns else {})

    def _row(self, i: int, columns: list[str]) -> dict[str, Any]:
        file, group, place, _ = self._place(i)
        table = self._tables.peek((file, group, *self._columns))
        if table is None:
            load = functools.partial(self._load, self.paths[file], group, columns)
            table = self._tables.get((file, group, *columns), load, lambda t: t.nbytes)
        row = {}
        for name in columns:
            try:
                row[name] = table.column(name)[place].as_py()
            except (UnicodeDecodeError, IndexError) as e:  # IndexError: another file was put in its place
                cause = "image_unreadable" if name == self._image_key else "caption_undecodable"
                cause = "row_group_corrupt" if isinstance(e, IndexError) else cause
                raise BadExample(cause, f"{self.paths[file]}, column {name}: {e}") from None
        return row

    def _load(self, path: str, group: int, columns: list[str]) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            footer = self._footers.get(path, lambda: _read_footer(self._storage, path)[1], lambda f: f.serialized_size)
            with self._storage.open(path) as opened:
                file = pyarrow.parquet.ParquetFile(opened, metadata=footer, pre_buffer=True)
                # This is one of many reading threads already.
                return file.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pyarrow.ArrowException, *_DAMAGE) as e:
            raise BadExample("row_group_corrupt", f"{path}, row group {group}: {_first_line(e)}") from None

    def _texts(self, row: dict[str, Any]) -> tuple[str, ...]:
        stored: list[str] = []
        for key in self._caption_keys:
            value = row[key]
            stored += [v for v in (value if isinstance(value, list) else [value]) if v is not None]
        captions = tuple(c.strip() for c in stored if c.strip())
        if self._caption_required and not captions:
            raise BadExample("caption_empty" if stored else "caption_missing", f"null or blank {self._caption_keys}")
        return captions

    def _image(self, value: Any, file: str) -> bytes:
        if isinstance(value, dict):
            data = value.get("bytes")
            value = value.get("path") if data is None else data
        if value is None or value == "":
            raise BadExample("image_missing", f"null {self._image_key}")
        if isinstance(value, bytes):
            return value
        path = _resolve(value, file)
        try:
            return self._storage.read(path)
        except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
            raise BadExample("image_unreadable", f"{value}: {_first_line(e)}") from None


class _Kept:
    """What was loaded last, as far as it fits, and always the last one. Several threads that want the same wait for one."""

    def __init__(self, most: int):
        self._most, self._bytes = most, 0
        self._lock = threading.Lock()
        self._futures: collections.OrderedDict[Hashable, concurrent.futures.Future] = collections.OrderedDict()
        self._sizes: dict[Hashable, int] = {}

    def peek(self, key: Hashable) -> Any:
        """The value of a key that is loaded or is being loaded, or None."""
        with self._lock:
            future = self._futures.get(key)
            if future is None:
                return None
            self._futures.move_to_end(key)
        return future.result()

    def get(self, key: Hashable, load: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The value of a key, loaded if it is not kept; what `load` raises is raised by all who wait for it."""
        with self._lock:
            future = self._futures.get(key)
            if future is not None:
                self._futures.move_to_end(key)
            else:
                mine = self._futures[key] = concurrent.futures.Future()
        if future is not None:
            return future.result()
        try:
            value = load()
        except BaseException as e:
            with self._lock:
                del self._futures[key]
            mine.set_exception(e)
            raise
        with self._lock:
            self._sizes[key] = size(value)
            self._bytes += self._sizes[key]
            while self._bytes > self._most:
                # The longest not asked for goes first; what is still being loaded has no size yet.
                oldest = next((k for k in self._futures if k in self._sizes and k != key), None)
                if oldest is None:
                    break
                del self._futures[oldest]
                self._bytes -= self._sizes.pop(oldest)
        mine.set_result(value)
        return value


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def _resolve(path: str, file: str) -> str:
    """An image's path as a Parquet file has it, as a path for Storage. Raises BadExample with cause `unsafe_name`."""
    if not is_local(path) or path.startswith(("/", "file://")):
        return path
    inside = posixpath.normpath(path)
    if inside == ".." or inside.startswith("../"):
        raise BadExample("unsafe_name", path)
    return join(posixpath.dirname(file) or ".", inside)


def _read_footer(storage: Storage, path: str) -> tuple[Any, Any]:
    """(Arrow schema, metadata) of a Parquet file. Raises OSError or ArrowException."""
    import pyarrow.parquet

    with storage.open(path) as opened:
        file = pyarrow.parquet.ParquetFile(opened)
        return file.schema_arrow, file.metadata


def _footer(storage: Storage, path: str) -> tuple[Any, list[tuple[int, int]]]:
    """(Arrow schema, (rows, bytes when decoded) of each row group) of a file. Raises UserError."""
    import pyarrow

    try:
        schema, footer = _read_footer(storage, path)
        _listed(schema)  # names that are not UTF-8 show themselves when they are asked for
        # Not what is said of single columns: where that is damaged, pyarrow 25 ends the whole process.
        groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
        sizes = [(g.num_rows, g.total_byte_size) for g in groups]
        if any(n < 0 for n, _ in sizes) or sum(n for n, _ in sizes) != footer.num_rows:
            raise ValueError("its row groups do not add up to its rows")
    except (OSError, pyarrow.ArrowException, *_DAMAGE) as e:
        raise UserError(f"{path} cannot be read as Parquet: {getattr(e, 'strerror', None) or _first_line(e)}") from None
    return schema, sizes


def _groups_of(storage: Storage, columns: dict[str, Callable[[Any], bool]], path: str) -> list[tuple[int, int]]:
    """(rows, bytes when decoded) of each row group of a file. Raises UserError for columns of another type."""
    schema, groups = _footer(storage, path)
    for name, fits in columns.items():
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has several columns {name!r}: leave one of them; columns: {_listed(schema)}")
        if name not in schema.names or not fits(_type(schema, name)):
            raise UserError(
                f"{path} lacks the column {name!r} of the first file, or has it as another type: {_listed(schema)}"
            )
    return groups


def _plain(kind: Any) -> Any:
    """A type without the dictionary or extension around it."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _type(schema: Any, name: str) -> Any:
    """The type of a column, of the first of its name (`_groups_of` refuses those that occur twice)."""
    return schema.types[schema.names.index(name)]


def _is_texts(kind: Any) -> bool:
    from pyarrow import types

    kind = _plain(kind)
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return str(_plain(kind.value_type) if lists else kind) in (*_TEXT, "null")


def _is_label(kind: Any) -> bool:
    from pyarrow import types

    return types.is_integer(_plain(kind)) or types.is_null(kind)


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    kind = _plain(kind)
    if types.is_struct(kind):
        fields = {f.name: str(_plain(f.type)) for f in kind}
        return fields.get("bytes") in _BYTES or fields.get("path") in _TEXT
    return str(kind) in (*_BYTES, *_TEXT)


def _listed(schema: Any) -> str:
    return ", ".join(f"{f.name} ({f.type})" for f in schema) or "none"


def _image_key(schema: Any, key: str, path: str) -> str:
    found = key or next((k for k in IMAGE_KEYS if k in schema.names), "")
    if found not in schema.names:
        why = f"has no column {found!r}" if found else f"has none of {', '.join(IMAGE_KEYS)}"
    elif not _is_image(_type(schema, found)):
        why = f"holds neither image files nor paths in its column {found!r}"
    else:
        return found
    raise UserError(f"{path} {why}: set config.data.image_key to one of its columns: {_listed(schema)}")


def _caption_keys(schema: Any, keys: tuple[str, ...], required: bool, path: str) -> tuple[str, ...]:
    for key in keys:
        if key not in schema.names or not _is_texts(_type(schema, key)):
            what = f"its column {key!r} is no text" if key in schema.names else f"it has no column {key!r}"
            raise UserError(f"config.data.caption_keys: {path}: {what}; columns: {_listed(schema)}")
    usual = [k for k in CAPTION_KEYS if k in schema.names and _is_texts(_type(schema, k))]
    keys = keys or tuple(usual[:1])
    if required and not keys:
        raise UserError(
            f"{path} has none of {', '.join(CAPTION_KEYS)} as captions: set config.data.caption_keys, or "
            f"config.data.captions=optional; columns: {_listed(schema)}"
        )
    return keys


def _label_key(schema: Any, key: str, path: str) -> str:
    """The column with the label, or nothing."""
    if key in schema.names and _is_label(_type(schema, key)):
        return key
    if key in ("", "label"):
        return ""
    what = f"its column {key!r} is no class number" if key in schema.names else f"it has no column {key!r}"
    raise UserError(f"config.data.label_key: {path}: {what}; columns: {_listed(schema)}")


def _class_names(schema: Any, key: str) -> tuple[str, ...]:
    """Names of the classes, which Hugging Face datasets keep beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[key]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
