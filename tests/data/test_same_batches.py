"""The same photographs as tars, folder, ArrayRecord, Parquet and TFDS: the same batches for the same seed."""

import io
import itertools
import warnings

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gigagan_jax.config import DataConfig
from gigagan_jax.data import pipeline
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.preparation.convert import convert
from gigagan_jax.preparation.output import Output


def write_folder(examples, folder):
    for i, (image, caption) in enumerate(examples):
        (folder / f"{i:04d}.jpg").write_bytes(image)
        (folder / f"{i:04d}.txt").write_text(caption)
    return folder


def write_parquet(examples, folder):
    for i in range(0, len(examples), 10):
        images, captions = zip(*examples[i : i + 10], strict=True)
        table = pyarrow.table({"url": captions, "jpg": images, "caption": captions})
        pyarrow.parquet.write_table(table, folder / f"{i:05d}.parquet", row_group_size=4)
    return folder


def write_tfds(examples, folder):
    import tensorflow_datasets as tfds

    class SomePhotos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(encoding_format="jpeg"), "caption": tfds.features.Text()}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (image, caption) in enumerate(examples):
                yield i, {"image": io.BytesIO(image), "caption": caption}

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # TFDS calls an old function of protobuf
        tfds.disable_progress_bar()
        SomePhotos(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "some_photos" / "1.0.0"


def write_array_records(tars, folder):
    convert(TarSource(str(tars)), Output(str(folder)), "arrayrecord", shard_size=9, workers=1, quiet=True)
    return folder / "*.array_record*"  # the folder by itself is read as what it also is: a TFDS data set


def batches(path, kind, workers=0):
    source = make_source(DataConfig(path=str(path)), workers=1)
    assert type(source).__name__ == kind
    options = {"crop": "random", "flip": True, "caption_dropout": 0.2, "num_workers": workers, "num_threads": 2}
    with pipeline.build(
        source, resolution=16, batch_size=8, seed=3, tokenizer=ByteTokenizer(40), **options
    ) as data:  # two epochs
        return list(itertools.islice(data, 6))


@pytest.fixture(scope="module")
def examples(tars):
    """(JPEG file, caption) in the order of the tars."""
    source = TarSource(str(tars))
    return [(record.image, record.captions[0]) for record in map(source.read, range(len(source)))]


@pytest.fixture(scope="module")
def expected(tars):
    return batches(tars, "TarSource")


@pytest.mark.parametrize("kind", ["FolderSource", "ParquetSource", "ArrayRecordSource", "TfdsSource"])
def test_the_same_batches_from_every_kind(kind, examples, expected, tars, tmp_path):
    path = {
        "FolderSource": lambda: write_folder(examples, tmp_path),
        "ParquetSource": lambda: write_parquet(examples, tmp_path),
        "ArrayRecordSource": lambda: write_array_records(tars, tmp_path),
        "TfdsSource": lambda: write_tfds(examples, tmp_path),
    }[kind]()
    assert len({batch["image"].tobytes() for batch in expected}) == 6
    found = batches(path, kind) + batches(path, kind, workers=1)
    for a, b in zip(expected * 2, found, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
