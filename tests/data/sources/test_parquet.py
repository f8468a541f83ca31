"""Parquet files as people have them: Hugging Face's, tables of paths, large and damaged ones."""

import io
import json
import logging
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
from PIL import Image

from gigagan_jax.config import DataConfig, FilterConfig
from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources import parquet as module
from gigagan_jax.data.sources.parquet import CAPTION_KEYS, IMAGE_KEYS, ParquetSource

ROOT = Path(__file__).parents[3]


def picture(i):
    """PNG file of 5 x 4 pixels."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path, columns, row_group_size=3, **options):
    """Writes a table; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, **options)
    return str(path)


def columns(rows):
    return {
        "url": [f"https://example.org/{i}" for i in rows],
        "image": [picture(i) for i in rows],
        "caption": [f" caption {i} ü " for i in rows],
        "label": pa.array([i % 3 if i != 4 else None for i in rows], pa.int16()),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of 7, 0 and 4 rows in row groups of 3; not to be written to."""
    folder = tmp_path_factory.mktemp("parquet")
    write(folder / "a.parquet", columns(range(7)))
    write(folder / "b.parquet", pa.table(columns(range(7))).slice(0, 0))
    write(folder / "c.parquet", columns(range(7, 11)))
    return folder


NAMES = [f"a.parquet:{i}" for i in range(7)] + [f"c.parquet:{i}" for i in range(4)]


def cause_of(read, i):
    with pytest.raises(BadExample) as error:
        read(i)
    return error.value.cause


def test_rows_of_all_files_in_order(folder):
    source = ParquetSource(str(folder))
    assert len(source) == 11
    for i in (10, 3, *range(11)):
        record = source.read(i)
        assert record.image == picture(i)
        assert record.captions == (f"caption {i} ü",) == source.captions(i)
        assert record.label == (i % 3 if i != 4 else -1)
        assert record.name == source.name(i) == NAMES[i]
    np.testing.assert_array_equal(source[5].image, decode_image(picture(5)))
    assert source.has_labels
    assert source.classes == ()


def test_chosen_rows(folder, refused):
    rows = np.array([0, 6, 7, 10])
    source = ParquetSource(str(folder), rows=rows)
    assert [source.name(i) for i in range(len(source))] == [NAMES[i] for i in rows]
    assert [source.read(i).image for i in range(4)] == [picture(i) for i in rows]
    others = [ParquetSource(str(folder), rows=r) for r in (None, np.arange(11), rows[:3], rows[::-1])]
    assert len({s.identity() for s in (source, *others)}) == 5
    refused(lambda: ParquetSource(str(folder), rows=np.array([3, 11])), "11 rows", "filter again")
    refused(lambda: ParquetSource(str(folder), rows=np.array([], int)), "no example is left")


def test_filters_choose_rows_through_the_config(tmp_path):
    path = write(tmp_path / "a.parquet", {**columns(range(6)), "WIDTH": [10, 700, 20, 800, 900, None]})
    source = make_source(DataConfig(path=path, filters=FilterConfig(min_width=512)))
    assert isinstance(source, ParquetSource)
    assert [source.read(i).image for i in range(len(source))] == [picture(i) for i in (1, 3, 4)]


def test_what_hugging_face_datasets_write(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": picture(0), "path": "0.png"}, {"bytes": None, "path": "sub/1.png"}, None]
    images += [{"bytes": None, "path": None}, {"bytes": b"", "path": "sub/1.png"}]
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": pa.array(images, image),
            "text": pa.array(["a", "b", "c", "d", "e"], pa.large_string()),
            "label": [1, 0, -1, 1, 1],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    write(tmp_path / "data" / "train.parquet", table)
    (tmp_path / "data" / "sub").mkdir()
    (tmp_path / "data" / "sub" / "1.png").write_bytes(picture(1))
    source = ParquetSource(str(tmp_path / "data"))
    assert [source.read(i).image for i in (0, 1, 4)] == [picture(0), picture(1), b""]
    assert [source.read(i).label for i in (0, 1)] == [1, 0]
    assert source.classes == ("cat", "dog")
    assert cause_of(source.read, 2) == cause_of(source.read, 3) == "image_missing"


def test_paths_and_addresses(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes(picture(5))
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name in ("0.png", "sub/1.png", "~home.png", "..hidden.png"):
        (tmp_path / "data" / name).write_bytes(picture(len(name)))
    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/y.png", picture(6))
    good = {
        "0.png": picture(5),
        "./sub/../sub/1.png": picture(9),
        "~home.png": picture(9),
        "..hidden.png": picture(12),
        str(elsewhere / "x.png"): picture(5),
        f"file://{elsewhere}/x.png": picture(5),
        "memory://pictures/y.png": picture(6),
    }
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
    write(tmp_path / "data" / "a.parquet", {"file_name": paths, "caption": ["x"] * len(paths)})
    source = ParquetSource(str(tmp_path / "data" / "a.parquet"))
    for i, image in enumerate(good.values()):
        assert source.read(i).image == image
        assert decode_image(image).shape == (4, 5, 3)
    for i, cause in enumerate(bad.values(), len(good)):
        assert cause_of(source.read, i) == cause
    assert [source.captions(i) for i in range(len(paths))] == [("x",)] * len(paths)


def test_paths_beside_a_file_named_without_its_folder(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", {"path": ["0.png", "~"], "caption": ["x", "y"]})
    (tmp_path / "0.png").write_bytes(picture(0))
    monkeypatch.chdir(tmp_path)
    source = ParquetSource("a.parquet")
    assert source.read(0).image == picture(0)
    assert cause_of(source.read, 1) == "image_unreadable"  # not the home folder


def test_captions_of_all_kinds(tmp_path):
    table = {
        "image": [picture(i) for i in range(4)],
        "captions": pa.array([["a", " b "], [], None, ["", None, "c"]], pa.list_(pa.string())),
        "title": pa.array(["t", " ", None, "t"]).dictionary_encode(),
    }
    path = write(tmp_path / "a.parquet", table)
    expected = [("a", "b"), "caption_missing", "caption_missing", ("c",)]
    both = [("a", "b", "t"), "caption_empty", "caption_missing", ("c", "t")]
    for keys, wanted in (((), expected), (("captions", "title"), both)):
        source = ParquetSource(path, caption_keys=keys)
        optional = ParquetSource(path, caption_keys=keys, caption_required=False)
        for i, captions in enumerate(wanted):
            if isinstance(captions, tuple):
                assert source.captions(i) == source.read(i).captions == optional.read(i).captions == captions
            else:
                assert cause_of(source.captions, i) == cause_of(source.read, i) == captions
                assert optional.read(i).captions == optional.captions(i) == ()


def test_texts_that_are_not_utf8_are_bad_examples(tmp_path):
    def texts(*values):
        """A column whose bytes Arrow takes for text without a look."""
        data = pa.array(values, pa.binary())
        return pa.Array.from_buffers(pa.string(), len(values), data.buffers())

    table = {"path": texts(b"0.png", b"\xff.png"), "caption": texts(b"\xfcber", b"fine")}
    (tmp_path / "0.png").write_bytes(picture(0))
    source = ParquetSource(write(tmp_path / "a.parquet", table))
    assert cause_of(source.read, 0) == cause_of(source.captions, 0) == "caption_undecodable"
    assert cause_of(source.read, 1) == "image_unreadable"
    assert source.captions(1) == ("fine",)


@pytest.mark.parametrize("key", IMAGE_KEYS)
def test_images_are_found_by_their_usual_names(tmp_path, key):
    kinds = [pa.binary(), pa.large_binary(), pa.binary_view()] if key != "path" else [pa.binary()]
    for kind in kinds:
        path = write(tmp_path / "a.parquet", {"x": [b"no"], key: pa.array([picture(0)], kind), "caption": ["c"]})
        assert ParquetSource(path).read(0).image == picture(0)


@pytest.mark.parametrize("key", CAPTION_KEYS)
def test_captions_are_found_by_their_usual_names(tmp_path, key):
    path = write(tmp_path / "a.parquet", {"image": [b"i"], "other": ["no"], key: ["yes"]})
    assert ParquetSource(path).read(0).captions == ("yes",)
    assert ParquetSource(path, image_key="image", caption_keys=("other",)).captions(0) == ("no",)


def test_without_captions_and_labels(tmp_path, refused):
    path = write(tmp_path / "a.parquet", {"image": [b"i"], "label": ["cat"], "n": [7]})
    source = ParquetSource(path, caption_required=False)
    assert (source.read(0).captions, source.captions(0), source.read(0).label) == ((), (), -1)
    assert not source.has_labels
    assert ParquetSource(path, caption_required=False, label_key="n").read(0).label == 7
    refused(lambda: ParquetSource(path), path, "config.data.caption_keys", "n (int64)")


def test_threads_processes_and_pickles_read_the_same(folder):
    source = ParquetSource(str(folder))
    source.read(0)
    again = pickle.loads(pickle.dumps(source))
    assert again.identity() == source.identity()
    order = np.random.default_rng(0).integers(0, 11, 300).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [r.image for r in pool.map(again.read, order)] == [picture(i) for i in order]
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read(9).captions[0])"
    out = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(source), capture_output=True, check=True, cwd=ROOT
    )
    assert out.stdout.decode().strip() == "caption 9 ü"


def test_files_in_buckets(folder):
    memory = fsspec.filesystem("memory")
    for name in ("a", "b", "c"):
        memory.pipe(f"/bucket/set/{name}.parquet", (folder / f"{name}.parquet").read_bytes())
    for path in ("memory://bucket/set", "memory://bucket/set/*.parquet", "memory://bucket/set/{a,b,c}.parquet"):
        source = ParquetSource(path)
        assert source.identity() == ParquetSource(str(folder)).identity()
        assert [source.read(i).image for i in (8, 2)] == [picture(8), picture(2)]


def test_row_groups_are_kept_and_let_go(tmp_path):
    """What is read twice is loaded once; what no longer fits is loaded again; the last one is always kept."""
    path = tmp_path / "a.parquet"
    write(path, columns(range(9)))
    source = ParquetSource(str(path))
    bytes_of_group = source._load(str(path), 0, source._columns).nbytes
    saved = path.read_bytes()

    source._tables = module._Kept(int(2.5 * bytes_of_group))
    for i in (0, 3, 0, 6):  # the second group is the one not asked for longest
        source.read(i)
    path.write_bytes(b"")
    source._storage = type(source._storage)()
    assert [source.read(i).image for i in (0, 8)] == [picture(0), picture(8)]
    assert source.captions(2) == ("caption 2 ü",)  # without another read
    assert cause_of(source.read, 3) == "row_group_corrupt"

    path.write_bytes(saved)
    source._tables = module._Kept(1)
    for i in (0, 3, 1):
        source.read(i)
    path.write_bytes(b"")
    source._storage = type(source._storage)()
    assert source.read(2).image == picture(2)
    assert cause_of(source.read, 3) == "row_group_corrupt"


def test_threads_that_want_the_same_wait_for_one():
    kept = module._Kept(100)
    start, calls = threading.Barrier(8), []
    loading = threading.Event()

    def load():
        calls.append(1)
        loading.wait(10)
        return "value"

    def ask(_):
        start.wait(10)
        return kept.get("key", load, len)

    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(ask, i) for i in range(8)]
        pool.submit(loading.set)
        assert [a.result() for a in answers] == ["value"] * 8
    assert len(calls) == 1

    def fail():
        raise BadExample("broken")

    for _ in range(2):
        with pytest.raises(BadExample):
            kept.get("other", fail, len)
    assert kept.get("other", lambda: "good", len) == "good"


def test_large_row_groups_are_told_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "_LARGE_GROUP", 2 << 20)
    big = np.random.default_rng(0).bytes(1100 << 10)
    table = {"image": [big, big[1:]], "caption": ["a", "b"]}
    options = {"compression": "none", "use_dictionary": False}
    small = write(tmp_path / "small.parquet", table, row_group_size=1, **options)
    write(tmp_path / "large.parquet", table, row_group_size=2, **options)
    with caplog.at_level(logging.WARNING):
        ParquetSource(small)  # 1.1 MB
        assert caplog.records == []
        source = ParquetSource(str(tmp_path))
        assert source.read(1).image == big[1:]
    (said,) = caplog.records
    assert "large.parquet" in said.getMessage()
    assert "row_group_size" in said.getMessage()
    assert "of up to 2 MB" in said.getMessage()


def test_what_cannot_be_read_says_so(folder, tmp_path, refused):
    refused(lambda: ParquetSource(str(tmp_path / "no.parquet")), "no.parquet", "No such file")
    refused(lambda: ParquetSource(str(tmp_path / "no")), tmp_path / "no", "not there")
    refused(lambda: ParquetSource(str(tmp_path)), "no .parquet file")
    refused(lambda: ParquetSource("memory://bucket/none/x.parquet"), "memory://bucket/none/x.parquet")
    whole = (folder / "a.parquet").read_bytes()
    for name, data in (
        ("cut", whole[:-5]),
        ("empty", b""),
        ("foreign", b"PK\3\4" * 100),
        ("noise", b"PAR1" + b"x" * 99),
    ):
        file = tmp_path / f"{name}.parquet"
        file.write_bytes(data)
        refused(lambda file=file: ParquetSource(str(file)), file, "cannot be read as Parquet")
    there = shutil.copytree(folder, tmp_path / "copy")
    (there / "c.parquet").write_bytes(whole[: len(whole) // 2])
    refused(lambda: ParquetSource(str(there)), there / "c.parquet")
    refused(lambda: ParquetSource(str(folder / "b.parquet")), "no row")


def test_a_damaged_row_group_costs_only_its_rows(folder, tmp_path):
    path = tmp_path / "a.parquet"
    data = bytearray((folder / "a.parquet").read_bytes())
    group = pq.read_metadata(folder / "a.parquet").row_group(1)
    for column in range(group.num_columns):
        chunk = group.column(column)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    source = ParquetSource(str(path))
    assert [source.read(i).image for i in (0, 2, 6)] == [picture(i) for i in (0, 2, 6)]
    for i in (3, 5):
        assert cause_of(source.read, i) == cause_of(source.captions, i) == "row_group_corrupt"


def test_a_file_that_goes_away_makes_bad_examples(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "copy")
    source = pickle.loads(pickle.dumps(ParquetSource(str(there))))
    (there / "c.parquet").unlink()
    assert cause_of(source.read, 8) == "row_group_corrupt"
    assert source.read(1).image == picture(1)
    write(there / "a.parquet", columns(range(2)))
    source = pickle.loads(pickle.dumps(source))
    assert cause_of(source.read, 2) == "row_group_corrupt"


def test_columns_that_are_not_there_or_of_another_kind(folder, tmp_path, refused):
    at = str(folder / "a.parquet")
    refused(lambda: ParquetSource(at, image_key="picture"), at, "'picture'", "url (string)", "image (binary)")
    refused(lambda: ParquetSource(at, image_key="label"), at, "'label'", "neither image files nor paths")
    refused(lambda: ParquetSource(at, caption_keys=("caption", "alt")), at, "'alt'", "url (string)")
    refused(lambda: ParquetSource(at, caption_keys=("label",)), at, "'label' is no text")
    refused(lambda: ParquetSource(at, label_key="class"), at, "'class'", "label (int16)")
    refused(lambda: ParquetSource(at, label_key="url"), at, "'url' is no class number")
    other = write(tmp_path / "other.parquet", {"x": [1], "caption": ["c"]})
    refused(lambda: ParquetSource(other), "image_bytes", "x (int64)", "config.data.image_key")

    there = shutil.copytree(folder, tmp_path / "copy")
    write(there / "c.parquet", {"image": [b"x"], "label": pa.array([1], pa.int16())})
    refused(lambda: ParquetSource(str(there)), "c.parquet", "'caption'", "first file")
    write(there / "c.parquet", {**columns([1]), "caption": [b"bytes"]})
    refused(lambda: ParquetSource(str(there)), "c.parquet", "'caption'", "caption (binary)")


def test_files_may_differ_in_what_makes_no_difference(folder, tmp_path):
    """Writers choose types file by file: another width of integers, nothing but nulls, other columns."""
    there = shutil.copytree(folder, tmp_path / "copy")
    given = columns(range(7, 11))
    given |= {"label": np.arange(4, dtype=np.uint8), "caption": pa.nulls(4), "more": [1] * 4}
    write(there / "c.parquet", given)
    source = ParquetSource(str(there), caption_required=False)
    for i in range(4):
        assert source.read(7 + i).image == picture(7 + i)
        assert (source.read(7 + i).label, source.captions(7 + i)) == (i, ())
    assert source.captions(6) == ("caption 6 ü",)


def test_labels_out_of_range_are_bad_examples(tmp_path):
    table = {"image": [b"x"] * 4, "caption": ["c"] * 4, "label": [2**31 - 1, 2**31, -2, -1]}
    source = ParquetSource(write(tmp_path / "a.parquet", table))
    assert [source.read(i).label for i in (0, 3)] == [2**31 - 1, -1]
    assert cause_of(source.read, 1) == cause_of(source.read, 2) == "label_out_of_range"


def test_footers_that_are_mutated_never_end_the_process(tmp_path):
    """In a process of its own: pyarrow may end it where it is asked for what a damaged footer says of single columns."""
    path = write(tmp_path / "a.parquet", columns(range(7)))
    code = """if True:
        import sys, numpy as np
        from gigagan_jax.data.source import BadExample
        from gigagan_jax.data.sources.parquet import ParquetSource
        from gigagan_jax.core.errors import UserError
        data = open(sys.argv[1], "rb").read()
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        for seed in range(1000):
            rng, bad = np.random.default_rng(seed), bytearray(data)
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
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr[-800:]) == (0, "")


def test_a_column_that_occurs_twice(tmp_path, refused):
    arrays = [pa.array([picture(0)]), pa.array(["a"]), pa.array(["b"])]
    path = write(tmp_path / "a.parquet", pa.Table.from_arrays(arrays, names=["image", "caption", "caption"]))
    refused(lambda: ParquetSource(path), path, "several columns 'caption'")
