"""Arrow files of Hugging Face data sets: layouts, splits, orders, and damage."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from gigagan_jax.config import DataConfig
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.arrow import ArrowSource
from tests.arrow_files import FEATURES, make_table, save_dict, save_split, write_arrow
from tests.parquet_files import cause_of, make_picture

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """11 rows for training in two files, 3 for testing."""
    return save_dict(tmp_path_factory.mktemp("saved"), train=[range(7), range(7, 11)], test=[range(20, 23)])


def assert_rows(source, rows):
    assert len(source) == len(rows)
    for i, row in enumerate(rows):
        record = source.read(i)
        assert (record.image, record.captions, record.label) == (make_picture(row), (f"caption {row}",), row % 3)
        assert source.captions(i) == record.captions


def test_rows_of_a_saved_data_set(saved):
    source = ArrowSource(str(saved))
    assert_rows(source, range(11))
    assert_rows(pickle.loads(pickle.dumps(source)), range(11))
    assert [source.name(i) for i in (0, 6, 7)] == [
        "data-00000-of-00002.arrow:0", "data-00000-of-00002.arrow:6", "data-00001-of-00002.arrow:0",
    ]  # fmt: skip
    assert (source.split, source.splits, source.classes) == ("train", ("train", "test"), ("cat", "dog", "fox"))
    assert_rows(ArrowSource(str(saved), split="test"), range(20, 23))
    assert_rows(make_source(DataConfig(path=str(saved), split="test")), range(20, 23))


def test_the_layouts(saved, tmp_path):
    identity = ArrowSource(str(saved / "train")).identity()
    assert ArrowSource(str(saved)).identity() == identity == "7147aa95f4523ab2"
    moved = shutil.copytree(saved, tmp_path / "moved")
    assert ArrowSource(str(moved)).identity() == identity
    # A pattern, and a folder without any description: all files.
    assert_rows(ArrowSource(str(saved / "train" / "*.arrow")), range(11))
    for name in ("state.json", "dataset_info.json"):
        (moved / "train" / name).unlink()
    for path in (moved / "train", moved / "train" / "*.arrow"):
        assert_rows(make_source(DataConfig(path=str(path))), range(11))
    # Names of classes are in the schema, or in dataset_info.json.
    plain = save_split(tmp_path / "plain", [range(4)], features=False)
    assert ArrowSource(str(plain)).classes == ("cat", "dog", "fox")
    (plain / "dataset_info.json").unlink()
    assert ArrowSource(str(plain)).classes == ()
    # The form for random access.
    assert_rows(ArrowSource(write_arrow(tmp_path / "a.arrow", make_table(range(8)), stream=False)), range(8))


def test_the_cache_of_datasets(tmp_path, refused):
    write_arrow(tmp_path / "name-train-00000-of-00002.arrow", make_table(range(4)))
    write_arrow(tmp_path / "name-train-00001-of-00002.arrow", make_table(range(4, 6)))
    write_arrow(tmp_path / "name-validation.arrow", make_table(range(9, 11)))
    # A result of `map`.
    write_arrow(tmp_path / "cache-0123456789.arrow", make_table(range(3)))
    about = {"features": FEATURES, "splits": {"train": {}, "validation": {}, "test": {}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(about))
    assert_rows(make_source(DataConfig(path=str(tmp_path))), range(6))
    assert_rows(ArrowSource(str(tmp_path), split="validation"), range(9, 11))
    refused(
        lambda: ArrowSource(str(tmp_path), split="test"), "no split 'test'", "config.data.split", "train, validation"
    )


@pytest.mark.parametrize("key", ["_indices_data_files", "_indices_files"])
def test_an_order_of_the_rows(tmp_path, key, refused):
    folder = save_split(tmp_path / "x", [range(5), range(5, 8)], **{key: [{"filename": "indices.arrow"}]})
    order = [6, 0, 0, 7]
    write = lambda values: write_arrow(folder / "indices.arrow", pa.table({"indices": values}), batch=3)
    write(pa.array(order, pa.uint64()))
    source = ArrowSource(str(folder))
    assert_rows(source, order)
    assert source.name(0) == "data-00001-of-00002.arrow:1"
    write(pa.array([6, 0, 0, 6], pa.uint64()))
    assert ArrowSource(str(folder)).identity() != source.identity()
    write(pa.array([8], pa.uint64()))
    refused(lambda: ArrowSource(str(folder)), folder, "8 rows", "order names others")
    write(pa.array([None], pa.uint64()))
    refused(lambda: ArrowSource(str(folder)), "indices.arrow", "nulls")
    write(pa.array(["a"]))
    refused(lambda: ArrowSource(str(folder)), "indices.arrow", "no order of rows", "indices (string)")
    (folder / "indices.arrow").unlink()
    refused(lambda: ArrowSource(str(folder)), "indices.arrow is not there", "state.json lists it")


def test_images_by_path(tmp_path):
    table = pa.table({"image": [{"bytes": None, "path": p} for p in ("p/1.png", "../x.png", None)], "text": ["a"] * 3})
    source = ArrowSource(write_arrow(tmp_path / "a.arrow", table))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "1.png").write_bytes(make_picture(1))
    assert source.read(0).image == make_picture(1)
    assert [cause_of(source.read, i) for i in (1, 2)] == ["unsafe_name", "image_missing"]


def test_what_cannot_be_read_says_so(saved, tmp_path, refused):
    refused(lambda: ArrowSource("s3://bucket/x.arrow"), "local disks only")
    refused(lambda: ArrowSource(str(tmp_path)), tmp_path, "no .arrow file")
    refused(lambda: ArrowSource(str(saved), split="val"), "no split 'val'", "train, test")
    refused(lambda: ArrowSource(str(saved), image_key="picture"), "'picture'", "text (string)", "config.data.image_key")
    refused(lambda: ArrowSource(str(saved), caption_keys=("alt",)), "'alt'", "text (string)")
    whole = (saved / "train" / "data-00000-of-00002.arrow").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name, data, words in (
        ("empty", b"", ["cannot be read as Arrow"]),
        ("noise", b"PK\3\4" * 100, ["cannot be read as Arrow"]),
        ("cut", whole[: len(whole) // 2], ["cannot be read as Arrow"]),
        ("pointer", pointer, ["pointer of Git LFS", f"`git lfs pull` in {tmp_path}"]),
    ):
        (tmp_path / f"{name}.arrow").write_bytes(data)
        refused(lambda name=name: ArrowSource(str(tmp_path / f"{name}.arrow")), f"{name}.arrow", *words)
    refused(lambda: ArrowSource(write_arrow(tmp_path / "none.arrow", make_table([0]).slice(0, 0))), "no row")
    copied = shutil.copytree(saved, tmp_path / "copy")
    write_arrow(copied / "train" / "data-00001-of-00002.arrow", make_table(range(2)).drop_columns(["text"]))
    refused(lambda: ArrowSource(str(copied)), "data-00001", "'text'", "first file")
    (copied / "train" / "data-00001-of-00002.arrow").unlink()
    refused(lambda: ArrowSource(str(copied)), "data-00001-of-00002.arrow is not there", "state.json")
    for text in ("", "[]", '{"splits": 1}', '{"splits": []}', '{"splits": ["gone"]}'):
        (copied / "dataset_dict.json").write_text(text)
        refused(lambda: ArrowSource(str(copied)), copied)


def test_texts_that_are_not_utf8_are_bad_examples(tmp_path):
    table = make_table(range(4))
    text = pa.array([b"a", b"\xff", b"c", None]).cast(pa.binary()).view(pa.string())
    source = ArrowSource(write_arrow(tmp_path / "a.arrow", table.set_column(1, "text", text), batch=4))
    assert source.read(2).captions == ("c",)
    assert cause_of(source.read, 1) == "caption_undecodable"
    assert cause_of(source.read, 3) == "caption_missing"


@pytest.mark.slow
def test_mutated_files_never_end_the_process(tmp_path):
    """Runs in a separate process: an offset that leads out of a batch would end it."""
    path = write_arrow(tmp_path / "a.arrow", make_table(range(7)))
    code = """if True:
        import sys, numpy as np
        from gigagan_jax.core.errors import UserError
        from gigagan_jax.data.example import BadExample
        from gigagan_jax.data.sources.arrow import ArrowSource
        data = open(sys.argv[1], "rb").read()
        outcomes = {"good": 0, "bad": 0, "refused": 0}
        for seed in range(1500):
            rng, bad = np.random.default_rng(seed), bytearray(data)
            for _ in range(1 + seed % 3):
                bad[rng.integers(len(data))] = rng.integers(256)
            if seed % 10 == 0:
                del bad[rng.integers(len(bad)):]
            path = f"{sys.argv[1]}.{seed}.arrow"
            open(path, "wb").write(bad)
            try:
                source = ArrowSource(path)
                for i in range(len(source)):
                    try:
                        source.read(i)
                        outcomes["good"] += 1
                    except BadExample:
                        outcomes["bad"] += 1
            except UserError as e:
                assert len(str(e).splitlines()) == 1
                outcomes["refused"] += 1
        assert min(outcomes.values()) > 20, outcomes
        """
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr[-800:]) == (0, "")
