"""The ArrayRecord format: files read back as written, by this package and by TFDS; damaged files are reported."""

import dataclasses
import io
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.sources import array_record_format, tf_example
from gigagan_jax.data.sources.array_record import ArrayRecordSource

# Child processes run here, so that they import this checkout.
ROOT = Path(__file__).parents[3]


def make_picture(i):
    """PNG file of 5 x 4 pixels."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_record(i, **changes):
    # One to three captions, with letters beyond ASCII.
    captions = tuple(f"caption {i}.{j} — ü" for j in range(1 + i % 3))
    return dataclasses.replace(Record(make_picture(i), captions, i % 4, f"deep/{i:04d}.jpg"), **changes)


def write_raw(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for data in records:
        writer.write(data)
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of 5, 0 and 4 examples with TFDS' metadata; not to be written to."""
    folder = tmp_path_factory.mktemp("array_records")
    # An empty shard shares its start with the next one.
    lengths = (5, 0, 4)
    for shard, n in enumerate(lengths):
        path = folder / array_record_format.shard_name("small", shard, len(lengths))
        assert array_record_format.write_records(path, [make_record(10 * shard + i) for i in range(n)]) == n
    array_record_format.write_tfds_metadata(folder, "small", lengths)
    return folder


# The records of the fixture `folder`, in order.
EXPECTED = [make_record(i) for i in (0, 1, 2, 3, 4, 20, 21, 22, 23)]


# --- the format


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"captions": ()},
        {"captions": ("", "two\nlines", "x" * 100_000)},
        {"label": -1},
        # The largest int32.
        {"label": 2**31 - 1},
        # A file name that is not UTF-8, as Python decodes it.
        {"name": "caf\udce9.jpg"},
        {"name": ""},
        {"image": b""},
        {"image": bytes(range(256)) * 1000},
    ],
)
def test_decoding_gives_what_was_encoded(changes):
    original = make_record(1, **changes)
    assert tf_example.deserialize_record(tf_example.serialize_record(original), "other") == original


def test_labels_that_are_no_class_are_bad_examples():
    from tensorflow_datasets.proto import tf_example_pb2

    stored = tf_example_pb2.Example()
    stored.features.feature["image"].bytes_list.value.append(b"x")
    # The writer refuses such labels, so TFDS's protobuf class writes them.
    for kind, label in (("int64_list", 2**31), ("int64_list", -2), ("float_list", 1.0), ("float_list", float("nan"))):
        stored.features.feature["label"].Clear()
        getattr(stored.features.feature["label"], kind).value.append(label)
        # Beyond int32, below -1, and floats.
        with pytest.raises(BadExample, match="label_out_of_range"):
            tf_example.deserialize_record(stored.SerializeToString(), "")


def test_encoding_is_the_same_in_every_process():
    code = (
        "from gigagan_jax.data.sources.tf_example import serialize_record; from gigagan_jax.data.example import Record; "
        "print(serialize_record(Record(b'img', ('a', 'b'), 7, 'n')).hex())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            # Another hash seed changes the order of sets, and of map entries that are not sorted.
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    # Written out by hand from the wire format: features by name, each list as a message.
    entry = lambda key, list_: (
        b"\x0a"
        + bytes([len(key) + len(list_) + 4])
        + b"\x0a"
        + bytes([len(key)])
        + key
        + (b"\x12" + bytes([len(list_)]) + list_)
    )
    features = (
        entry(b"captions", b"\x0a\x06\x0a\x01a\x0a\x01b")
        + entry(b"image", b"\x0a\x05\x0a\x03img")
        + entry(b"label", b"\x1a\x03\x0a\x01\x07")
        + entry(b"name", b"\x0a\x03\x0a\x01n")
    )
    assert outputs == [(b"\x0a" + bytes([len(features)]) + features).hex()] * 2


def test_the_example_is_that_of_tfds():
    from tensorflow_datasets.proto import tf_example_pb2

    original = make_record(2)
    tfds_features = tf_example_pb2.Example.FromString(tf_example.serialize_record(original)).features.feature
    assert sorted(tfds_features) == ["captions", "image", "label", "name"]
    assert list(tfds_features["image"].bytes_list.value) == [original.image]
    assert [c.decode() for c in tfds_features["captions"].bytes_list.value] == list(original.captions)
    assert list(tfds_features["label"].int64_list.value) == [original.label]

    other = tf_example_pb2.Example()
    other.features.feature["score"].float_list.value.extend([0.5, 2.0])
    other.features.feature["image"].bytes_list.value.append(b"x")
    assert tf_example.parse_example(other.SerializeToString()) == {"score": [0.5, 2.0], "image": [b"x"]}


def test_texts_in_sequences_of_sequences_are_those_that_tfds_finds():
    """[["a"], [], ["b", "c"]] as TFDS stores it; it cannot write such a feature without TensorFlow."""
    from tensorflow_datasets.core import example_parser
    from tensorflow_datasets.core.features import TensorInfo
    from tensorflow_datasets.proto import tf_example_pb2

    stored = tf_example_pb2.Example()
    stored.features.feature["tags/ragged_flat_values"].bytes_list.value.extend([b"a", b"b", b"c"])
    stored.features.feature["tags/ragged_row_lengths_0"].int64_list.value.extend([1, 0, 2])
    data = stored.SerializeToString()
    # The parser of TFDS is the reference.
    parser = example_parser.ExampleParserNp({"tags": TensorInfo((None, None), np.object_, sequence_rank=2)})
    tfds_features = parser.parse_example(data)["tags"]
    assert [list(row) for row in tfds_features] == [[b"a"], [], [b"b", b"c"]]
    assert tf_example.decode_texts(tf_example.parse_example(data), ("tags",)) == ("a", "b", "c")


def test_pixels_become_a_png_of_the_same_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    stored = tf_example.deserialize_record(tf_example.serialize_record(make_record(0, image=pixels)), "")
    # PNG is lossless.
    np.testing.assert_array_equal(decode_image(stored.image), pixels)


def test_captions_that_utf8_cannot_write_do_not_stop_a_conversion():
    assert tf_example.deserialize_record(
        tf_example.serialize_record(make_record(0, captions=("a\ud800b",))), ""
    ).captions == ("a?b",)


def test_the_same_records_make_the_same_file(tmp_path):
    files = [tmp_path / "a.array_record", tmp_path / "b.array_record"]
    for file in files:
        array_record_format.write_records(file, (make_record(i) for i in range(20)))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files
    # One record a group is what makes random reads cheap.
    assert "group_size:1," in array_record_module.ArrayRecordReader(str(files[0])).writer_options_string()


def test_a_file_that_is_not_finished_is_not_there(tmp_path, refused):
    # The iterator fails after the first record is written.
    def broken():
        yield make_record(0)
        raise BadExample("stop")

    with pytest.raises(BadExample):
        array_record_format.write_records(tmp_path / "a.array_record", broken())
    assert list(tmp_path.iterdir()) == []
    refused(
        lambda: array_record_format.write_records(tmp_path / "no" / "a.array_record", [make_record(0)]),
        tmp_path / "no",
        "No such",
    )


# --- TFDS


def test_tfds_reads_the_folder(folder):
    import tensorflow_datasets as tfds

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # TFDS calls an old function of protobuf
        # The reference: TFDS reads the files with the metadata that we wrote.
        builder = tfds.builder_from_directory(folder)
    source = builder.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source) == len(EXPECTED)
    for tfds_features, ours in zip(source, EXPECTED, strict=True):
        assert tfds_features["image"] == ours.image
        assert [c.decode() for c in tfds_features["captions"]] == list(ours.captions)
        assert (tfds_features["label"], tfds_features["name"].decode()) == (ours.label, ours.name)
    np.testing.assert_array_equal(builder.as_data_source(split="train")[3]["image"], decode_image(make_picture(3)))
    # Sub-splits rely on the lengths in dataset_info.json.
    assert len(builder.as_data_source(split="train[2:4]")) == 2
    # Reading must not pull in TensorFlow, which takes seconds and memory.
    assert "tensorflow" not in sys.modules


def test_tfds_reads_an_example_without_captions(tmp_path):
    import tensorflow_datasets as tfds

    array_record_format.write_records(
        tmp_path / array_record_format.shard_name("x-y", 0, 1), [make_record(0, captions=(), label=-1)]
    )
    array_record_format.write_tfds_metadata(tmp_path, "x-y", [1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        (tfds_features,) = tfds.builder_from_directory(tmp_path).as_data_source(split="train")
    assert (len(tfds_features["captions"]), tfds_features["label"]) == (0, -1)


def test_metadata_refuses_names_that_no_file_can_have(tmp_path, refused):
    refused(lambda: array_record_format.write_tfds_metadata(tmp_path, "a/b", [1]), "a/b")
    refused(lambda: array_record_format.write_tfds_metadata(tmp_path / "no", "a", [1]), tmp_path / "no")


# --- the source


def test_source_reads_all_shards_in_order(folder):
    source = ArrayRecordSource(str(folder))
    assert len(source) == len(EXPECTED)
    names = [source.name(i) for i in range(len(source))]
    first, last = (array_record_format.shard_name("small", shard, 3) for shard in (0, 2))
    assert names == [f"{first}:{i}" for i in range(5)] + [f"{last}:{i}" for i in range(4)]
    for i, expected in enumerate(EXPECTED):
        assert source.read(i) == dataclasses.replace(expected, name=names[i])
        assert source.captions(i) == expected.captions
    np.testing.assert_array_equal(source[8].image, decode_image(EXPECTED[8].image))
    assert source.has_labels


def test_threads_processes_and_pickles_read_the_same(folder):
    source = ArrayRecordSource(str(folder))
    again = pickle.loads(pickle.dumps(source))
    assert again.identity() == source.identity()
    # Eight threads read the same few files, so they share readers.
    # Repeated reads in random order.
    order = np.random.default_rng(0).integers(0, len(source), 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(again.read, order))
    assert [r.image for r in read] == [EXPECTED[i].image for i in order]
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read(6).name, 'tensorflow_datasets' in sys.modules)"
    completed = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(source), capture_output=True, check=True, cwd=ROOT
    )
    assert completed.stdout.decode().split() == [source.name(6), "False"]


def test_more_files_than_are_kept_open(tmp_path, monkeypatch):
    # Ten files with room for three: readers are evicted while other threads use them.
    monkeypatch.setattr(array_record_format, "_OPEN_FILES", 3)
    for i in range(10):
        array_record_format.write_records(tmp_path / f"{i}.array_record", [make_record(i), make_record(i + 100)])
    source = ArrayRecordSource(str(tmp_path))
    # Linux lists the open descriptors of a process here.
    descriptors = lambda: len(os.listdir("/proc/self/fd"))
    before = descriptors()
    with ThreadPoolExecutor(6) as pool:
        names = [r.captions[0] for r in pool.map(source.read, list(range(20)) * 10)]
    assert names == [make_record(i // 2 + 100 * (i % 2)).captions[0] for i in range(20)] * 10
    assert descriptors() <= before + 3


def test_files_by_name_and_pattern(folder, tmp_path):
    shard = str(folder / array_record_format.shard_name("small", 2, 3))
    assert len(ArrayRecordSource(shard)) == 4
    # Braces, an address and a pattern name the same files.
    assert len(ArrayRecordSource(shard.replace("00002-of", "{00000..00002}-of"))) == 9
    assert len(ArrayRecordSource(f"file://{folder}/small-train*0000[02]-of-*")) == 9
    array_record_format.write_records(tmp_path / "plain.array_record", [make_record(0)])
    (tmp_path / "notes.txt").write_text("no records")
    assert ArrayRecordSource(str(tmp_path)).name(0) == "plain.array_record:0"


def test_identity_is_that_of_the_files_not_of_their_place(folder, tmp_path):
    # The module's fixture must not change.
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert ArrayRecordSource(str(copied)).identity() == ArrayRecordSource(str(folder)).identity()
    array_record_format.write_records(copied / array_record_format.shard_name("small", 1, 3), [make_record(0)])
    assert ArrayRecordSource(str(copied)).identity() != ArrayRecordSource(str(folder)).identity()


def test_captions_required_or_not(tmp_path):
    blank = [make_record(0, captions=()), make_record(1, captions=(" ", "")), make_record(2, captions=(" ", "b"))]
    array_record_format.write_records(tmp_path / "a.array_record", blank)
    source = ArrayRecordSource(str(tmp_path))
    for i, cause in enumerate(("caption_missing", "caption_empty")):
        for read in (source.read, source.captions):
            with pytest.raises(BadExample) as error:
                read(i)
            assert error.value.cause == cause
    # Blank captions are dropped where another one has text.
    assert source.captions(2) == ("b",)
    optional = ArrayRecordSource(str(tmp_path), caption_required=False)
    assert [optional.read(i).captions for i in range(3)] == [(), (), ("b",)]


def test_labels_are_there_or_not(tmp_path):
    array_record_format.write_records(tmp_path / "a.array_record", [make_record(i, label=-1) for i in range(3)])
    # Every record stores -1.
    assert not ArrayRecordSource(str(tmp_path)).has_labels
    array_record_format.write_records(tmp_path / "b.array_record", [make_record(0, label=0)])
    assert ArrayRecordSource(str(tmp_path)).has_labels


def test_records_that_are_no_examples_are_bad_ones(tmp_path):
    from tensorflow_datasets.proto import tf_example_pb2

    latin1_example = tf_example_pb2.Example()
    latin1_example.features.feature["image"].bytes_list.value.append(b"x")
    latin1_example.features.feature["captions"].bytes_list.value.append("ü".encode("latin-1"))
    write_raw(
        tmp_path / "a.array_record",
        [tf_example.serialize_record(make_record(0)), b"\xff" * 9, b"", latin1_example.SerializeToString()],
    )
    source = ArrayRecordSource(str(tmp_path))
    assert source.read(0).image == make_picture(0)
    for i, cause in ((1, "record_undecodable"), (2, "record_undecodable"), (3, "caption_undecodable")):
        with pytest.raises(BadExample) as error:
            source.read(i)
        assert error.value.cause == cause


def test_a_damaged_record_costs_only_itself(tmp_path):
    path = tmp_path / "a.array_record"
    array_record_format.write_records(path, [make_record(i) for i in range(5)])
    data = bytearray(path.read_bytes())
    offset = data.find(make_picture(2))
    assert offset > 0
    # Ten bytes into the image: ArrayRecord's checksum detects it, not the PNG decoder.
    data[offset + 10] ^= 255
    path.write_bytes(data)
    source = ArrayRecordSource(str(tmp_path))
    with pytest.raises(BadExample) as error:
        source.read(2)
    assert error.value.cause == "record_corrupt"
    assert [source.read(i).image for i in (1, 3, 4)] == [make_picture(i) for i in (1, 3, 4)]


def test_a_file_that_goes_away_makes_bad_examples(tmp_path):
    path = tmp_path / "a.array_record"
    array_record_format.write_records(path, [make_record(0)])
    # The copy has no open reader, which would keep the deleted file.
    source = pickle.loads(pickle.dumps(ArrayRecordSource(str(tmp_path))))
    path.unlink()
    with pytest.raises(BadExample) as error:
        source.read(0)
    assert error.value.cause == "record_corrupt"


def test_what_cannot_be_opened_says_so(folder, tmp_path, refused):
    refused(lambda: ArrayRecordSource("gs://bucket/a.array_record"), "gs://bucket", "copy", "tars")
    refused(lambda: ArrayRecordSource(str(tmp_path / "no")), tmp_path / "no", "not there")
    refused(lambda: ArrayRecordSource(""), "config.data.path")
    refused(lambda: ArrayRecordSource(str(tmp_path)), tmp_path, "no ArrayRecord file")
    refused(lambda: ArrayRecordSource(str(tmp_path / "*.array_record")), "matches no")
    for name, data in (("empty", b""), ("foreign", b"PK\3\4" * 1000), ("large", b"foo" * 100_000)):
        file = tmp_path / f"{name}.array_record"
        file.write_bytes(data)
        refused(lambda file=file: ArrayRecordSource(str(file)), file, "ArrayRecord")
    complete = (folder / array_record_format.shard_name("small", 0, 3)).read_bytes()
    # The footer lies at the end, so one missing byte is enough.
    for length in (len(complete) - 1, len(complete) // 2):
        (tmp_path / "cut.array_record").write_bytes(complete[:length])
        refused(lambda: ArrayRecordSource(str(tmp_path / "cut.array_record")), "cut.array_record", "cut short")
    array_record_format.write_records(tmp_path / "none.array_record", [])
    refused(lambda: ArrayRecordSource(str(tmp_path / "none.array_record")), "no example")


def test_incomplete_and_mixed_folders_are_refused(folder, tmp_path, refused):
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / array_record_format.shard_name("small", 1, 3)).unlink()
    refused(lambda: ArrayRecordSource(str(copied)), "lacks 1 of 3", "00001-of-00003")
    array_record_format.write_records(copied / array_record_format.shard_name("small", 0, 1, "test"), [make_record(0)])
    refused(lambda: ArrayRecordSource(str(copied)), "small-test", "small-train", "config.data.path")


def test_examples_of_another_format_point_to_tfds(tmp_path, refused):
    from tensorflow_datasets.proto import tf_example_pb2

    other = tf_example_pb2.Example()
    other.features.feature["video"].bytes_list.value.append(b"x")
    write_raw(tmp_path / "a.array_record", [other.SerializeToString()])
    refused(lambda: ArrayRecordSource(str(tmp_path)), "video", "tfds")
