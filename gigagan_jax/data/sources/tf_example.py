"""Reads and writes examples as serialized tf.train.Example, the format of TFDS. Features of our records:

    image     bytes: the encoded image file
    captions  bytes, any number: UTF-8
    label     int64, -1: unknown
    name      bytes: name of the example in its original data set

The module needs neither TensorFlow nor tensorflow_datasets.
"""

import functools
import io
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from gigagan_jax.data.example import UNKNOWN_LABEL, BadExample, Record

T = TypeVar("T", bytes, int, float)


# In the order of their field numbers in feature.proto.
_LISTS = {"bytes_list": "BytesList", "float_list": "FloatList", "int64_list": "Int64List"}


Values = list[bytes] | list[int] | list[float]


@functools.cache
def _example_class() -> Any:
    """The protobuf message tf.train.Example."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    # The messages repeat tensorflow/core/example/{feature,example}.proto, whose field numbers decide the bytes.
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="record", syntax="proto3")

    def add_message(parent: Any, name: str, *fields: tuple[str, int, bool], **more: Any) -> Any:
        """Adds a message; its fields, numbered from 1, are (name, type, whether repeated)."""
        new_message = parent.add(name=name)
        for number, (field, type_, repeated) in enumerate(fields, 1):
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            new_message.field.add(name=field, number=number, type=type_, label=label, **more.get(field, {}))
        return new_message

    messages = file.message_type
    add_message(messages, "BytesList", ("value", kind.TYPE_BYTES, True))
    add_message(messages, "FloatList", ("value", kind.TYPE_FLOAT, True))
    add_message(messages, "Int64List", ("value", kind.TYPE_INT64, True))
    # The three lists form a oneof: a feature has values of one type.
    lists = {n: {"type_name": f".record.{t}", "oneof_index": 0} for n, t in _LISTS.items()}
    feature = add_message(messages, "Feature", *((n, kind.TYPE_MESSAGE, False) for n in _LISTS), **lists)
    feature.oneof_decl.add(name="kind")
    entry_type = {"feature": {"type_name": ".record.Features.FeatureEntry"}}
    features = add_message(messages, "Features", ("feature", kind.TYPE_MESSAGE, True), **entry_type)
    entry = add_message(
        features.nested_type,
        "FeatureEntry",
        ("key", kind.TYPE_STRING, False),
        ("value", kind.TYPE_MESSAGE, False),
        value={"type_name": ".record.Feature"},
    )
    # A protobuf map is stored as repeated entries of this form.
    entry.options.map_entry = True
    add_message(messages, "Example", ("features", kind.TYPE_MESSAGE, False), features={"type_name": ".record.Features"})
    # A separate pool: if TensorFlow or TFDS is loaded, the default pool already has messages of these names.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("record.Example"))


def parse_example(data: bytes) -> dict[str, Values]:
    """Parses a serialized tf.train.Example into the values of its features. Nested features are called `a/b`.

    Raises BadExample with cause `record_undecodable`.
    """
    from google.protobuf import message

    try:
        # Some damaged bytes parse too, to an example without features. The callers check for an image.
        example = _example_class().FromString(data)
    except message.DecodeError as e:
        raise BadExample("record_undecodable", f"not a tf.train.Example: {e}") from None
    values: dict[str, Values] = {}
    for name, feature in example.features.feature.items():
        # A feature without values has no list at all.
        which = feature.WhichOneof("kind")
        values[name] = list(getattr(feature, which).value) if which else []
    return values


def serialize_record(record: Record) -> bytes:
    """Serializes a record; equal records give equal bytes. Pixels are stored as PNG.

    Lone surrogates, which UTF-8 cannot encode, become `?` in captions and stay in names.
    """
    image = record.image if isinstance(record.image, bytes) else _encode_png(record.image)
    example = _example_class()()
    features = example.features.feature
    features["image"].bytes_list.value.append(image)
    # Present even if it is empty: TFDS raises on a feature that is missing.
    features["captions"].bytes_list.SetInParent()
    features["captions"].bytes_list.value.extend(c.encode("utf-8", "replace") for c in record.captions)
    features["label"].int64_list.value.append(record.label)
    # File names that are not UTF-8 reach Python as lone surrogates; their bytes come back here.
    features["name"].bytes_list.value.append(record.name.encode("utf-8", "surrogateescape"))
    # Map entries have no order by default, which would change the bytes between processes.
    return example.SerializeToString(deterministic=True)


def deserialize_record(data: bytes, name: str) -> Record:
    """Parses what `serialize_record` wrote; pixels stay PNG.

    Args:
      data: a serialized example; captions, label and name are optional.
      name: name of the example if none is stored.

    Raises BadExample with cause `record_undecodable` (not an example, or without an image), `caption_undecodable` or
    `label_out_of_range`.
    """
    values = parse_example(data)
    image = first_value(values, "image", bytes)
    if image is None:
        raise BadExample("record_undecodable", f"no feature image, but {', '.join(sorted(values)) or 'none at all'}")
    # Not `first_value`: a label of another type must be refused, not ignored.
    label = next(iter(values.get("label", ())), None)
    stored = first_value(values, "name", bytes)
    return Record(
        image=image,
        # Blank captions stay here; sources drop them.
        captions=decode_texts(values, ("captions",)),
        label=label_of(label if isinstance(label, int | float) else None),
        name=name if stored is None else stored.decode("utf-8", "surrogateescape"),
    )


def label_of(stored: int | float | None) -> int:
    """Converts a stored class to int32, -1 for unknown. Raises BadExample with cause `label_out_of_range`."""
    if stored is None:
        return UNKNOWN_LABEL
    # Batches hold labels as int32.
    if not isinstance(stored, int) or not UNKNOWN_LABEL <= stored < 2**31:
        raise BadExample("label_out_of_range", f"{stored} is no class: they are 0 ... 2**31 - 1, or -1 for unknown")
    return stored


def first_value(values: dict[str, Values], key: str, kind: type[T]) -> T | None:
    """Returns the first value of a feature if it is of this kind (bytes, int or float), else None."""
    value = next(iter(values.get(key, ())), None)
    return value if isinstance(value, kind) else None


def decode_texts(values: dict[str, Values], keys: Sequence[str]) -> tuple[str, ...]:
    """Decodes all texts of some features. Raises BadExample with cause `caption_undecodable`."""
    texts: list[str] = []
    for key in keys:
        # TFDS stores sequences of sequences flat, beside the lengths of their rows.
        stored = values.get(key) or values.get(f"{key}/ragged_flat_values") or []
        for value in stored:
            if not isinstance(value, bytes):
                raise BadExample("caption_undecodable", f"{key} holds numbers, not text")
            try:
                texts.append(value.decode("utf-8"))
            except UnicodeDecodeError as e:
                raise BadExample("caption_undecodable", f"not UTF-8: {e}") from None
    return tuple(texts)


def _encode_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
