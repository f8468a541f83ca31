"""What prepare_data.py does to data sets: converted, checked, counted; cut short and begun again."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.datasets import load_sample_images

from gigagan_jax.config_data import DataConfig, FilterConfig
from gigagan_jax.data.prepare import shards
from gigagan_jax.data.prepare.check import check, wilson
from gigagan_jax.data.prepare.convert import convert
from gigagan_jax.data.prepare.measure import Measure, Measured, choose, quantiles, rounded
from gigagan_jax.data.prepare.output import Output
from gigagan_jax.data.prepare.plots import bins_of, histogram
from gigagan_jax.data.prepare.stats import stats
from gigagan_jax.data.prepare.tasks import run_tasks
from gigagan_jax.data.records import UNKNOWN_LABEL, Record
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.data.sources.folder import FolderSource
from gigagan_jax.errors import UserError
from tools import prepare_data

ROOT = Path(__file__).parents[2]
COUNT = 30
BAD = {"007.jpg": "image_empty", "011.jpg": "image_undecodable", "023.jpg": "image_undecodable"}  # the last: cut short


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pieces of scikit-learn's photographs in five formats with one to three captions; three of them are broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(COUNT):
        height, width = (int(n) for n in rng.integers(20, 120, 2))
        piece = Image.fromarray(photographs[i % 2][40 : 40 + height, 60 : 60 + width])
        suffix = ("jpg", "jpg", "png", "webp", "gif", "bmp")[i % 6]
        suffix = "jpg" if f"{i:03d}.jpg" in BAD else suffix
        piece.save(folder / f"{i:03d}.{suffix}")
        captions = [f"a piece of picture {i}, in words number {j}" for j in range(1 + i % 3)]
        (folder / f"{i:03d}.txt").write_text("\n".join(captions))
    (folder / "007.jpg").write_bytes(b"")
    (folder / "011.jpg").write_bytes(b"this is no image")
    (folder / "023.jpg").write_bytes((folder / "023.jpg").read_bytes()[:-200])
    return folder


@pytest.fixture(scope="module")
def source(photos):
    return FolderSource(photos)


@pytest.fixture(scope="module")
def tars(source, tmp_path_factory):
    """The photos as tars of 8, made in this process."""
    out = tmp_path_factory.mktemp("tars") / "out"
    convert(source, Output(str(out)), "tar", shard_size=8, workers=1, quiet=True)
    return out


def files_of(folder):
    """{relative path: bytes} of all files but the hidden ones."""
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    parts = {p.relative_to(folder): p for p in files}
    return {
        str(r): p.read_bytes() for r, p in parts.items() if not any(s.startswith((".", "gigagan_")) for s in r.parts)
    }


def source_of(path, captions="optional", **keys):
    return make_source(DataConfig(path=str(path), captions=captions, **keys), workers=1)


# ---------------------------------------------------------------- convert


def test_tars_are_in_the_layout_of_img2dataset(source, tars):
    with tarfile.open(tars / "00001.tar") as tar:
        assert tar.getnames()[:3] == ["000010000.png", "000010000.txt", "000010000.json"]
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}
        about = json.load(tar.extractfile("000010000.json"))
        assert tar.extractfile("000010000.txt").read().decode().split("\n") == list(source.captions(8))
        image = tar.extractfile("000010000.png").read()
    assert image == source.read(8).image
    width, height = Image.open(io.BytesIO(image)).size
    assert (about["width"], about["height"]) == (width, height)
    assert about["caption"] == source.captions(8)[0]
    assert about["name"] == source.name(8)
    assert "label" not in about


def test_tars_hold_what_the_folder_held(source, tars):
    found = source_of(tars)
    good = [i for i in range(COUNT) if source.name(i) not in ("007.jpg", "011.jpg")]
    assert len(found) == len(good) == COUNT - 2  # images that break off are found by check_images alone
    for i, j in enumerate(good):
        a, b = found.read(i), source.read(j)
        assert (a.image, a.captions, a.label) == (b.image, b.captions, UNKNOWN_LABEL)
    left_out = [json.loads(line) for line in (tars / "left_out.jsonl").read_text().splitlines()]
    assert {bad["name"]: bad["cause"] for bad in left_out} == {n: c for n, c in BAD.items() if n != "023.jpg"}
    assert [bad["index"] for bad in left_out] == [7, 11]


def test_the_number_of_workers_changes_no_byte(source, tars, tmp_path):
    convert(source, Output(str(tmp_path)), "tar", shard_size=8, workers=2, quiet=True)
    assert files_of(tmp_path) == files_of(tars)


@pytest.mark.parametrize("kind", ["folder", "tar", "arrayrecord"])
def test_kinds_hold_the_same_examples(source, kind, tmp_path):
    done = convert(
        source, Output(str(tmp_path)), kind, shard_size=8, workers=1, check_images=True, name="photos", quiet=True
    )
    assert done["examples"] == COUNT - 3
    assert done["shards"] == 4
    assert done["left_out"] == {"image_undecodable": 2, "image_empty": 1}
    found = source_of(tmp_path, source=kind)
    good = [i for i in range(COUNT) if source.name(i) not in BAD]
    images = {source.read(i).image: source.captions(i) for i in good}
    assert {r.image: r.captions for r in map(found.read, range(len(found)))} == images
    again = tmp_path / "again"
    convert(source, Output(str(again)), kind, shard_size=8, workers=2, check_images=True, name="photos", quiet=True)
    assert files_of(again) == {n: data for n, data in files_of(tmp_path).items() if not n.startswith("again")}


def test_pixels_and_labels_go_through_tars(tmp_path):
    digits = DigitsSource()
    convert(digits, Output(str(tmp_path)), "tar", shard_size=1000, workers=1, quiet=True)
    found = source_of(tmp_path)
    assert len(found) == len(digits)
    for i in (0, 999, 1000, 1796):
        a, b = found[i], digits[i]
        np.testing.assert_array_equal(a.image, b.image)
        assert (a.captions, a.label) == (b.captions, b.label)


def test_back_and_forth_gives_the_same_tars(tars, tmp_path):
    middle, end = tmp_path / "folder", tmp_path / "tars"
    convert(source_of(tars), Output(str(middle)), "folder", shard_size=100, workers=1, quiet=True)
    convert(source_of(middle), Output(str(end)), "tar", shard_size=100, workers=1, quiet=True)
    read = lambda s: [(s.read(i).image, s.read(i).captions) for i in range(len(s))]
    assert read(source_of(end)) == read(source_of(tars))


def test_formats_that_no_source_looks_for_become_png():
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "TIFF")
    image, suffix = shards.portable(Record(file.getvalue(), (), 0, "x"))
    assert suffix == ".png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), pixels)


def test_captions_with_line_breaks_stay_one_caption_each():
    item = shards.Item(
        "k", shards.encode_png(np.zeros((2, 3, 3), np.uint8)), ".png", Record(b"", ("a\r\n b", " ", "c\ud800"), 4, "n")
    )
    members = dict(item.members())
    assert members[".txt"] == b"a b\nc?"
    assert json.loads(members[".json"])["captions"] == ["a\r\n b", " ", "c\ud800"]
    assert members[".cls"] == b"4"


KILLED = """
import os, signal, sys
from gigagan_jax.data.prepare.convert import convert
from gigagan_jax.data.prepare.output import Output
from gigagan_jax.data.sources.folder import FolderSource

class Dying(FolderSource):
    def read(self, i):
        if i == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(i)

convert(Dying(sys.argv[1]), Output(sys.argv[2]), sys.argv[3], shard_size=8, workers=1, quiet=True)
"""


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_killed_in_the_middle_it_goes_on(photos, source, kind, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    convert(source, Output(str(whole)), kind, shard_size=8, workers=1, quiet=True)
    done = subprocess.run([sys.executable, "-c", KILLED, photos, cut, kind], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    suffix = ".tar" if kind == "tar" else ""
    before = {name: (cut / name).stat() for name in (f"00000{suffix}", f"00001{suffix}")}
    assert not (cut / f"00002{suffix}").exists()
    convert(source, Output(str(cut)), kind, shard_size=8, workers=1, quiet=True)
    assert files_of(cut) == files_of(whole)
    assert not (cut / ".scratch").exists()
    same = lambda a, b: (a.st_ino, a.st_mtime_ns) == (b.st_ino, b.st_mtime_ns)
    assert all(same((cut / name).stat(), status) for name, status in before.items())


def test_a_shard_that_is_gone_or_cut_is_made_again(source, tars, tmp_path):
    out = Output(str(tmp_path))
    make = lambda: convert(source, out, "tar", shard_size=8, workers=1, quiet=True)
    first = make()
    (tmp_path / "00000.tar").unlink()
    os.truncate(tmp_path / "00002.tar", 1000)
    kept = (tmp_path / "00001.tar").stat().st_mtime_ns
    assert make() == first
    assert files_of(tmp_path) == files_of(tars)
    assert (tmp_path / "00001.tar").stat().st_mtime_ns == kept


def test_an_address_takes_the_same_files(source, tars, tmp_path):
    """fsspec's own name for this disk: the way of buckets, without a server."""
    for _ in range(2):  # the second time all of it is there
        convert(source, Output(f"local://{tmp_path}/out"), "tar", shard_size=8, workers=2, quiet=True)
    assert files_of(tmp_path / "out") == files_of(tars)
    convert(source, Output(f"local://{tmp_path}/folder"), "folder", shard_size=8, workers=1, quiet=True)
    assert len(source_of(tmp_path / "folder")) == COUNT - 2


# ---------------------------------------------------------------- tasks


def refuse_odd(i):
    if i % 2:
        raise UserError(f"{i} is odd")
    return i


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_error_ends_the_tasks_and_is_not_kept(workers, tmp_path):
    kept = Output(str(tmp_path))
    with pytest.raises(UserError, match="1 is odd"):
        run_tasks(refuse_odd, [0, 1, 2, 4], workers=workers, results=kept, title="t", quiet=True)
    assert run_tasks(refuse_odd, [0, 6, 2, 4], workers=workers, results=kept, title="t", quiet=True) == [0, 6, 2, 4]
    with pytest.raises(UserError, match="3 is odd"):
        run_tasks(refuse_odd, [0, 3], workers=workers, title="t", quiet=True)


def test_kept_results_are_not_made_again(tmp_path):
    kept = Output(str(tmp_path))
    assert run_tasks(refuse_odd, [8, 4], workers=1, results=kept, title="t", quiet=True) == [8, 4]
    # Items that would fail are not run; one whose result is damaged is, and one that the caller finds incomplete.
    assert run_tasks(refuse_odd, [1, 3], workers=1, results=kept, title="t", quiet=True) == [8, 4]
    (tmp_path / "000000.json").write_text('{"resu')
    again = run_tasks(
        refuse_odd, [2, 6], workers=1, results=kept, is_whole=lambda item, result: result != 4, title="t", quiet=True
    )
    assert again == [2, 6]


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
def statistics(tars, tmp_path_factory):
    out = tmp_path_factory.mktemp("stats") / "stats.html"
    said = stats(
        source_of(tars, filters=FilterConfig(min_width=40)),
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


# ---------------------------------------------------------------- the command line


def run(*args):
    """The command itself, in a process of its own."""
    command = [sys.executable, "tools/prepare_data.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_line_from_photos_to_records(photos, tmp_path):
    done = run("check", f"--path={photos}", f"--report={tmp_path}/bad.jsonl", "--workers=1")
    assert done.returncode == 1, done.stderr
    assert "NOT healthy: 10.0 % bad, 5.00 % allowed" in done.stdout
    made = tmp_path / "tars"
    done = run("convert", f"--path={photos}", "--to=tar", f"--out={made}", "--check_images", "--shard_size=10")
    assert done.returncode == 0, done.stderr
    assert "27 examples in 3 shards" in done.stdout
    assert f"left out: 2 image_undecodable, 1 image_empty; each is named in {made}/left_out.jsonl" in done.stdout
    done = run("index", f"--path={made}", "--config.data.filters.min_width=40", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"width >= 40 +\d+", done.stdout)
    assert "27 examples in 3 tars" in done.stdout
    done = run(
        "stats", "--config=configs/laion.py:tiny", f"--path={made}", f"--out={tmp_path}/page.html", "--sample=20"
    )
    assert done.returncode == 0, done.stderr
    assert "20 of 27 examples, 0 bad (0.0 %)" in done.stdout
    assert "a random sample of 20 examples" in (tmp_path / "page.html").read_text()


def test_index_says_what_needs_none(photos, capsys):
    assert prepare_data.verb(["index", f"--path={photos}"]) == 0
    assert "30 examples; data of this kind (folder) needs no index" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["check"], "what data? name it by --path=PATTERN or by --config=FILE.py"),
        (["check", "--path=/nowhere/at/all"], "/nowhere/at/all: there is nothing at this path"),
        (["check", "--path={photos}", "--sample=-3"], "'-3' is not a whole number"),
        (["check", "--path={photos}", "--report={photos}"], "cannot be written"),
        (["check", "--path={photos}", "--config.data.pth=x"], "pth"),
        (["check", "--path={photos}", "--nonsense"], "unknown argument --nonsense"),
        (["check", "--path={photos}", "--", "--parallelism=3"], "name its runner by --runner=DirectRunner"),
        (["check", "--path={photos}", "--config.data.filters.min_width=9"], "no metadata to filter by"),
        (["convert", "--path={photos}", "--to=zip", "--out=x"], "invalid choice: 'zip'"),
        (["convert", "--path={photos}", "--to=tar", "--out={photos}"], "holds other files (000.jpg)"),
        (["convert", "--path={photos}", "--to=tar", "--out={photos}/000.jpg/x"], "cannot be written: Not a directory"),
        (["convert", "--path={photos}", "--to=tar", "--out={tmp}", "--shard_size=0"], "at least 1 example"),
        (["convert", "--path={photos}", "--to=arrayrecord", "--out={tmp}", "--name=a b"], "no name for a data set"),
        (["convert", "--path={photos}", "--to=tar", "--out=nosuch://x"], "no file system is known for nosuch://"),
        (["embed", "--path={photos}", "--out=x"], "whose text encoder?"),
        (["polish", "--path={photos}"], "invalid choice: 'polish'"),
        ([], "required: TASK"),
    ],
)
def test_bad_input_is_one_line(args, words, photos, tmp_path):
    with pytest.raises(UserError) as error:
        prepare_data.verb([a.format(photos=photos, tmp=tmp_path) for a in args])
    assert words in str(error.value)


def test_another_conversion_is_not_mixed_in(tars, source):
    for change in ({"shard_size": 9}, {"check_images": True}):
        with pytest.raises(UserError, match=f"another conversion .other: {next(iter(change))}"):
            convert(source, Output(str(tars)), "tar", **{"shard_size": 8, "workers": 1, **change})
    with pytest.raises(UserError, match="other: source"):
        convert(DigitsSource(), Output(str(tars)), "tar", shard_size=8)
