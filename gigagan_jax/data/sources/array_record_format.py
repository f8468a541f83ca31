"""ArrayRecord files, and how an example is stored in ours: as a tf.train.Example, which is what TFDS stores too.

    image     bytes: the encoded image file
    captions  bytes, any number: UTF-8
    label     int64, -1: unknown
    name      bytes: what the example was called where it came from

Everything here works without TensorFlow and without loading tensorflow_datasets.
"""

import collections
import concurrent.futures
import contextlib
import functools
import io
import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import UNKNOWN_LABEL, BadExample, Record

# One record a group: random access decodes what it asks for. Images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32 << 10
_OPEN_FILES = 256  # of one set in one process; 1,024 descriptors are a common limit
_OPENING_THREADS = 16

T = TypeVar("T", bytes, int, float)
_LISTS = {"bytes_list": "BytesList", "float_list": "FloatList", "int64_list": "Int64List"}
Values = list[bytes] | list[int] | list[float]


@functools.cache
def _example_class() -> Any:
    """The protobuf message tf.train.Example."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="record", syntax="proto3")

    def message(parent: Any, name: str, *fields: tuple[str, int, bool], **more: Any) -> Any:
        """Adds a message; its fields, numbered from 1, are (name, type, whether repeated)."""
        made = parent.add(name=name)
        for number, (field, type_, repeated) in enumerate(fields, 1):
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=type_, label=label, **more.get(field, {}))
        return made

    top = file.message_type
    message(top, "BytesList", ("value", kind.TYPE_BYTES, True))
    message(top, "FloatList", ("value", kind.TYPE_FLOAT, True))
    message(top, "Int64List", ("value", kind.TYPE_INT64, True))
    lists = {n: {"type_name": f".record.{t}", "oneof_index": 0} for n, t in _LISTS.items()}
    feature = message(top, "Feature", *((n, kind.TYPE_MESSAGE, False) for n in _LISTS), **lists)
    feature.oneof_decl.add(name="kind")
    entry_type = {"feature": {"type_name": ".record.Features.FeatureEntry"}}
    features = message(top, "Features", ("feature", kind.TYPE_MESSAGE, True), **entry_type)
    entry = message(
        features.nested_type,
        "FeatureEntry",
        ("key", kind.TYPE_STRING, False),
        ("value", kind.TYPE_MESSAGE, False),
        value={"type_name": ".record.Feature"},
    )
    entry.options.map_entry = True
    message(top, "Example", ("features", kind.TYPE_MESSAGE, False), features={"type_name": ".record.Features"})
    # A pool of its own: where TensorFlow or TFDS is loaded too, the default one has messages of these names.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("record.Example"))


def parse(data: bytes) -> dict[str, Values]:
    """Values of each feature of a serialized tf.train.Example; features of nested structures are called `a/b`.

    Raises BadExample with cause `record_undecodable`.
    """
    from google.protobuf import message

    try:
        example = _example_class().FromString(data)
    except message.DecodeError as e:
        raise BadExample("record_undecodable", f"not a tf.train.Example: {e}") from None
    out: dict[str, Values] = {}
    for name, feature in example.features.feature.items():
        which = feature.WhichOneof("kind")
        out[name] = list(getattr(feature, which).value) if which else []
    return out


def encode(record: Record) -> bytes:
    """An example as it is stored: the same bytes for the same record. Pixels are stored as PNG.

    What UTF-8 cannot write, halves of surrogate pairs, becomes `?` in captions and is kept in names (file names have it).
    """
    image = record.image if isinstance(record.image, bytes) else _png(record.image)
    example = _example_class()()
    features = example.features.feature
    features["image"].bytes_list.value.append(image)
    # There even where it is empty: TFDS takes a feature that is not written for a fault.
    features["captions"].bytes_list.SetInParent()
    features["captions"].bytes_list.value.extend(c.encode("utf-8", "replace") for c in record.captions)
    features["label"].int64_list.value.append(record.label)
    features["name"].bytes_list.value.append(record.name.encode("utf-8", "surrogateescape"))
    return example.SerializeToString(deterministic=True)


def decode(data: bytes, name: str) -> Record:
    """What `encode` was given, pixels as PNG.

    Args:
      data: a stored example; captions, label and name may lack.
      name: of the example, where none is stored.

    Raises BadExample with cause `record_undecodable` (not an example, or without an image), `caption_undecodable` or
    `label_out_of_range`.
    """
    values = parse(data)
    image = first(values, "image", bytes)
    if image is None:
        raise BadExample("record_undecodable", f"no feature image, but {', '.join(sorted(values)) or 'none at all'}")
    label = next(iter(values.get("label", ())), None)
    stored = first(values, "name", bytes)
    return Record(
        image=image,
        captions=texts(values, ("captions",)),
        label=label_of(label if isinstance(label, int | float) else None),
        name=name if stored is None else stored.decode("utf-8", "surrogateescape"),
    )


def label_of(stored: int | float | None) -> int:
    """A class as batches hold it, int32 with -1 for unknown. Raises BadExample with cause `label_out_of_range`."""
    if stored is None:
        return UNKNOWN_LABEL
    if not isinstance(stored, int) or not UNKNOWN_LABEL <= stored < 2**31:
        raise BadExample("label_out_of_range", f"{stored} is no class: they are 0 ... 2**31 - 1, or -1 for unknown")
    return stored


def first(values: dict[str, Values], key: str, kind: type[T]) -> T | None:
    """The first value of a feature, if it is of this kind: bytes, int or float."""
    value = next(iter(values.get(key, ())), None)
    return value if isinstance(value, kind) else None


def texts(values: dict[str, Values], keys: Sequence[str]) -> tuple[str, ...]:
    """All texts of some features, as they are stored. Raises BadExample with cause `caption_undecodable`."""
    out: list[str] = []
    for key in keys:
        # Sequences of sequences are stored flat, beside the lengths of their rows.
        stored = values.get(key) or values.get(f"{key}/ragged_flat_values") or []
        for value in stored:
            if not isinstance(value, bytes):
                raise BadExample("caption_undecodable", f"{key} holds numbers, not text")
            try:
                out.append(value.decode("utf-8"))
            except UnicodeDecodeError as e:
                raise BadExample("caption_undecodable", f"not UTF-8: {e}") from None
    return tuple(out)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- writing


def write(path: Path, records: Iterable[Record]) -> int:
    """Writes one file, under another name until it is whole; the same bytes for the same records.

    Args:
      path: of the file, in a folder that is there.
      records: in their order; what they raise is passed on, and no file is left.

    Returns:
      how many were written

    Raises:
      UserError: the file cannot be written.
    """
    from array_record.python import array_record_module

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    count = 0
    writer = None
    try:
        writer = _or_user_error(path, lambda: array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS))
        for record in records:
            data = encode(record)
            _or_user_error(path, lambda data=data: writer.write(data))
            count += 1
        _or_user_error(path, writer.close)
        writer = None
        _or_user_error(path, lambda: os.replace(temporary, path))
    finally:
        if writer is not None:
            with contextlib.suppress(RuntimeError):  # it may be what failed
                writer.close()
        temporary.unlink(missing_ok=True)
    return count


def _or_user_error(path: Path, action: Any) -> Any:
    try:
        return action()
    except (OSError, RuntimeError) as e:
        raise UserError(f"{path} cannot be written: {_first_line(e)}; check its folder and the free space") from None


def shard_name(name: str, number: int, count: int, split: str = "train") -> str:
    """File of a shard as TFDS calls it: NAME-train.array_record-00000-of-00012."""
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
    """Describes files of `write` so that TFDS reads them: `tfds.builder_from_directory(folder).as_data_source("train")`.

    Args:
      folder: where the files are, or will be; each is called as `shard_name` says.
      name: of the data set: letters, digits, `_`, `.` and `-`, a letter first.
      shard_lengths: number of examples in each file.
      split: of the data set.
      version: three numbers.
      num_bytes: of all files; TFDS only shows it.

    Raises:
      UserError: such a name, or a folder that cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name, re.ASCII):
        raise UserError(f"{name!r} is no name for a data set: use letters, digits and _, a letter first")
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
            temporary = folder / f"{file}.{os.getpid()}.tmp"
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, folder / file)
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror or e}; check the folder and the free space") from None


# ---------------------------------------------------------------- reading


class Part(NamedTuple):
    """The records skip ... skip + take of a file."""

    path: str
    skip: int
    take: int


def _open(path: str) -> Any:
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(path, options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)


def count(path: str) -> int:
    """Number of records in a file.

    Raises:
      UserError: it is missing, cut short or of another kind.
    """
    try:
        with open(path, "rb"):
            pass
        reader = _open(path)
        # What it cannot open it calls empty.
        if reader.ok():
            return reader.num_records()
        why = "it is cut short or of another kind; copy it again"
    except OSError as e:
        why = e.strerror or str(e)
    except RuntimeError as e:
        why = _first_line(e)
    raise UserError(f"{path} cannot be read as ArrayRecord: {why}")


def count_all(paths: Sequence[str]) -> list[int]:
    """Number of records in each file; raises as `count` does."""
    with concurrent.futures.ThreadPoolExecutor(_OPENING_THREADS) as pool:
        return list(pool.map(count, paths))


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


class Records:
    """The records of many files, one after the other, with random access. Thread-safe; may be pickled.

    Args:
      parts: of which files; local ones.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        self.starts = np.concatenate([[0], np.cumsum([p.take for p in self.parts], dtype=np.int64)])
        self._fresh()

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._process = os.getpid()

    def __getstate__(self):
        return self.parts

    def __setstate__(self, parts):
        self.__init__(parts)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, i: int) -> tuple[int, int]:
        """(which part, which record of its file) the record i is."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return part, self.parts[part].skip + i - int(self.starts[part])

    def read(self, i: int) -> bytes:
        """Record i. Raises BadExample with cause `record_corrupt`."""
        part, index = self.place(i)
        path = self.parts[part].path
        try:
            return self._reader(path).read([index])[0]
        except (RuntimeError, IndexError, OSError) as e:
            raise BadExample("record_corrupt", f"{path}: {_first_line(e)}") from None

    def _reader(self, path: str) -> Any:
        if self._process != os.getpid():  # a fork, whose lock may be held for ever
            self._fresh()
        with self._lock:
            reader = self._readers.get(path)
            if reader is not None:
                self._readers.move_to_end(path)
                return reader
        reader = _open(path)  # not under the lock: a network file system takes its time
        if not reader.ok():
            raise RuntimeError("the file is gone, or another than it was")
        with self._lock:
            reader = self._readers.setdefault(path, reader)
            # Dropped, not closed: another thread may be reading in it. The last one to let go closes it.
            while len(self._readers) > _OPEN_FILES:
                self._readers.popitem(last=False)
        return reader


def samples(records: Records, most: int = 16) -> Iterable[dict[str, Values]]:
    """Features of some records, evenly spread from the first on; those that cannot be read are passed over."""
    for i in np.unique(np.linspace(0, len(records) - 1, most).astype(int)) if len(records) else ():
        try:
            yield parse(records.read(int(i)))
        except BadExample:
            continue
