"""Filters against a recomputation from the written rows: tars with .parquet, tars with .json, and Parquet files."""

import contextlib
import json
import logging
import pickle
import shutil
import tarfile
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from gigagan_jax.config import DataConfig, FilterConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources import filter_columns, filter_tars, filters, make_source
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.data.storage import Storage
from tests.img2dataset import add_member


@pytest.fixture(scope="module")
def rows(tars):
    """Metadata of the examples, in order."""
    tables = [pyarrow.parquet.read_table(f).to_pylist() for f in sorted(tars.glob("*.parquet"))]
    return [row for table in tables for row in table if row["status"] == "success"]


def kept_keys(source):
    return [source.name(i).rpartition("/")[2] for i in range(len(source))]


# Pairs of a filter and the same condition on a row of the table.
CASES = {
    "width": (FilterConfig(min_width=120), lambda r: r["original_width"] >= 120),
    "height": (FilterConfig(min_height=120), lambda r: r["original_height"] >= 120),
    "aspect": (
        FilterConfig(max_aspect=1.2),
        lambda r: max(r["width"], r["height"]) <= 1.2 * min(r["width"], r["height"]),
    ),
    "clip": (FilterConfig(min_clip_score=0.27), lambda r: r["similarity"] >= 0.27),
    "aesthetic": (FilterConfig(min_aesthetic=5), lambda r: (r["AESTHETIC_SCORE"] or 0) >= 5),
    "unsafe": (FilterConfig(max_nsfw=0.35), lambda r: r["punsafe"] <= 0.35),
    "language": (FilterConfig(languages=("de", "fr")), lambda r: r["LANGUAGE"] == "de"),
    "caption": (FilterConfig(min_caption=20, max_caption=25), lambda r: 20 <= len(r["caption"]) <= 25),
    "all": (
        FilterConfig(min_width=100, max_nsfw=0.55, languages=("EN",)),
        lambda r: r["original_width"] >= 100 and r["punsafe"] <= 0.55 and r["LANGUAGE"] == "en",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_passes_is_what_the_table_says(tars, rows, case):
    filters, passes = CASES[case]
    source = TarSource(str(tars), filters=filters, workers=1)
    expected = [r["key"] for r in rows if passes(r)]
    assert kept_keys(source) == expected
    # The case tests something: some examples pass, others do not.
    assert 0 < len(expected) < 24
    assert source.filter_report["steps"][0] == ["examples", 24]
    assert source.filter_report["steps"][-1][1] == len(expected)
    assert [source.read(i).captions for i in range(len(source))] == [(r["caption"],) for r in rows if passes(r)]
    # A resumed run must notice other filters.
    assert source.identity() != TarSource(str(tars)).identity()
    assert kept_keys(pickle.loads(pickle.dumps(source))) == expected
    # The second source loads the selection that the first one kept.
    assert kept_keys(TarSource(str(tars), filters=filters, workers=1)) == expected


def test_the_funnel_counts_step_by_step(tars, rows):
    filters = FilterConfig(min_width=100, min_aesthetic=5, languages=("en",))
    left = [r for r in rows if r["original_width"] >= 100]
    counts = [len(left)]
    left = [r for r in left if (r["AESTHETIC_SCORE"] or 0) >= 5]
    counts.append(len(left))
    counts.append(sum(r["LANGUAGE"] == "en" for r in left))
    source = TarSource(str(tars), filters=filters, workers=1)
    # All examples, then those with metadata, then each condition.
    assert [n for _, n in source.filter_report["steps"]] == [24, 24, *counts]
    table = source.format_filter_report().splitlines()
    assert len(table) == 5
    assert "width >= 100" in table[2]


def test_without_a_table_the_json_members_are_read(tars, rows, tmp_path):
    # Without the .parquet files beside them.
    for file in tars.glob("*.tar"):
        shutil.copy(file, tmp_path)
    filters, passes = CASES["all"]
    assert kept_keys(TarSource(str(tmp_path), filters=filters, workers=1)) == [r["key"] for r in rows if passes(r)]


def test_duplicates_by_hash_keep_the_first(tars, rows, tmp_path):
    for file in (*tars.glob("*.tar"), *tars.glob("*.parquet")):
        shutil.copy(file, tmp_path)
    # The copy repeats all hashes of the first tar under later names.
    shutil.copy(tmp_path / "00000.tar", tmp_path / "00003.tar")
    shutil.copy(tmp_path / "00000.parquet", tmp_path / "00003.parquet")
    source = TarSource(str(tmp_path), filters=FilterConfig(duplicates="sha256"), workers=1)
    assert [source.name(i) for i in range(len(source))] == [f"{r['key'][:5]}.tar/{r['key']}" for r in rows]
    assert source.filter_report["steps"][-1] == ["no duplicates by sha256", 24]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (FilterConfig(max_watermark=0.5), "no column for watermark .looked for pwatermark.*it has url, caption, key"),
        (FilterConfig(duplicates="phash"), "no column for duplicates .looked for phash"),
        (FilterConfig(min_width=10_000), "no example is left;.*\n.*\n.*width >= 10000 +0 +0.00 %"),
    ],
)
def test_filters_that_cannot_be_or_leave_nothing(tars, filters, message):
    with pytest.raises(UserError, match=message):
        TarSource(str(tars), filters=filters, workers=1)


def test_tars_without_metadata_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add_member(tar, "0.jpg", b"x")
        add_member(tar, "0.txt", b"x")
    with pytest.raises(UserError, match="no metadata"):
        TarSource(str(tmp_path), filters=FilterConfig(min_width=1), workers=1)
    # One example with metadata is enough; those without are dropped.
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        add_member(tar, "1.jpg", b"x")
        add_member(tar, "1.json", json.dumps({"width": 5}).encode())
    source = TarSource(str(tmp_path), filters=FilterConfig(min_width=1), workers=1)
    assert kept_keys(source) == ["1"]


def test_other_sources_have_no_metadata():
    with pytest.raises(UserError, match="data of kind 'digits' has no metadata to filter by"):
        make_source(DataConfig(source="digits", filters=FilterConfig(min_width=1)))


def one_tar(folder, keys, table=None, rows=None):
    """A tar of these keys, with a table beside it or `.json` members; returns its path."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, key in enumerate(keys):
            add_member(tar, f"{key}.jpg", b"x")
            add_member(tar, f"{key}.txt", b"x")
            if rows:
                add_member(tar, f"{key}.json", json.dumps(rows[i]).encode())
    if table:
        pyarrow.parquet.write_table(pa.table(table), folder / "0.parquet")
    return str(folder)


WIDE = FilterConfig(min_width=5)


def test_a_table_that_is_rewritten_is_read_again(tmp_path):
    path = one_tar(tmp_path / "a", "abc", {"key": ["a", "b", "c"], "width": [1, 9, 9]})
    first = TarSource(path, filters=WIDE, workers=1)
    assert kept_keys(first) == ["b", "c"]
    one_tar(tmp_path / "a", "abc", {"key": ["a", "b", "c"], "width": [9, 9, 1]})
    second = TarSource(path, filters=WIDE, workers=1)
    assert kept_keys(second) == ["a", "b"]
    assert second.identity() != first.identity()
    # The identity depends on content: another folder and another table that leaves the same examples agree.
    elsewhere = one_tar(tmp_path / "b", "abc", {"key": ["c", "b", "a"], "width": [1, 7, 8]})
    assert TarSource(elsewhere, filters=WIDE, workers=1).identity() == second.identity()


def test_what_an_interrupted_run_left_is_of_its_own_tables(tmp_path, monkeypatch):
    path = one_tar(tmp_path, "ab", {"key": ["a", "b"], "width": [1, 9]})
    with monkeypatch.context() as m:
        # Interrupted between filtering and merging: the parts stay.
        m.setattr(filter_tars, "_merge_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            TarSource(path, filters=WIDE, workers=1)
    assert len(list(tmp_path.glob("gigagan_index/sets/*/rows-*.parts/*.bin"))) == 1
    with monkeypatch.context() as m:
        # Filtering again would fail, so the result must come from the kept parts.
        m.setattr(filter_tars, "_filter_shard", lambda *_: 1 / 0)
        assert kept_keys(TarSource(path, filters=WIDE, workers=1)) == ["b"]  # from what was left
    assert list(tmp_path.glob("gigagan_index/sets/*/rows-*.parts")) == []
    one_tar(tmp_path, "ab", {"key": ["a", "b"], "width": [9, 1]})
    assert kept_keys(TarSource(path, filters=WIDE, workers=1)) == ["a"]


def test_several_that_filter_at_once(tars, tmp_path, monkeypatch):
    """All compute before the first has merged and cleared up."""
    for file in (*tars.glob("*.tar"), *tars.glob("*.parquet")):
        shutil.copy(file, tmp_path)
    TarSource(str(tmp_path))
    # The barrier holds all threads before the merge, which is where they could collide.
    barrier, merge = threading.Barrier(3), filter_tars._merge_shards

    def merge_together(*args):
        barrier.wait(20)
        return merge(*args)

    monkeypatch.setattr(filter_tars, "_merge_shards", merge_together)
    sources, filters = [], FilterConfig(min_width=120, duplicates="sha256")
    run = lambda: sources.append(TarSource(str(tmp_path), filters=filters, workers=1))
    threads = [threading.Thread(target=run) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(sources) == 3
    assert len({s.identity() for s in sources}) == 1
    assert kept_keys(sources[0]) == kept_keys(sources[2])
    assert sorted(f.name for f in tmp_path.glob("gigagan_index/sets/*/rows-*/*")) == ["funnel.json", "rows.npy"]


@pytest.mark.parametrize("name", ["rows.npy", "funnel.json"])
def test_damaged_results_are_made_again(tmp_path, name):
    path = one_tar(tmp_path, "abcd", {"key": list("abcd"), "width": [1, 9, 9, 9]})
    identity = TarSource(path, filters=WIDE, workers=1).identity()
    (file,) = tmp_path.glob(f"gigagan_index/sets/*/rows-*/{name}")
    good = file.read_bytes()
    # Cut files, zeros, wrong rows at the end, valid JSON of another type, and bytes that are not UTF-8.
    for bad in (b"", good[: len(good) // 2], good[:-2], b"\0" * len(good), good[:-8] + b"\0" * 8, b"null", b"\xff"):
        file.write_bytes(bad)
        source = TarSource(path, filters=WIDE, workers=1)
        assert (kept_keys(source), source.identity()) == (["b", "c", "d"], identity)
        # The file is written again, equal to the first one.
        assert file.read_bytes() == good


def test_keys_that_are_bytes_or_numbers(tmp_path, refused, caplog):
    # A null among integers makes pandas write floats.
    for i, keys in enumerate(([b"007", b"010"], [7, 10], [7.0, 10.0])):
        path = one_tar(tmp_path / str(i), ("007", "010"), {"key": [*keys, None], "width": [1, 9, 9]})
        assert kept_keys(TarSource(path, filters=WIDE, workers=1)) == ["010"]
    path = one_tar(tmp_path / "x", ("x7",), {"key": [7], "width": [9]})
    refused(lambda: TarSource(path, filters=WIDE, workers=1), "0.parquet", "'x7'", "key as text")
    one_tar(tmp_path / "x", ("x7",), {"key": ["y7"], "width": [9]})
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="no metadata"):
        TarSource(path, filters=WIDE, workers=1)
    # The warning names the tar, because its examples vanish silently otherwise.
    assert "share no key with the .parquet beside them" in caplog.text
    assert "0.tar" in caplog.text


def not_utf8(*values):
    # Arrow does not check the bytes of a string column that is built from buffers.
    data = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), data.buffers())


def test_strange_values_are_as_none(tmp_path):
    table = {"key": ["a", "b"], "LANGUAGE": not_utf8(b"\xff", b"en")}
    path = one_tar(tmp_path / "a", "ab", table)
    assert kept_keys(TarSource(path, filters=FilterConfig(languages=("en",)), workers=1)) == ["b"]
    # Beyond float64.
    path = one_tar(tmp_path / "b", "ab", rows=[{"width": 10**400}, {"width": 9}])
    assert kept_keys(TarSource(path, filters=WIDE, workers=1)) == ["b"]
    # Equal lone surrogates are duplicates; nulls are not.
    rows = [{"hash": h} for h in ("\ud800", "\ud800", None, None)]
    path = one_tar(tmp_path / "c", "abcd", rows=rows)
    assert kept_keys(TarSource(path, filters=FilterConfig(duplicates="hash"), workers=1)) == ["a", "c", "d"]
    table = {"key": ["a", "b", "c"], "hash": [b"\xff\x00", b"\xff\x01", b"\xff\x00"]}
    path = one_tar(tmp_path / "d", "abc", table)
    assert kept_keys(TarSource(path, filters=FilterConfig(duplicates="hash"), workers=1)) == ["a", "b"]


def test_a_column_of_json_may_come_late(tmp_path):
    # The column first occurs in the last row, past any sample from the start.
    path = one_tar(tmp_path, range(1200), rows=[{"url": "x"}] * 1199 + [{"width": 9}])
    assert kept_keys(TarSource(path, filters=WIDE, workers=1)) == ["1199"]


def test_limits_that_limit_nothing(tmp_path):
    # A limit of 1 or above and NaN exclude no probability.
    assert not filters.is_any_enabled(FilterConfig(max_nsfw=1.5, max_watermark=float("nan")))
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"image": [b"x"] * 3, "caption": ["a"] * 3}), file)
    assert len(make_source(DataConfig(path=str(file), filters=FilterConfig(max_nsfw=1.5)))) == 3


def test_parquet_with_a_column_twice_or_a_mutated_footer(tmp_path, refused):
    file = tmp_path / "a.parquet"
    table = pa.Table.from_arrays([pa.array([9]), pa.array([8])], names=["width", "width"])
    pyarrow.parquet.write_table(table, file)
    refused(lambda: filters.select_parquet_rows([str(file)], Storage(), WIDE), file, "several columns 'width'")
    pyarrow.parquet.write_table(pa.table({"width": [1, 9, 9]}), file)
    assert filters.select_parquet_rows([str(file)], Storage(), WIDE)[0].tolist() == [1, 2]
    data = file.read_bytes()
    # Whatever the damage is, only UserError may be raised.
    for seed in range(200):
        rng, bad = np.random.default_rng(seed), bytearray(data)
        bad[rng.integers(len(data))] = rng.integers(256)
        file.write_bytes(bad)
        with contextlib.suppress(UserError):
            filter_columns.read_parquet_columns(Storage(), str(file), ("width",), WIDE)
