"""prepare_data.py check and stats: their counts are those of the files."""

import io
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from gigagan_jax.config import DataConfig, FilterConfig
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.folder import FolderSource
from gigagan_jax.preparation.check import check_source, wilson_interval
from gigagan_jax.preparation.convert import convert_source
from gigagan_jax.preparation.measure import Measurements, MeasureTask, choose_examples, count_quantiles, round_value
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.stats import write_stats
from gigagan_jax.reporting.histograms import bins_of, draw_histogram
from tests.broken_photos import BAD, COUNT, write_photos


@pytest.fixture(scope="module")
def photo_source(tmp_path_factory):
    """30 photographs, of which three are damaged (BAD)."""
    return FolderSource(write_photos(tmp_path_factory.mktemp("photos")))


# ---------------------------------------------------------------- check


def test_check_counts_and_names_what_is_bad(photo_source, tmp_path):
    report = tmp_path / "bad.jsonl"
    text, healthy = check_source(photo_source, report=report, workers=2, quiet=True)
    assert not healthy
    found = [json.loads(line) for line in report.read_text().splitlines()]
    assert {bad["name"]: bad["cause"] for bad in found} == BAD
    assert re.search(r"bad: image_undecodable +2 +6\.67 %", text)
    assert re.search(r"good +27 +90\.0 %", text)
    assert all(f"{name}: {cause}" in text for name, cause in BAD.items())
    # All examples were decoded, so the share is exact.
    assert "confidence" not in text
    # 3 of 30 are exactly the limit.
    assert check_source(photo_source, max_bad_fraction=0.1, workers=1, quiet=True)[1]


def test_a_sample_is_drawn_by_its_seed_and_says_how_sure_it_is(photo_source):
    draw = lambda seed: check_source(photo_source, sample=12, seed=seed, workers=1, quiet=True)[0]
    assert draw(1) == draw(1)
    # Draws without a bad example may print the same text.
    assert len({draw(seed) for seed in range(4)}) > 1
    assert "12 of 30 examples decoded, drawn at random" in draw(0)
    assert "95 % confidence" in draw(0)


def test_a_sample_has_no_example_twice():
    indices = [i for part in choose_examples(10_000, 3000, 5) for i in part]
    assert len(set(indices)) == 3000
    assert indices == sorted(indices)
    # Uniform draws of 10,000 have mean 5,000; the standard deviation of the mean is 44.
    assert 4500 < np.mean(indices) < 5500
    assert [list(part) for part in choose_examples(3, 10, 0)] == [[0, 1, 2]]
    # Ranges, not lists: 100 million indices would not fit.
    assert sum(len(part) for part in choose_examples(100_000_000, 0, 0)) == 100_000_000


@pytest.mark.parametrize(("bad", "tried"), [(0, 10), (1, 10), (3, 50), (500, 1000), (10, 10), (2, 1_000_000)])
def test_interval_is_scipys(bad, tried):
    expected = binomtest(bad, tried).proportion_ci(0.95, method="wilson")
    assert wilson_interval(bad, tried) == pytest.approx((expected.low, expected.high), rel=1e-4, abs=1e-12)


# ---------------------------------------------------------------- stats


def test_counts_of_parts_add_up(photo_source):
    whole = MeasureTask(photo_source, True)(range(COUNT))
    parts = Measurements()
    # Through JSON, as results of tasks are. The middle part holds one bad example only.
    for part in (range(11), range(11, 12), range(12, COUNT)):
        parts.merge(Measurements.from_json(json.loads(json.dumps(MeasureTask(photo_source, True)(part)))))
    assert parts.to_json() == whole


def test_quantiles_of_counts_are_numpys():
    values = np.random.default_rng(0).integers(1, 900, 5000)
    counts = Measurements()
    for v in values:
        counts.add_number("words", v)
    at = (0, 0.05, 0.5, 0.95, 1)
    # Counts hold no values between those seen, so numpy must not interpolate.
    assert count_quantiles(counts.numbers["words"], at) == np.quantile(values, at, method="inverted_cdf").tolist()


def test_values_are_few_and_sizes_exact():
    assert [round_value(v) for v in (0, 7, 1024, 0.123456, 1.3333, 98765)] == [0, 7, 1024, 0.123, 1.33, 98800]


@pytest.fixture(scope="module")
def tar_statistics(photo_source, tmp_path_factory):
    """(page, data) of the photographs as tars, narrow ones filtered out."""
    folder = tmp_path_factory.mktemp("tars")
    convert_source(photo_source, Output(str(folder)), "tar", workers=1, quiet=True)
    data = DataConfig(path=str(folder), captions="optional", filters=FilterConfig(min_width=40))
    tars = make_source(data, workers=1)
    page = tmp_path_factory.mktemp("stats") / "stats.html"
    # The title needs escaping in HTML.
    data = write_stats(
        tars,
        page,
        title="a <b> & c",
        check_images=True,
        workers=1,
        quiet=True,
    )
    return page, data


def test_statistics_are_those_of_the_images(photo_source, tar_statistics):
    page, data = tar_statistics
    assert json.loads(page.with_suffix(".json").read_text()) == data
    # 7 and 11 have no readable header, and are no part of the tars.
    sizes = {i: Image.open(io.BytesIO(photo_source.read(i).image)).size for i in range(COUNT) if i not in (7, 11)}
    wide = [i for i, (w, _) in sizes.items() if w >= 40]
    assert data["funnel"][-1] == ["width >= 40", len(wide)]
    # 23 is truncated: its header passes the filter, decoding fails.
    good = [i for i in wide if i != 23]
    assert (data["examples"], data["good"]) == (len(wide), len(good))
    assert data["bad"] == {"image_undecodable": len(wide) - len(good)}
    assert sum(data["formats"].values()) == len(good)
    assert data["formats"]["PNG"] == sum(photo_source.name(i).endswith("png") for i in good)
    assert data["quantiles"]["width"]["largest"] == max(sizes[i][0] for i in good)
    assert data["quantiles"]["short_side"]["smallest"] == min(min(sizes[i]) for i in good)
    assert data["short_side_at_least"]["64"] == sum(min(sizes[i]) >= 64 for i in good)
    assert dict(data["histograms"]["captions"]) == {
        n: sum(len(photo_source.captions(i)) == n for i in good) for n in (1, 2, 3)
    }
    assert sum(n for _, n in data["histograms"]["words"]) == sum(len(photo_source.captions(i)) for i in good)


def test_the_page_needs_nothing_else(tar_statistics):
    text = tar_statistics[0].read_text()
    assert "<script" not in text
    # No resource from elsewhere: the page can be mailed.
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in text
    body = re.sub(r"<meta[^>]*>|<style>.*?</style>|<!doctype html>", "", text, flags=re.DOTALL)
    # Parses only if every element is closed.
    xml.etree.ElementTree.fromstring(body)
    for title in ("Filters", "Yield", "Shorter side", "Aspect ratio", "File size", "Formats", "Caption length"):
        assert f"<h2>{title}" in text


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ({5.0: 3}, False),
        ({5.0: 3}, True),
        ({0.37: 1}, False),
        ({1.0: 2, 2.0: 1}, False),
        ({float(v): 1 for v in range(1, 500)}, False),
        ({10.0**v: v for v in range(1, 8)}, True),
        ({0.5: 1, 0.75: 9, 2.25: 1}, False),
    ],
)
def test_bins_hold_every_value(values, log):
    bins = bins_of(values, log)
    # No value falls outside, not even a single one or the largest.
    assert bins.counts.sum() == sum(values.values())
    assert len(bins.counts) <= 42
    svg = xml.etree.ElementTree.fromstring(draw_histogram(values, label="x", log=log, marks={"median": 5.0}))
    bars = [e for e in svg.iter("rect") if e.get("class") == "bar"]
    assert len(bars) == np.count_nonzero(bins.counts)
    # Within the drawing area, in pixels. Empty bins have no bar.
    assert all(0 <= float(b.get("x")) <= 520 and 0 < float(b.get("height")) <= 220 for b in bars)
    assert sum(e.get("class") == "tick" for e in svg.iter("text")) >= 3
