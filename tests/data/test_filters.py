"""Filters against pandas-free recomputation from the rows that were written, for tars with .parquet, with .json, and Parquet."""

import json
import pickle
import shutil
import tarfile

import pyarrow.parquet
import pytest

from gigagan_jax.config_data import DataConfig, FilterConfig
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.errors import UserError
from tests.img2dataset import add_member


@pytest.fixture(scope="module")
def rows(tars):
    """Metadata of the examples, in order."""
    tables = [pyarrow.parquet.read_table(f).to_pylist() for f in sorted(tars.glob("*.parquet"))]
    return [row for table in tables for row in table if row["status"] == "success"]


def kept(source):
    return [source.name(i).rpartition("/")[2] for i in range(len(source))]


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
    assert kept(source) == expected
    assert 0 < len(expected) < 24
    assert source.funnel["steps"][0] == ["examples", 24]
    assert source.funnel["steps"][-1][1] == len(expected)
    assert [source.read(i).captions for i in range(len(source))] == [(r["caption"],) for r in rows if passes(r)]
    assert source.identity() != TarSource(str(tars)).identity()
    assert kept(pickle.loads(pickle.dumps(source))) == expected
    assert kept(TarSource(str(tars), filters=filters, workers=1)) == expected  # from what was kept


def test_the_funnel_counts_step_by_step(tars, rows):
    filters = FilterConfig(min_width=100, min_aesthetic=5, languages=("en",))
    left = [r for r in rows if r["original_width"] >= 100]
    counts = [len(left)]
    left = [r for r in left if (r["AESTHETIC_SCORE"] or 0) >= 5]
    counts.append(len(left))
    counts.append(sum(r["LANGUAGE"] == "en" for r in left))
    source = TarSource(str(tars), filters=filters, workers=1)
    assert [n for _, n in source.funnel["steps"]] == [24, 24, *counts]
    table = source.funnel_table().splitlines()
    assert len(table) == 5
    assert "width >= 100" in table[2]


def test_without_a_table_the_json_members_are_read(tars, rows, tmp_path):
    for file in tars.glob("*.tar"):
        shutil.copy(file, tmp_path)
    filters, passes = CASES["all"]
    assert kept(TarSource(str(tmp_path), filters=filters, workers=1)) == [r["key"] for r in rows if passes(r)]


def test_duplicates_by_hash_keep_the_first(tars, rows, tmp_path):
    for file in (*tars.glob("*.tar"), *tars.glob("*.parquet")):
        shutil.copy(file, tmp_path)
    shutil.copy(tmp_path / "00000.tar", tmp_path / "00003.tar")
    shutil.copy(tmp_path / "00000.parquet", tmp_path / "00003.parquet")
    source = TarSource(str(tmp_path), filters=FilterConfig(duplicates="sha256"), workers=1)
    assert [source.name(i) for i in range(len(source))] == [f"{r['key'][:5]}.tar/{r['key']}" for r in rows]
    assert source.funnel["steps"][-1] == ["no duplicates by sha256", 24]


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
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        add_member(tar, "1.jpg", b"x")
        add_member(tar, "1.json", json.dumps({"width": 5}).encode())
    source = TarSource(str(tmp_path), filters=FilterConfig(min_width=1), workers=1)
    assert kept(source) == ["1"]


def test_other_sources_have_no_metadata():
    with pytest.raises(UserError, match="data of kind 'digits' has no metadata to filter by"):
        make_source(DataConfig(source="digits", filters=FilterConfig(min_width=1)))
