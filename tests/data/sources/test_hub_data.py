"""Data sets by the package `datasets`, without a network: local folders that it prepares, and what it refuses."""

import sys
import warnings

import pytest

from gigagan_jax.data.sources.hub import HubSource
from tests.arrow_files import make_table
from tests.parquet_files import make_picture, write_table


@pytest.fixture(scope="module")
def datasets():
    """The package, with a cache of its own and no network."""
    # It reads its environment when it is imported.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    return datasets


@pytest.fixture
def offline(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_parquet(path, rows):
    table = make_table(rows)
    return write_table(path, {name: table.column(name) for name in table.column_names})


@pytest.fixture
def folder(tmp_path, offline):
    """A clone of a repository of the hub: ten rows for training in two files, two for testing."""
    clone = tmp_path / "clone"
    for k in range(2):
        write_parquet(clone / "data" / f"train-{k:05d}-of-00002.parquet", range(5 * k, 5 * k + 5))
    write_parquet(clone / "data" / "test-00000-of-00001.parquet", range(20, 22))
    (clone / "README.md").write_text("# A data set\n")
    return clone


def assert_rows(source, rows):
    assert [source.captions(i)[0] for i in range(len(source))] == [f"caption {row}" for row in rows]
    assert [source.read(i).image for i in range(len(source))] == [make_picture(row) for row in rows]


@pytest.mark.parametrize(
    "split, rows",
    [
        ("train", range(10)),
        ("test", range(20, 22)),
        ("train[:20%]", range(2)),
        ("test+train[5:7]", [20, 21, 5, 6]),
        ("train[1:2]+test+train[3:4]", [1, 20, 21, 3]),
    ],
)
def test_splits_and_parts_of_them(folder, split, rows):
    source = HubSource(str(folder), split=split)
    assert_rows(source, rows)
    assert source.splits == ("train", "test")
    assert source.identity() == HubSource(str(folder), split=split).identity()


def test_images_are_not_decoded_by_the_package(folder, tmp_path):
    """A folder of images: the package notes their paths, and the files are read as they are."""
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        (tmp_path / "images" / "train" / name / "a.png").write_bytes(make_picture(k))
    source = HubSource(str(tmp_path / "images"), caption_required=False)
    assert source.classes == ("cat", "dog")
    assert [(source.read(i).image, source.read(i).label) for i in range(2)] == [(make_picture(i), i) for i in range(2)]


def test_configurations(tmp_path, offline, refused):
    for name, rows in (("small", range(2)), ("large", range(5))):
        write_parquet(tmp_path / "x" / name / "train.parquet", rows)
    parts = [f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in ("small", "large")]
    (tmp_path / "x" / "README.md").write_text(f"---\nconfigs:\n{''.join(parts)}---\n")
    refused(lambda: HubSource(str(tmp_path / "x")), "several configurations (small, large)", "/x:CONFIGURATION")
    assert_rows(HubSource(f"{tmp_path / 'x'}:large"), range(5))


def test_what_is_refused(folder, tmp_path, refused):
    refused(lambda: HubSource(str(folder), split="val"), "no split 'val'", "config.data.split", "train, test")
    refused(lambda: HubSource(str(folder), split="val[:3]"), "config.data.split=val[:3]", "train, test")
    refused(lambda: HubSource(str(folder), caption_keys=("alt",)), "'alt'", "text (string)")
    for name in ("org/name", "hf://datasets/org/name", "org/name:large@main"):
        refused(lambda name=name: HubSource(name), name, "cache does not hold it", "HF_HUB_OFFLINE")
    refused(lambda: HubSource("a b/c"), "no id of the hub")
    (tmp_path / "empty").mkdir()
    refused(lambda: HubSource(str(tmp_path / "empty")), tmp_path / "empty", "cannot be prepared")


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda d: d.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
            "the hub has no such data set",
        ),
        (lambda d: d.exceptions.DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub."), "is gated"),
        (lambda d: RuntimeError("Dataset scripts are no longer supported, but found x.py"), "scripts are no longer"),
        (lambda d: ConnectionError("Couldn't reach 'org/name' on the Hub"), "cannot be reached"),
    ],
)
def test_answers_of_the_hub(datasets, offline, monkeypatch, refused, make, words):
    def answer(*args, **kwargs):
        raise make(datasets)

    # The hub's answers need a network; their messages are those of the package.
    monkeypatch.setattr(datasets, "load_dataset", answer)
    refused(lambda: HubSource("org/name"), "org/name", words)


def test_without_the_package(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: HubSource("org/name"), "org/name", "pip install -e '.[hub]'", "hf download")
