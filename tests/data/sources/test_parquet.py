"""Parquet files in their usual forms: those of Hugging Face, tables of paths, and damaged ones."""

import json
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gigagan_jax.config import DataConfig, FilterConfig
from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.parquet import ParquetSource
from gigagan_jax.data.sources.parquet_schema import CAPTION_KEYS, IMAGE_KEYS
from gigagan_jax.data.storage import Storage
from tests.parquet_files import cause_of, make_columns, make_picture, write_table

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of 7, 0 and 4 rows in row groups of 3; not to be written to."""
    folder = tmp_path_factory.mktemp("parquet")
    write_table(folder / "a.parquet", make_columns(range(7)))
    write_table(folder / "b.parquet", pa.table(make_columns(range(7))).slice(0, 0))
    write_table(folder / "c.parquet", make_columns(range(7, 11)))
    return folder


# b.parquet has no row, so no name.
NAMES = [f"a.parquet:{i}" for i in range(7)] + [f"c.parquet:{i}" for i in range(4)]


def test_rows_of_all_files_in_order(folder):
    source = ParquetSource(str(folder))
    assert len(source) == 11
    # Backwards first: reads do not depend on an earlier one.
    for i in (10, 3, *range(11)):
        record = source.read(i)
        assert record.image == make_picture(i)
        assert record.captions == (f"caption {i} ü",) == source.captions(i)
        assert record.label == (i % 3 if i != 4 else -1)
        assert record.name == source.name(i) == NAMES[i]
    np.testing.assert_array_equal(source[5].image, decode_image(make_picture(5)))
    assert source.has_labels
    assert source.classes == ()


def test_chosen_rows(folder, refused):
    rows = np.array([0, 6, 7, 10])
    source = ParquetSource(str(folder), rows=rows)
    assert [source.name(i) for i in range(len(source))] == [NAMES[i] for i in rows]
    assert [source.read(i).image for i in range(4)] == [make_picture(i) for i in rows]
    # None and all rows are different data sets; so are other orders.
    others = [ParquetSource(str(folder), rows=r) for r in (None, np.arange(11), rows[:3], rows[::-1])]
    assert len({s.identity() for s in (source, *others)}) == 5
    refused(lambda: ParquetSource(str(folder), rows=np.array([3, 11])), "11 rows", "filter again")
    refused(lambda: ParquetSource(str(folder), rows=np.array([], int)), "no example is left")


def test_filters_choose_rows_through_the_config(tmp_path):
    # A null width fails the filter.
    path = write_table(tmp_path / "a.parquet", {**make_columns(range(6)), "WIDTH": [10, 700, 20, 800, 900, None]})
    source = make_source(DataConfig(path=path, filters=FilterConfig(min_width=512)))
    assert isinstance(source, ParquetSource)
    assert [source.read(i).image for i in range(len(source))] == [make_picture(i) for i in (1, 3, 4)]
    assert [count for _, count in source.filter_report["steps"]] == [6, 6, 3]


def test_what_hugging_face_datasets_write(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": make_picture(0), "path": "0.png"}, {"bytes": None, "path": "sub/1.png"}, None]
    # Empty bytes win over the path: they are an image file, if a bad one.
    images += [{"bytes": None, "path": None}, {"bytes": b"", "path": "sub/1.png"}]
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": pa.array(images, image),
            "text": pa.array(["a", "b", "c", "d", "e"], pa.large_string()),
            "label": [1, 0, -1, 1, 1],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    # Hugging Face datasets keeps the names of classes in the metadata of the schema.
    write_table(tmp_path / "data" / "train.parquet", table)
    (tmp_path / "data" / "sub").mkdir()
    (tmp_path / "data" / "sub" / "1.png").write_bytes(make_picture(1))
    source = ParquetSource(str(tmp_path / "data"))
    assert [source.read(i).image for i in (0, 1, 4)] == [make_picture(0), make_picture(1), b""]
    assert [source.read(i).label for i in (0, 1)] == [1, 0]
    assert source.classes == ("cat", "dog")
    assert cause_of(source.read, 2) == cause_of(source.read, 3) == "image_missing"


def test_paths_and_addresses(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes(make_picture(5))
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name in ("0.png", "sub/1.png", "~home.png", "..hidden.png"):
        (tmp_path / "data" / name).write_bytes(make_picture(len(name)))
    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/y.png", make_picture(6))
    # Names that look like a home folder or a parent folder are plain files.
    good = {
        "0.png": make_picture(5),
        "./sub/../sub/1.png": make_picture(9),
        "~home.png": make_picture(9),
        "..hidden.png": make_picture(12),
        str(elsewhere / "x.png"): make_picture(5),
        f"file://{elsewhere}/x.png": make_picture(5),
        "memory://pictures/y.png": make_picture(6),
    }
    # Paths that leave the folder are refused, whether or not a file is there.
    bad = {
        "../elsewhere/x.png": "unsafe_name",
        "sub/../../elsewhere/x.png": "unsafe_name",
        "..": "unsafe_name",
        "no.png": "image_unreadable",
        "sub": "image_unreadable",
        "sub/\0.png": "image_unreadable",
        "memory://pictures/no.png": "image_unreadable",
        "": "image_missing",
        None: "image_missing",
    }
    paths = [*good, *bad]
    write_table(tmp_path / "data" / "a.parquet", {"file_name": paths, "caption": ["x"] * len(paths)})
    source = ParquetSource(str(tmp_path / "data" / "a.parquet"))
    for i, image in enumerate(good.values()):
        assert source.read(i).image == image
        assert decode_image(image).shape == (4, 5, 3)
    for i, cause in enumerate(bad.values(), len(good)):
        assert cause_of(source.read, i) == cause
    # Captions do not need the image.
    assert [source.captions(i) for i in range(len(paths))] == [("x",)] * len(paths)


def test_paths_beside_a_file_named_without_its_folder(tmp_path, monkeypatch):
    write_table(tmp_path / "a.parquet", {"path": ["0.png", "~"], "caption": ["x", "y"]})
    (tmp_path / "0.png").write_bytes(make_picture(0))
    # The path of the Parquet file has no folder in it.
    monkeypatch.chdir(tmp_path)
    source = ParquetSource("a.parquet")
    # Fills the caches, which the pickle must leave out.
    assert source.read(0).image == make_picture(0)
    # "~" is a file name, not the home folder.
    assert cause_of(source.read, 1) == "image_unreadable"


def test_captions_of_all_kinds(tmp_path):
    table = {
        "image": [make_picture(i) for i in range(4)],
        "captions": pa.array([["a", " b "], [], None, ["", None, "c"]], pa.list_(pa.string())),
        "title": pa.array(["t", " ", None, "t"]).dictionary_encode(),
    }
    path = write_table(tmp_path / "a.parquet", table)
    expected = [("a", "b"), "caption_missing", "caption_missing", ("c",)]
    # With two columns, blank texts in one and nulls in the other count as empty.
    both = [("a", "b", "t"), "caption_empty", "caption_missing", ("c", "t")]
    for keys, expected_captions in (((), expected), (("captions", "title"), both)):
        source = ParquetSource(path, caption_keys=keys)
        optional = ParquetSource(path, caption_keys=keys, caption_required=False)
        for i, captions in enumerate(expected_captions):
            if isinstance(captions, tuple):
                assert source.captions(i) == source.read(i).captions == optional.read(i).captions == captions
            else:
                assert cause_of(source.captions, i) == cause_of(source.read, i) == captions
                assert optional.read(i).captions == optional.captions(i) == ()


def test_texts_that_are_not_utf8_are_bad_examples(tmp_path):
    def invalid_texts(*values):
        """A column whose bytes Arrow takes for text without a look."""
        data = pa.array(values, pa.binary())
        return pa.Array.from_buffers(pa.string(), len(values), data.buffers())

    table = {"path": invalid_texts(b"0.png", b"\xff.png"), "caption": invalid_texts(b"\xfcber", b"fine")}
    (tmp_path / "0.png").write_bytes(make_picture(0))
    source = ParquetSource(write_table(tmp_path / "a.parquet", table))
    assert cause_of(source.read, 0) == cause_of(source.captions, 0) == "caption_undecodable"
    assert cause_of(source.read, 1) == "image_unreadable"
    # A bad path does not spoil the caption.
    assert source.captions(1) == ("fine",)


@pytest.mark.parametrize("key", IMAGE_KEYS)
def test_images_are_found_by_their_usual_names(tmp_path, key):
    # A column named path may hold bytes too.
    kinds = [pa.binary(), pa.large_binary(), pa.binary_view()] if key != "path" else [pa.binary()]
    for kind in kinds:
        path = write_table(
            tmp_path / "a.parquet", {"x": [b"no"], key: pa.array([make_picture(0)], kind), "caption": ["c"]}
        )
        assert ParquetSource(path).read(0).image == make_picture(0)


@pytest.mark.parametrize("key", CAPTION_KEYS)
def test_captions_are_found_by_their_usual_names(tmp_path, key):
    path = write_table(tmp_path / "a.parquet", {"image": [b"i"], "other": ["no"], key: ["yes"]})
    assert ParquetSource(path).read(0).captions == ("yes",)
    assert ParquetSource(path, image_key="image", caption_keys=("other",)).captions(0) == ("no",)


def test_without_captions_and_labels(tmp_path, refused):
    path = write_table(tmp_path / "a.parquet", {"image": [b"i"], "label": ["cat"], "n": [7]})
    source = ParquetSource(path, caption_required=False)
    assert (source.read(0).captions, source.captions(0), source.read(0).label) == ((), (), -1)
    assert not source.has_labels
    # A text column named "label" is no class; another column can be named.
    assert ParquetSource(path, caption_required=False, label_key="n").read(0).label == 7
    refused(lambda: ParquetSource(path), path, "config.data.caption_keys", "n (int64)")


def test_threads_processes_and_pickles_read_the_same(folder):
    source = ParquetSource(str(folder))
    source.read(0)
    again = pickle.loads(pickle.dumps(source))
    assert again.identity() == source.identity()
    order = np.random.default_rng(0).integers(0, 11, 300).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [r.image for r in pool.map(again.read, order)] == [make_picture(i) for i in order]
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read(9).captions[0])"
    completed = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(source), capture_output=True, check=True, cwd=ROOT
    )
    assert completed.stdout.decode().strip() == "caption 9 ü"


def test_only_the_calling_thread_reads_a_file(folder, monkeypatch):
    source = ParquetSource(str(folder))
    threads = set()
    read = Storage.read

    def record(storage, *args):
        threads.add(threading.get_ident())
        return read(storage, *args)

    monkeypatch.setattr(Storage, "read", record)
    for i in range(11):
        source.read(i)
    # A thread of Arrow that holds a Python file aborts a process that ends meanwhile.
    assert threads == {threading.get_ident()}


def test_files_in_buckets(folder):
    memory = fsspec.filesystem("memory")
    for name in ("a", "b", "c"):
        memory.pipe(f"/bucket/set/{name}.parquet", (folder / f"{name}.parquet").read_bytes())
    # A folder, a star and braces name the same files.
    for path in ("memory://bucket/set", "memory://bucket/set/*.parquet", "memory://bucket/set/{a,b,c}.parquet"):
        source = ParquetSource(path)
        assert source.identity() == ParquetSource(str(folder)).identity()
        assert [source.read(i).image for i in (8, 2)] == [make_picture(8), make_picture(2)]


def test_what_cannot_be_read_says_so(folder, tmp_path, refused):
    refused(lambda: ParquetSource(str(tmp_path / "no.parquet")), "no.parquet", "No such file")
    refused(lambda: ParquetSource(str(tmp_path / "no")), tmp_path / "no", "not there")
    refused(lambda: ParquetSource(str(tmp_path)), "no .parquet file")
    refused(lambda: ParquetSource("memory://bucket/none/x.parquet"), "memory://bucket/none/x.parquet")
    complete = (folder / "a.parquet").read_bytes()
    for name, data in (
        ("cut", complete[:-5]),
        ("empty", b""),
        ("foreign", b"PK\3\4" * 100),
        ("noise", b"PAR1" + b"x" * 99),
    ):
        file = tmp_path / f"{name}.parquet"
        file.write_bytes(data)
        refused(lambda file=file: ParquetSource(str(file)), file, "cannot be read as Parquet")
    copied = shutil.copytree(folder, tmp_path / "copy")
    # The damage is in a later file than the first.
    (copied / "c.parquet").write_bytes(complete[: len(complete) // 2])
    refused(lambda: ParquetSource(str(copied)), copied / "c.parquet")
    refused(lambda: ParquetSource(str(folder / "b.parquet")), "no row")


def test_a_damaged_row_group_costs_only_its_rows(folder, tmp_path):
    path = tmp_path / "a.parquet"
    data = bytearray((folder / "a.parquet").read_bytes())
    # The middle one of three groups: its neighbours must stay readable.
    group = pq.read_metadata(folder / "a.parquet").row_group(1)
    for column in range(group.num_columns):
        chunk = group.column(column)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        # The header of the first page of each column.
        data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    source = ParquetSource(str(path))
    assert [source.read(i).image for i in (0, 2, 6)] == [make_picture(i) for i in (0, 2, 6)]
    for i in (3, 5):
        assert cause_of(source.read, i) == cause_of(source.captions, i) == "row_group_corrupt"


def test_a_file_that_goes_away_makes_bad_examples(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    source = pickle.loads(pickle.dumps(ParquetSource(str(copied))))
    (copied / "c.parquet").unlink()
    assert cause_of(source.read, 8) == "row_group_corrupt"
    assert source.read(1).image == make_picture(1)
    # Fewer rows than at the start: the old row numbers lead past the end.
    write_table(copied / "a.parquet", make_columns(range(2)))
    source = pickle.loads(pickle.dumps(source))
    assert cause_of(source.read, 2) == "row_group_corrupt"
    # Other columns than at the start.
    columns = make_columns(range(3))
    write_table(copied / "a.parquet", {name: columns[name] for name in list(columns)[:1]})
    source = pickle.loads(pickle.dumps(source))
    assert cause_of(source.read, 0) == "row_group_corrupt"


def test_columns_that_are_not_there_or_of_another_kind(folder, tmp_path, refused):
    at = str(folder / "a.parquet")
    refused(lambda: ParquetSource(at, image_key="picture"), at, "'picture'", "url (string)", "image (binary)")
    refused(lambda: ParquetSource(at, image_key="label"), at, "'label'", "neither image files nor paths")
    refused(lambda: ParquetSource(at, caption_keys=("caption", "alt")), at, "'alt'", "url (string)")
    refused(lambda: ParquetSource(at, caption_keys=("label",)), at, "'label' is no text")
    refused(lambda: ParquetSource(at, label_key="class"), at, "'class'", "label (int16)")
    refused(lambda: ParquetSource(at, label_key="url"), at, "'url' is no class number")
    # No column has one of the usual names.
    other = write_table(tmp_path / "other.parquet", {"x": [1], "caption": ["c"]})
    refused(lambda: ParquetSource(other), "image_bytes", "x (int64)", "config.data.image_key")

    copied = shutil.copytree(folder, tmp_path / "copy")
    write_table(copied / "c.parquet", {"image": [b"x"], "label": pa.array([1], pa.int16())})
    refused(lambda: ParquetSource(str(copied)), "c.parquet", "'caption'", "first file")
    write_table(copied / "c.parquet", {**make_columns([1]), "caption": [b"bytes"]})
    refused(lambda: ParquetSource(str(copied)), "c.parquet", "'caption'", "caption (binary)")


def test_files_may_differ_in_what_makes_no_difference(folder, tmp_path):
    """Writers choose types file by file: another width of integers, nothing but nulls, other columns."""
    copied = shutil.copytree(folder, tmp_path / "copy")
    columns = make_columns(range(7, 11))
    # A narrower label, only nulls as captions, and a column that the other files lack.
    columns |= {"label": np.arange(4, dtype=np.uint8), "caption": pa.nulls(4), "more": [1] * 4}
    write_table(copied / "c.parquet", columns)
    # The first file decides the columns; the third differs from it.
    source = ParquetSource(str(copied), caption_required=False)
    for i in range(4):
        assert source.read(7 + i).image == make_picture(7 + i)
        assert (source.read(7 + i).label, source.captions(7 + i)) == (i, ())
    assert source.captions(6) == ("caption 6 ü",)


def test_labels_out_of_range_are_bad_examples(tmp_path):
    # The ends of int32 and of the allowed range.
    table = {"image": [b"x"] * 4, "caption": ["c"] * 4, "label": [2**31 - 1, 2**31, -2, -1]}
    source = ParquetSource(write_table(tmp_path / "a.parquet", table))
    assert [source.read(i).label for i in (0, 3)] == [2**31 - 1, -1]
    assert cause_of(source.read, 1) == cause_of(source.read, 2) == "label_out_of_range"


def test_footers_that_are_mutated_never_end_the_process(tmp_path):
    """Runs in a separate process, because pyarrow may abort on metadata of single columns in a damaged footer."""
    path = write_table(tmp_path / "a.parquet", make_columns(range(7)))
    code = """if True:
        import sys, numpy as np
        from gigagan_jax.data.example import BadExample
        from gigagan_jax.data.sources.parquet import ParquetSource
        from gigagan_jax.core.errors import UserError
        data = open(sys.argv[1], "rb").read()
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        for seed in range(1000):
            rng, bad = np.random.default_rng(seed), bytearray(data)
            # One random byte of the footer, of its length or of the magic number.
            bad[rng.integers(footer, len(data))] = rng.integers(256)
            open(sys.argv[1], "wb").write(bad)
            try:
                source = ParquetSource(sys.argv[1])
                for i in range(len(source)):
                    try:
                        source.read(i)
                    except BadExample:
                        pass
            except UserError as e:
                assert len(str(e).splitlines()) == 1
        """
    completed = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (completed.returncode, completed.stderr[-800:]) == (0, "")


def test_a_column_that_occurs_twice(tmp_path, refused):
    arrays = [pa.array([make_picture(0)]), pa.array(["a"]), pa.array(["b"])]
    path = write_table(tmp_path / "a.parquet", pa.Table.from_arrays(arrays, names=["image", "caption", "caption"]))
    # A column of this name cannot be chosen.
    refused(lambda: ParquetSource(path), path, "several columns 'caption'")
