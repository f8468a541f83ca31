"""Source of Parquet files with a column of images or paths, as Hugging Face datasets and LAION write them."""

import concurrent.futures
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources.parquet_schema import format_columns
from gigagan_jax.data.sources.table import (
    DAMAGE,
    LruCache,
    TableSource,
    check_columns,
    explain_damage,
    first_line,
)
from gigagan_jax.data.storage import Storage

_log = logging.getLogger(__name__)
# Bytes of decoded row groups that a source keeps in each process, and of footers.
_KEPT_BYTES = 256 << 20
_KEPT_FOOTER_BYTES = 16 << 20
# Bytes of a row group from which on a warning is logged: a group is read whole for any of its rows.
_LARGE_GROUP = 64 << 20
# Footers of buckets cost requests, so more threads than cores help.
_OPENING_THREADS = 16


class ParquetSource(TableSource):
    """Rows of Parquet files as examples. A row group that is damaged or gone makes bad examples (`row_group_corrupt`).

    A read loads the whole row group; the latest groups are cached.

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

    _kind, _damaged_block = "parquet", "row_group_corrupt"
    # Chosen rows may come from a filter that ran before the files changed.
    _wrong_rows = ": the chosen ones are not among them; filter again"

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
        super().__init__(storage, caption_required)
        self.filter_report = filter_report
        self.paths = self._storage.expand_pattern(path, (".parquet",))
        # The first file decides the columns; `_groups_of` checks that all others have them.
        schema, _ = _read_row_groups(self._storage, self.paths[0])
        columns = self._choose_columns(schema, self.paths[0], image_key, caption_keys, label_key)
        self._place_rows(path, self._read_group_lengths(columns), rows)
        self._reset_caches()

    def _read_group_lengths(self, columns: dict[str, Callable[[Any], bool]]) -> list[list[int]]:
        """Reads all footers: checks the columns, warns of large row groups, and returns the rows of each, for each file."""
        task = functools.partial(_groups_of, self._storage, columns)
        progress = ProgressBar("reading Parquet footers", len(self.paths))
        lengths: list[list[int]] = []
        largest, where = 0, ""
        with concurrent.futures.ThreadPoolExecutor(_OPENING_THREADS) as pool:
            # map keeps the order of the files, whichever footer arrives first.
            for path, groups in zip(self.paths, pool.map(task, self.paths), strict=True):
                lengths.append([n for n, _ in groups])
                largest, where = max([(largest, where), *((size, path) for _, size in groups)], key=lambda x: x[0])
                progress.step()
        if largest > _LARGE_GROUP:
            _log.warning(
                "%s: row groups of up to %d MB, each read whole for any of its rows: random access will be slow. Write smaller "
                "ones (pyarrow.parquet.write_table(table, file, row_group_size=100)), or use tools/prepare_data.py convert",
                where,
                largest >> 20,
            )
        return lengths

    def _reset_caches(self) -> None:
        self._tables = LruCache(_KEPT_BYTES)
        self._footers = LruCache(_KEPT_FOOTER_BYTES)

    def __getstate__(self):
        # Caches hold locks and up to 256 MiB: a worker process starts with empty ones.
        return {k: v for k, v in self.__dict__.items() if k not in ("_tables", "_footers")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset_caches()

    def _read_row(self, i: int, columns: list[str]) -> dict[str, Any]:
        file, group, place, _ = self._locate_row(i)
        # A cached table with all columns serves a read of captions too.
        table = self._tables.get_cached((file, group, *self._columns))
        if table is None:
            load = functools.partial(self._load_row_group, self.paths[file], group, columns)
            table = self._tables.get_or_load((file, group, *columns), load, lambda t: t.nbytes)
        return self._take_row(table, place, columns, self.paths[file])

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
        except (OSError, pyarrow.ArrowException, *DAMAGE) as e:
            raise BadExample(self._damaged_block, f"{path}, row group {group}: {first_line(e)}") from None


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
    except (OSError, pyarrow.ArrowException, *DAMAGE) as e:
        raise UserError(f"{path} cannot be read as Parquet: {explain_damage(storage, path, e)}") from None
    return schema, sizes


def _groups_of(storage: Storage, columns: dict[str, Callable[[Any], bool]], path: str) -> list[tuple[int, int]]:
    """Lists (rows, decoded bytes) of each row group of a file. Raises UserError if columns differ from `columns`."""
    schema, groups = _read_row_groups(storage, path)
    check_columns(schema, columns, path)
    return groups
