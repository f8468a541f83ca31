"""prepare_data.py check and stats: what they count is what is there."""

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
from gigagan_jax.preparation.check import check, wilson
from gigagan_jax.preparation.convert import convert
from gigagan_jax.preparation.measure import Measure, Measured, choose, quantiles, rounded
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.stats import stats
from gigagan_jax.reporting.histograms import bins_of, histogram
from tests.broken_photos import BAD, COUNT, write_photos


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return FolderSource(write_photos(tmp_path_factory.mktemp("photos")))


# ---------------------------------------------------------------- check


def test_check_counts_and_names_what_is_bad(source, tmp_path):
    report = tmp_path / "bad.jsonl"
    said, healthy = check(source, report=report, workers=2, quiet=True)
    assert not healthy
    found = [json.loads(line) for line in report.read_text().splitlines()]
    assert {bad["name"]: bad["cause"] for bad in found} == BAD
    assert re.search(r"bad: image_undecodable +2 +6\.67 %", said)
    assert re.search(r"good +27 +90\.0 %", said)
    assert all(f"{name}: {cause}" in said for name, cause in BAD.items())
    assert "confidence" not in said
    assert check(source, max_bad_fraction=0.1, workers=1, quiet=True)[1]


def test_a_sample_is_drawn_by_its_seed_and_says_how_sure_it_is(source):
    draw = lambda seed: check(source, sample=12, seed=seed, workers=1, quiet=True)[0]
    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert "12 of 30 examples decoded, drawn at random" in draw(0)
    assert "95 % confidence" in draw(0)


def test_a_sample_has_no_example_twice():
    indices = [i for part in choose(10_000, 3000, 5) for i in part]
    assert len(set(indices)) == 3000
    assert indices == sorted(indices)
    assert 4500 < np.mean(indices) < 5500
    assert [list(part) for part in choose(3, 10, 0)] == [[0, 1, 2]]
    assert sum(len(part) for part in choose(100_000_000, 0, 0)) == 100_000_000


@pytest.mark.parametrize(("bad", "tried"), [(0, 10), (1, 10), (3, 50), (500, 1000), (10, 10), (2, 1_000_000)])
def test_interval_is_scipys(bad, tried):
    expected = binomtest(bad, tried).proportion_ci(0.95, method="wilson")
    assert wilson(bad, tried) == pytest.approx((expected.low, expected.high), rel=1e-4, abs=1e-12)


# ---------------------------------------------------------------- stats


def test_counts_of_parts_add_up(source):
    whole = Measure(source, True)(range(COUNT))
    parts = Measured()
    for part in (range(11), range(11, 12), range(12, COUNT)):
        parts.merge(Measured.from_json(json.loads(json.dumps(Measure(source, True)(part)))))
    assert parts.to_json() == whole


def test_quantiles_of_counts_are_numpys():
    values = np.random.default_rng(0).integers(1, 900, 5000)
    counts = Measured()
    for v in values:
        counts.add("words", v)
    at = (0, 0.05, 0.5, 0.95, 1)
    assert quantiles(counts.numbers["words"], at) == np.quantile(values, at, method="inverted_cdf").tolist()


def test_values_are_few_and_sizes_exact():
    assert [rounded(v) for v in (0, 7, 1024, 0.123456, 1.3333, 98765)] == [0, 7, 1024, 0.123, 1.33, 98800]


@pytest.fixture(scope="module")
def statistics(source, tmp_path_factory):
    """Of the photos as tars, those that are narrow filtered out."""
    folder = tmp_path_factory.mktemp("tars")
    convert(source, Output(str(folder)), "tar", workers=1, quiet=True)
    data = DataConfig(path=str(folder), captions="optional", filters=FilterConfig(min_width=40))
    tars = make_source(data, workers=1)
    out = tmp_path_factory.mktemp("stats") / "stats.html"
    said = stats(
        tars,
        out,
        title="a <b> & c",
        check_images=True,
        workers=1,
        quiet=True,
    )
    return out, said


def test_statistics_are_those_of_the_images(source, statistics):
    out, said = statistics
    assert json.loads(out.with_suffix(".json").read_text()) == said
    sizes = {i: Image.open(io.BytesIO(source.read(i).image)).size for i in range(COUNT) if i not in (7, 11)}
    wide = [i for i, (w, _) in sizes.items() if w >= 40]
    assert said["funnel"][-1] == ["width >= 40", len(wide)]
    good = [i for i in wide if i != 23]
    assert (said["examples"], said["good"]) == (len(wide), len(good))
    assert said["bad"] == {"image_undecodable": len(wide) - len(good)}
    assert sum(said["formats"].values()) == len(good)
    assert said["formats"]["PNG"] == sum(source.name(i).endswith("png") for i in good)
    assert said["quantiles"]["width"]["largest"] == max(sizes[i][0] for i in good)
    assert said["quantiles"]["short_side"]["smallest"] == min(min(sizes[i]) for i in good)
    assert said["short_side_at_least"]["64"] == sum(min(sizes[i]) >= 64 for i in good)
    assert dict(said["histograms"]["captions"]) == {
        n: sum(len(source.captions(i)) == n for i in good) for n in (1, 2, 3)
    }
    assert sum(n for _, n in said["histograms"]["words"]) == sum(len(source.captions(i)) for i in good)


def test_the_page_needs_nothing_else(statistics):
    text = statistics[0].read_text()
    assert "<script" not in text
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in text
    body = re.sub(r"<meta[^>]*>|<style>.*?</style>|<!doctype html>", "", text, flags=re.DOTALL)
    xml.etree.ElementTree.fromstring(body)  # every element is closed
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
    assert bins.counts.sum() == sum(values.values())
    assert len(bins.counts) <= 42
    svg = xml.etree.ElementTree.fromstring(histogram(values, label="x", log=log, marks={"median": 5.0}))
    bars = [e for e in svg.iter("rect") if e.get("class") == "bar"]
    assert len(bars) == np.count_nonzero(bins.counts)
    assert all(0 <= float(b.get("x")) <= 520 and 0 < float(b.get("height")) <= 220 for b in bars)
    assert sum(e.get("class") == "tick" for e in svg.iter("text")) >= 3
