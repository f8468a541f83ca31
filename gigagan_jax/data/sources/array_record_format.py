"""ArrayRecord files: their records and the metadata by which TFDS reads them."""

import collections
import concurrent.futures
import contextlib
import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.sources.tf_example import Values, parse_example, serialize_record

# One record a group: a random read decodes that record only. Images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# No readahead and no threads of the library: reads are random, and the pipeline has threads of its own.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
# Bytes of the buffer that each open file has.
_READER_BUFFER = 32 << 10
# Files that one set keeps open in one process. A common limit is 1,024 descriptors.
_OPEN_FILES = 256
# Opening waits for the file system, so more threads than cores help.
_OPENING_THREADS = 16


# ---------------------------------------------------------------- writing


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Writes one file under a temporary name and renames it at the end. Equal records give equal bytes.

    Args:
      path: of the file, in an existing folder.
      records: in their order. If the iterator raises, no file is left.

    Returns:
      number of records written

    Raises:
      UserError: the file cannot be written.
    """
    from array_record.python import array_record_module

    # The process id keeps several writers of one path apart.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    num_records = 0
    writer = None
    try:
        writer = _call_or_user_error(
            path, lambda: array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        )
        for record in records:
            data = serialize_record(record)
            _call_or_user_error(path, lambda data=data: writer.write(data))
            num_records += 1
        # close() writes the last records, so it may fail on a full disk.
        _call_or_user_error(path, writer.close)
        writer = None
        _call_or_user_error(path, lambda: os.replace(temporary, path))
    finally:
        if writer is not None:
            # The writer may be what failed.
            with contextlib.suppress(RuntimeError):
                writer.close()
        temporary.unlink(missing_ok=True)
    return num_records


def _call_or_user_error(path: Path, action: Any) -> Any:
    try:
        return action()
    except (OSError, RuntimeError) as e:
        raise UserError(f"{path} cannot be written: {_first_line(e)}; check its folder and the free space") from None


def shard_name(name: str, number: int, count: int, split: str = "train") -> str:
    """Builds the file name of a shard as TFDS does: NAME-train.array_record-00000-of-00012."""
    return f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_tfds_metadata(
    folder: Path,
    name: str,
    shard_lengths: Sequence[int],
    *,
    split: str = "train",
    version: str = "1.0.0",
    num_bytes: int = 0,
) -> None:
    """Writes the metadata by which `tfds.builder_from_directory(folder).as_data_source("train")` reads the files.

    Args:
      folder: folder of the files, whose names come from `shard_name`.
      name: of the data set: letters, digits, `_`, `.` and `-`, a letter first.
      shard_lengths: number of examples in each file.
      split: of the data set.
      version: three numbers.
      num_bytes: size of all files; TFDS only shows it.

    Raises:
      UserError: the name has other characters, or the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name, re.ASCII):
        raise UserError(f"{name!r} is no name for a data set: use letters, digits and _, a letter first")
    # TFDS's protos in their JSON form, written by hand: a conversion works without tensorflow_datasets.
    package = "tensorflow_datasets.core.features"
    text = {"pythonClassName": f"{package}.text_feature.Text", "text": {}}
    image = {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"}
    features = {
        "captions": {
            "pythonClassName": f"{package}.sequence_feature.Sequence",
            "sequence": {"feature": text, "length": "-1"},
        },
        "image": {"pythonClassName": f"{package}.image_feature.Image", "image": image},
        "label": {
            "pythonClassName": f"{package}.scalar.Scalar",
            "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
        },
        "name": text,
    }
    info = {
        "description": "Captioned images.",
        "fileFormat": "array_record",
        "name": name,
        # TFDS finds the files by this template and these lengths; it opens none of them to count.
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(num_bytes),
                "shardLengths": [str(n) for n in shard_lengths],
            }
        ],
        "version": version,
    }
    feature_class = f"{package}.features_dict.FeaturesDict"
    files = {
        "features.json": {"pythonClassName": feature_class, "featuresDict": {"features": features}},
        "dataset_info.json": info,
    }
    try:
        for file, content in files.items():
            # Renamed when complete: TFDS may read the folder at any time.
            temporary = folder / f"{file}.{os.getpid()}.tmp"
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, folder / file)
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror or e}; check the folder and the free space") from None


# ---------------------------------------------------------------- reading


class FileSlice(NamedTuple):
    """The records skip ... skip + take - 1 of a file."""

    path: str
    skip: int
    take: int


def _open_reader(path: str) -> Any:
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(path, options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)


def count_records(path: str) -> int:
    """Counts the records of a file.

    Raises:
      UserError: the file is missing, truncated or of another kind.
    """
    try:
        # Opened by Python first, for the reason in words: the library does not tell a missing file from a damaged one.
        with open(path, "rb"):
            pass
        reader = _open_reader(path)
        # The library reports a file that it cannot open as empty.
        if reader.ok():
            return reader.num_records()
        why = "it is cut short or of another kind; copy it again"
    except OSError as e:
        why = e.strerror or str(e)
    except RuntimeError as e:
        why = _first_line(e)
    raise UserError(f"{path} cannot be read as ArrayRecord: {why}")


def count_all_records(paths: Sequence[str]) -> list[int]:
    """Counts the records of each file. Raises as `count_records`."""
    with concurrent.futures.ThreadPoolExecutor(_OPENING_THREADS) as pool:
        return list(pool.map(count_records, paths))


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


class ShardedRecords:
    """Random access to the records of many files, one after the other. Thread-safe and picklable.

    Args:
      parts: slices of local files.
    """

    def __init__(self, parts: Sequence[FileSlice]):
        self.parts = tuple(parts)
        self.starts = np.concatenate([[0], np.cumsum([p.take for p in self.parts], dtype=np.int64)])
        self._reset_readers()

    def _reset_readers(self) -> None:
        self._lock = threading.Lock()
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._process = os.getpid()

    def __getstate__(self):
        # Locks and open readers cannot be pickled; a worker process opens files of its own.
        return self.parts

    def __setstate__(self, parts):
        self.__init__(parts)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate_record(self, i: int) -> tuple[int, int]:
        """Returns (index of the part, index in its file) of record i."""
        # side="right" skips empty parts, which share their start with the next one.
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return part, self.parts[part].skip + i - int(self.starts[part])

    def read(self, i: int) -> bytes:
        """Reads record i. Raises BadExample with cause `record_corrupt`."""
        part, index = self.locate_record(i)
        path = self.parts[part].path
        try:
            return self._get_reader(path).read([index])[0]
        except (RuntimeError, IndexError, OSError) as e:
            raise BadExample("record_corrupt", f"{path}: {_first_line(e)}") from None

    def _get_reader(self, path: str) -> Any:
        # In a forked child the lock may be held by a thread that does not exist there.
        if self._process != os.getpid():
            self._reset_readers()
        with self._lock:
            reader = self._readers.get(path)
            if reader is not None:
                self._readers.move_to_end(path)
                return reader
        # Opened outside the lock, because a network file system may take long.
        reader = _open_reader(path)
        if not reader.ok():
            raise RuntimeError("the file is gone, or another than it was")
        with self._lock:
            # Two threads may have opened the file; the first one's reader stays.
            reader = self._readers.setdefault(path, reader)
            # Dropped, not closed: another thread may be reading from it. The last reference closes it.
            while len(self._readers) > _OPEN_FILES:
                self._readers.popitem(last=False)
        return reader


def sample_features(records: ShardedRecords, most: int = 16) -> Iterable[dict[str, Values]]:
    """Yields the features of up to `most` records, evenly spread from the first on. Unreadable records are skipped."""
    for i in np.unique(np.linspace(0, len(records) - 1, most).astype(int)) if len(records) else ():
        try:
            yield parse_example(records.read(int(i)))
        except BadExample:
            continue
