"""Data sets of TFDS: small ones that TFDS builds in this test, without TensorFlow."""

import io
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.config import DataConfig
from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.sources import array_record_format, make_source
from gigagan_jax.data.sources.tfds import TfdsSource

# Child processes run here, so that they import this checkout.
ROOT = Path(__file__).parents[3]


def make_picture(i):
    """JPEG file of 7 x 6 pixels."""
    file = io.BytesIO()
    # The grey level identifies the example.
    Image.fromarray(np.full((6, 7, 3), 20 * i, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def encode_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# A segmentation map is an image feature too, but no photograph.
MASK = encode_png(np.zeros((2, 2), np.uint8))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where TFDS keeps `tiny_scenes`: 7 and 2 examples with features of many kinds; not to be written to."""
    import tensorflow_datasets as tfds

    # TFDS needs no TensorFlow to write ArrayRecord.
    class TinyScenes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            f = tfds.features
            features = {
                "image": f.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "image/filename": f.Text(),
                "mask": f.LabeledImage(labels=3, shape=(None, None, 1)),
                "captions": f.Sequence({"id": np.int64, "text": f.Text()}),
                "nested": {"title": f.Text(), "score": np.float32},
                "tags": f.Sequence(f.Text()),
                "label": f.ClassLabel(names=["cat", "dog"]),
                "shot": np.int32,
            }
            return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(7), "test": self._generate_examples(2)}

        def _generate_examples(self, n):
            for i in range(n):
                yield (
                    i,
                    {
                        "image": io.BytesIO(make_picture(i)),
                        "image/filename": f"{i}.jpg",
                        "mask": io.BytesIO(MASK),
                        # None, one or two captions.
                        "captions": [{"id": j, "text": f"caption {i}.{j} ü"} for j in range(i % 3)],
                        "nested": {"title": f" title {i} " if i else "", "score": 0.5},
                        "tags": ["a", f"b{i}", "c"],
                        # The test split has no labels.
                        "label": i % 2 if n == 7 else -1,
                        "shot": 100 + i,
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # TFDS calls an old function of protobuf
        tfds.disable_progress_bar()
        TinyScenes(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def folder(data_dir):
    return data_dir / "tiny_scenes" / "1.2.0"


def index_of(record):
    """Which example it is: TFDS shuffles."""
    (i,) = (i for i in range(7) if make_picture(i) == record.image)
    return i


def cause_of(read, i):
    with pytest.raises(BadExample) as error:
        read(i)
    return error.value.cause


def test_by_name_and_by_folder(data_dir, folder):
    sources = [
        TfdsSource(name, data_dir=str(data_dir), caption_required=False)
        for name in ("tiny_scenes", "tiny_scenes:1.2.0", "tiny_scenes:1.*.*")
    ]
    sources.append(TfdsSource(str(folder), caption_required=False))
    sources.append(TfdsSource(f"file://{folder}", caption_required=False))
    assert len({source.identity() for source in sources}) == 1
    for source in sources:
        assert len(source) == 7
        records = [source.read(i) for i in range(7)]
        assert sorted(map(index_of, records)) == list(range(7))
        for i, record in enumerate(records):
            n = index_of(record)
            assert record.captions == tuple(f"caption {n}.{j} ü" for j in range(n % 3)) == source.captions(i)
            # TFDS shuffles while writing, so the number is read from the image.
            assert record.label == n % 2
            assert record.name == source.name(i) == f"tiny_scenes/train/{i}"
    np.testing.assert_array_equal(sources[0][2].image, decode_image(sources[0].read(2).image))
    assert sources[0].classes == ("cat", "dog")
    assert sources[0].has_labels
    assert "tensorflow" not in sys.modules


def test_examples_are_those_that_tfds_reads(folder):
    import tensorflow_datasets as tfds

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        builder = tfds.builder_from_directory(folder)
    # Encoded bytes are compared; decoders might differ.
    skip = {"image": tfds.decode.SkipDecoding(), "mask": tfds.decode.SkipDecoding()}
    # Expressions of TFDS cut across files.
    for split in ("train", "test", "train[2:5]", "train+test", "train[50%:]"):
        tfds_source = builder.as_data_source(split=split, decoders=skip)
        ours = TfdsSource(str(folder), split=split, caption_required=False)
        assert len(ours) == len(tfds_source) > 0
        for i, example in enumerate(tfds_source):
            assert ours.read(i).image == example["image"]
            assert ours.captions(i) == tuple(c.decode() for c in example["captions"]["text"])
            assert ours.read(i).label == example["label"]


def test_captions_by_key(folder):
    nested = TfdsSource(str(folder), caption_keys=("nested/title", "tags"), label_key="shot")
    for i in range(7):
        record = nested.read(i)
        n = index_of(record)
        assert record.captions == ((f"title {n}",) if n else ()) + ("a", f"b{n}", "c")
        assert record.label == 100 + n
    # A plain integer label has no names of classes.
    assert nested.classes == ()
    # Only example 0 has a blank title.
    empty = TfdsSource(str(folder), caption_keys=("nested/title",))
    # Every third example has no caption at all.
    missing = TfdsSource(str(folder))
    for i in range(7):
        n = index_of(TfdsSource(str(folder), caption_required=False).read(i))
        if n == 0:
            assert cause_of(empty.read, i) == cause_of(empty.captions, i) == "caption_empty"
        if n % 3 == 0:
            assert cause_of(missing.read, i) == cause_of(missing.captions, i) == "caption_missing"
        else:
            assert len(missing.read(i).captions) == n % 3


def test_a_split_without_labels(folder):
    source = TfdsSource(str(folder), split="test", caption_required=False)
    assert [source.read(i).label for i in range(2)] == [-1, -1]
    assert not source.has_labels


def test_identities_differ_by_split(folder):
    splits = ("train", "test", "train[:3]", "train[3:6]")
    # train[:3] and train[3:6] have one length, but other examples.
    assert len({TfdsSource(str(folder), split=s, caption_required=False).identity() for s in splits}) == 4


def test_threads_processes_and_pickles_read_the_same(folder):
    source = TfdsSource(str(folder), caption_required=False)
    # The parent reads first, so the pickle must leave open readers out.
    images = [source.read(i).image for i in range(7)]
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert [r.image for r in pool.map(again.read, list(range(7)) * 20)] == images * 20
    code = (
        "import pickle, sys; r = pickle.load(sys.stdin.buffer).read(5); "
        "print(r.name, len(r.image), 'tensorflow' in sys.modules)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(source), capture_output=True, check=True, cwd=ROOT
    )
    assert completed.stdout.decode().split() == ["tiny_scenes/train/5", str(len(images[5])), "False"]


def test_our_own_array_records_are_found_to_be_a_data_set_of_tfds(tmp_path):
    for shard in range(2):
        records = [Record(make_picture(i), (f"caption {i}",), -1, f"{i}.jpg") for i in (shard, shard + 2)]
        array_record_format.write_records(tmp_path / array_record_format.shard_name("mine", shard, 2), records)
    array_record_format.write_tfds_metadata(tmp_path, "mine", [2, 2])
    source = make_source(DataConfig(path=str(tmp_path)))
    assert isinstance(source, TfdsSource)
    # Shard by shard.
    assert [source.read(i).captions for i in range(4)] == [(f"caption {i}",) for i in (0, 2, 1, 3)]
    assert not source.has_labels


def test_what_cannot_be_found_says_how_to_get_it(data_dir, folder, tmp_path, refused):
    at = str(data_dir)
    refused(lambda: TfdsSource("coco_captions/2017:1.0.0", data_dir=at), "coco_captions/2017:1.0.0", at, "tfds build")
    refused(lambda: TfdsSource("imagenet2012", data_dir=at), "tfds build imagenet2012 --file_format=array_record")
    # A misspelt name, then names that no data set of TFDS has.
    refused(lambda: TfdsSource("imagnet2012", data_dir=at), "did you mean imagenet2012")
    refused(lambda: TfdsSource("photos/of_cats", data_dir=at), "photos/of_cats", "none of this name")
    refused(lambda: TfdsSource("photos/of/cats", data_dir=at), "photos/of/cats")
    # Another version is prepared, and the message names it.
    refused(lambda: TfdsSource("tiny_scenes:9.0.0", data_dir=at), "tiny_scenes:9.0.0", f"there is {folder}")
    refused(lambda: TfdsSource("gs://bucket/tiny/1.0.0"), "gs://bucket", "copy")
    refused(lambda: TfdsSource("tiny_scenes", data_dir="gs://bucket"), "gs://bucket", "copy")
    refused(lambda: TfdsSource(str(tmp_path / "no")), tmp_path / "no")
    refused(lambda: TfdsSource(str(tmp_path)), tmp_path, "dataset_info.json")
    # The folder above the data set.
    refused(lambda: TfdsSource(at), folder)
    assert "tensorflow" not in sys.modules


def test_unknown_splits_and_features_list_those_there(folder, refused):
    at = str(folder)
    refused(lambda: TfdsSource(at, split="tain"), "'tain'", "train, test")
    refused(lambda: TfdsSource(at, split="train[a:]"), "train[a:]", "train, test")
    refused(lambda: TfdsSource(at, split="train[7:]"), "no example", "train[7:]")
    refused(lambda: TfdsSource(at, image_key="picture"), "no feature 'picture'", "images: image;")
    refused(lambda: TfdsSource(at, image_key="mask"), "'mask' is no image", "images: image;")
    refused(lambda: TfdsSource(at, caption_keys=("captions/txt",)), "'captions/txt'", "captions/text", "nested/title")
    refused(lambda: TfdsSource(at, caption_keys=("captions/id",)), "'captions/id' is no text")
    refused(lambda: TfdsSource(at, label_key="class"), "no feature 'class'", "label, shot")
    refused(lambda: TfdsSource(at, label_key="nested/score"), "no class number", "label, shot")


def with_features(folder, copied, change):
    """A copy of a data set whose features.json is changed."""
    copied = shutil.copytree(folder, copied)
    file = copied / "features.json"
    features_json = json.loads(file.read_text())
    change(features_json["featuresDict"]["features"])
    file.write_text(json.dumps(features_json))
    return str(copied)


def test_several_images_none_and_no_captions(folder, tmp_path, refused):
    # Three image features now share the type.
    two = with_features(folder, tmp_path / "two", lambda f: f.update(left=f["image"], a=f["image"]))
    refused(lambda: TfdsSource(two), "a, image, left", "config.data.image_key")
    assert len(TfdsSource(two, image_key="image").read(1).image) > 0
    assert cause_of(TfdsSource(two, image_key="left").read, 0) == "image_missing"
    none = with_features(folder, tmp_path / "none", lambda f: f.pop("image"))
    refused(lambda: TfdsSource(none), "no image", "nested/title")
    silent = with_features(folder, tmp_path / "silent", lambda f: f.pop("captions"))
    refused(lambda: TfdsSource(silent), "config.data.caption_keys", "nested/title", "optional")
    assert TfdsSource(silent, caption_required=False).read(0).captions == ()


def test_other_formats_and_damaged_data_sets(folder, tmp_path, refused):
    copied = shutil.copytree(folder, tmp_path / "copy")
    info = copied / "dataset_info.json"
    text = info.read_text()

    info.write_text(text.replace('"fileFormat": "array_record"', '"fileFormat": "tfrecord"'))
    refused(lambda: TfdsSource(str(copied)), "tfrecord", "array_record", f"--dataset_version_dir={copied}")
    # tfrecord first and ArrayRecord as an alternative: the files of the alternative are read.
    both = '"alternativeFileFormats": ["array_record"], "fileFormat": "tfrecord"'
    info.write_text(text.replace('"fileFormat": "array_record"', both))
    assert len(TfdsSource(str(copied), caption_required=False).read(0).image) > 0

    # The metadata states one example more than the file holds.
    info.write_text(text.replace('"7"', '"8"'))
    refused(lambda: TfdsSource(str(copied)), "holds 7 examples", "says 8", "tiny_scenes-train")
    # Cut JSON.
    info.write_text(text[:100])
    refused(lambda: TfdsSource(str(copied)), copied, "cannot be opened")
    info.write_text(text)
    shard = copied / "tiny_scenes-train.array_record-00000-of-00001"
    data = shard.read_bytes()
    # One byte short.
    shard.write_bytes(data[:-1])
    refused(lambda: TfdsSource(str(copied)), shard, "cut short")
    shard.unlink()
    refused(lambda: TfdsSource(str(copied)), shard, "No such file")
    assert len(TfdsSource(str(copied), split="test", caption_required=False)) == 2
    (copied / "features.json").unlink()
    refused(lambda: TfdsSource(str(copied), split="test"), copied, "cannot be opened")
