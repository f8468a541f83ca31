"""The same photographs as tars, folder, ArrayRecord, Parquet and TFDS give the same batches for the same seed."""

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
from gigagan_jax.preparation.convert import convert_source
from gigagan_jax.preparation.output import Output


def write_folder(examples, folder):
    for i, (image, caption) in enumerate(examples):
        # Names in the order of the tars: folders are sorted by name.
        (folder / f"{i:04d}.jpg").write_bytes(image)
        (folder / f"{i:04d}.txt").write_text(caption)
    return folder


def write_parquet(examples, folder):
    for i in range(0, len(examples), 10):
        images, captions = zip(*examples[i : i + 10], strict=True)
        table = pyarrow.table({"url": captions, "jpg": images, "caption": captions})
        # Row groups of 4: reads cross their borders.
        pyarrow.parquet.write_table(table, folder / f"{i:05d}.parquet", row_group_size=4)
    return folder


def write_tfds(examples, folder):
    import tensorflow_datasets as tfds

    class SomePhotos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(encoding_format="jpeg"), "caption": tfds.features.Text()}
            features = tfds.features.FeaturesDict(features)
            # TFDS would otherwise order examples by a hash of their keys.
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (image, caption) in enumerate(examples):
                yield i, {"image": io.BytesIO(image), "caption": caption}

    # TFDS calls a deprecated function of protobuf.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        tfds.disable_progress_bar()
        SomePhotos(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "some_photos" / "1.0.0"


def write_array_records(tars, folder):
    convert_source(TarSource(str(tars)), Output(str(folder)), "arrayrecord", shard_size=9, workers=1, quiet=True)
    # The folder itself is also a TFDS data set, and would be opened as one.
    return folder / "*.array_record*"


def read_batches(path, kind, workers=0):
    source = make_source(DataConfig(path=str(path)), workers=1)
    assert type(source).__name__ == kind
    # Every kind of randomness, so that the draws must match too.
    options = {"crop": "random", "flip": True, "caption_dropout": 0.2, "num_workers": workers, "num_threads": 2}
    with pipeline.build_pipeline(
        source, resolution=16, batch_size=8, seed=3, tokenizer=ByteTokenizer(40), **options
    ) as data:
        # Six batches of 8 are two epochs of 24.
        return list(itertools.islice(data, 6))


@pytest.fixture(scope="module")
def stored_examples(tars):
    """(JPEG file, caption) in the order of the tars."""
    source = TarSource(str(tars))
    return [(record.image, record.captions[0]) for record in map(source.read, range(len(source)))]


@pytest.fixture(scope="module")
def expected_batches(tars):
    return read_batches(tars, "TarSource")


@pytest.mark.parametrize("kind", ["FolderSource", "ParquetSource", "ArrayRecordSource", "TfdsSource"])
def test_the_same_batches_from_every_kind(kind, stored_examples, expected_batches, tars, tmp_path):
    path = {
        "FolderSource": lambda: write_folder(stored_examples, tmp_path),
        "ParquetSource": lambda: write_parquet(stored_examples, tmp_path),
        "ArrayRecordSource": lambda: write_array_records(tars, tmp_path),
        "TfdsSource": lambda: write_tfds(stored_examples, tmp_path),
    }[kind]()
    # Six different batches: equality below is no accident.
    assert len({batch["image"].tobytes() for batch in expected_batches}) == 6
    # In this process, then in a worker, which receives the source by pickle.
    found = read_batches(path, kind) + read_batches(path, kind, workers=1)
    for a, b in zip(expected_batches * 2, found, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
