"""The page of a run: what it shows, what it bears, how large it gets."""

import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.digits import get_config
from gigagan_jax.config import from_dict, to_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.reporting.charts import MAX_POINTS, Curve, draw_chart, moving_average, thin_curve
from gigagan_jax.reporting.run_data import MAX_GRIDS, read_metrics, read_run
from gigagan_jax.reporting.run_page import render_page
from gigagan_jax.reporting.run_report import write_report, write_report_at_end

ROOT = Path(__file__).parents[2]


def metric(step, **values):
    return {"step": step, "kimg": step * 0.016, "time": 1000.0 + step} | values


def lay_out(folder, metrics=(), goodput=(), config=None, health=None, quarantine=(), grids=()):
    """A workdir with these files; None or nothing for a file that is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("metrics.jsonl", metrics), ("goodput.jsonl", goodput), ("quarantine.jsonl", quarantine)):
        if lines:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, values in (("config.json", config), ("health_report.json", health)):
        if values is not None:
            (folder / name).write_text(json.dumps(values))
    for kimg in grids:
        (folder / "snapshots").mkdir(exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
        Image.fromarray(noise).save(folder / "snapshots" / f"{kimg:010.3f}kimg.png")
    return folder


def history(restart=20):
    """A run that was killed at step 30 and went on from step 20; the metrics of lost steps are gone."""
    about = {
        "devices": 4,
        "device": "TPU v5p",
        "chips": 4,
        "parameters": {"generator": 1_000_000},
        "data": {"examples": 99},
    }
    yield {"event": "start", "time": 0, "about": about}
    yield {"event": "resume", "time": 10, "step": 0}
    yield {"event": "time", "time": 40, "step": 30, "seconds": {"start": 10, "step": 30}}
    yield {"event": "start", "time": 50, "about": about}
    yield {"event": "resume", "time": 60, "step": restart}
    yield {"event": "time", "time": 100, "step": 60, "seconds": {"start": 10, "step": 40}}


class Pieces(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + " "


def parse(text):
    pieces = Pieces(text)
    assert pieces.open == []
    return pieces


def test_a_whole_run(tmp_path):
    config = to_dict(from_dict(get_config("tiny")))
    values = {"loss/g": 1.5, "loss/d": 0.5, "loss/r1": 0.1, "images_per_second": 400.0, "mfu": 0.41, "new/thing": 2.0}
    values |= {"images_per_second_per_chip": 100.0, "health/level/8": 0.3, "data/bad": 3}
    values |= {
        "r1/last_exit": 0.1,
        "r1/cosine/8": 0.3,
        "health/r1_ratio": 1.0,
        "health/drift/g": 1.1,
        "health/v_gap": 0.4,
    }
    workdir = lay_out(
        tmp_path / "my <run>",
        [metric(i, **values) for i in range(1, 61)],
        [*history(), {"event": "end", "time": 100, "exit": "failed", "message": "it <b>diverged"}],
        config,
        {"findings": [{"step": 7, "kimg": 0.1, "name": "collapse", "action": "warn", "text": "all images <alike>"}]},
        [
            {"name": "a", "cause": "image_empty"},
            {"name": "b", "cause": "image_empty"},
            {"name": "c", "cause": "caption"},
        ],
        grids=[0.1, 0.2, 0.3],
    )
    (workdir / "checkpoints" / "60" / "state").mkdir(parents=True)
    (workdir / "checkpoints" / "60" / "state" / "x").write_bytes(b"1" * 5000)
    (workdir / "checkpoints" / "40.damaged").mkdir()
    (workdir / "quarantine.1.jsonl").write_text(
        '{"name": "a", "cause": "image_empty"}\n{"name": "d", "cause": "late"}\n'
    )
    (workdir / "history.jsonl").write_text(
        '{"time": 1, "event": "init", "step": 0, "source": "runs/<b>", "taken": {"G": {"arrays": 8, "of": 9}}}\n'
        '{"time": 2, "event": "data", "step": 30, "old": {"examples": null}, "new": {"examples": 28}}\n'
        '{"time": 3, "event": "settings", "step": 40, "fields": {"loss.match_d": [1, 2.5], "data.flip": [false, true]}}\n'
        '{"time": 4, "event": "data", "step": 50}\n[]\n{"time'
    )
    out = write_report(workdir)
    assert out == workdir / "report.html"
    text = out.read_text()
    found = parse(text)
    for said in ("my <run>", "failed", "it <b>diverged", "4 × TPU v5p", "41.0 %", "all images <alike>", "image_empty"):
        assert said in found.text, said
    for said in (
        "Loss of G and D",
        "R1 penalty",
        "Cosine of the gradients of D's last exit",
        "Gradient norms over the lowest level",
        "new/thing",
        "40.damaged",
        "5 kB",
        "snapshot_kimg",
        "3 grids",
        "by cause: 4",
        "started from runs/<b>: G 8 of 9 arrays",
        "data: ? -> 28 examples",
        "loss.match_d: 1 -> 2.5; data.flip: False -> True",
    ):
        assert said in found.text, said
    # What no group names is the result of an evaluator: none of training's own measures is among them.
    between = lambda first, last: text.split(f">{first}</h2>")[1].split(f">{last}</h2>")[0]
    assert "new/thing" in between("Evaluation", "Health")
    assert "r1/" not in between("Evaluation", "Health")
    assert all(name in between("Health", "Data") for name in ("r1/cosine/8", "health/drift/g", "health/v_gap"))
    # of 100 s: 20 + 40 useful, a third of the first 30 repeated, 10 not running
    assert re.search(r"useful steps\s+60.0 %\s+1 min 00 s", found.text)
    assert re.search(r"steps lost in a stop, and repeated\s+10.0 %", found.text)
    restarts = [a for tag, a in found.tags if tag == "line" and a.get("class") == "restart"]
    assert restarts
    # self-contained: nothing is fetched, by any tag or style
    for _, attributes in found.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in text
    assert not re.search(r"https?://", text)


def test_an_interrupted_write_leaves_the_old_page(tmp_path):
    workdir = lay_out(tmp_path, [metric(1, a=1.0)])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(workdir)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_a_run_that_has_just_begun_and_damaged_files(tmp_path):
    lay_out(tmp_path / "a", config={})
    assert "no line of metrics yet" in parse(render_page(read_run(tmp_path / "a"))).text
    b = lay_out(tmp_path / "b", [metric(1, **{"loss/g": None, "loss/d": 1.0})], list(history())[:1], grids=[0.1])
    for name in ("metrics.jsonl", "goodput.jsonl", "quarantine.jsonl", "config.json", "health_report.json"):
        with open(b / name, "ab") as file:
            file.write(b'\xff\x00[1]\n[]\n{"step": 2, "kimg": 0.032, "loss/g": "x"}\n{"step": 3, "kim')
    (b / "snapshots" / "0000000.200kimg.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (b / "snapshots" / "other.png").write_bytes(b"")
    found = read_run(b)
    assert len(found.grids) == 1
    assert found.metrics.last_value("loss/d") == 1.0
    assert found.metrics.last_value("loss/g") is None
    assert "there is no config.json" in parse(render_page(found)).text


def test_how_it_ended(tmp_path):
    def said(*events, **more):
        run = read_run(lay_out(tmp_path, goodput=events, config={}))
        run.now = more.get("now", run.now)
        return parse(render_page(run)).text[:200]

    start = {"event": "start", "time": 1000, "about": {}}
    assert "running" in said(start, now=1100)
    assert "killed or lost" in said(start, now=2000)
    assert "finished" in said(start, {"event": "end", "time": 1010, "exit": "done"})
    assert "stopped by SIGTERM" in said(
        start, {"event": "end", "time": 1, "exit": "stopped", "message": "stopped by SIGTERM"}
    )


def test_a_folder_that_is_no_workdir(tmp_path, refused):
    refused(lambda: read_run(tmp_path / "none"), tmp_path / "none", "no such folder")
    refused(lambda: read_run(tmp_path), tmp_path, "not the workdir", "metrics.jsonl")


def test_the_command(tmp_path):
    workdir = lay_out(tmp_path / "run", [metric(1, a=1.0)])

    def tool(*arguments):
        command = [sys.executable, "tools/report.py", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = tool(f"--workdir={workdir}", f"--out={tmp_path / 'x.html'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.html").read_text().startswith("<!doctype html>")
    done = tool(f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_long_run_is_a_small_page(tmp_path):
    """100,000 lines; a million of them take ten times as long to read, and the same to show."""
    rng = np.random.default_rng(0)
    n, names = 100_000, [f"loss/{i}" for i in range(8)]
    table = rng.uniform(size=(n, len(names))).round(4).tolist()
    table[n // 2][0] = 1000.0
    table[n // 3][1] = None
    lines = (json.dumps(metric(i, **dict(zip(names, row, strict=True)))) for i, row in enumerate(table))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    events = [{"event": "start", "time": 0}, {"event": "resume", "time": 0, "step": 0}]
    for i in range(2000):
        events += [{"event": "start", "time": i}, {"event": "resume", "time": i, "step": i}]
        events += [{"event": "time", "time": i + 0.5, "step": i + 1, "seconds": {"step": 0.5}}]
    lay_out(tmp_path, goodput=events, grids=[float(i) for i in range(60)], config={})
    text = write_report(tmp_path).read_text()
    found = parse(text)
    assert len(text) < 8e6
    assert f"{MAX_GRIDS} of 60 grids" in found.text
    for tag, attributes in found.tags:
        if tag == "path":
            assert len(re.findall("[ML]", attributes["d"])) <= MAX_POINTS + 5
    assert "1 beyond the frame" in found.text
    assert "1 not finite" in found.text


def test_thinning_keeps_extremes_gaps_and_order():
    rng = np.random.default_rng(1)
    x, y = np.arange(50_000.0), rng.normal(size=50_000)
    y[31_234], y[17], y[40_000:40_200] = 99.0, -99.0, np.nan
    a, b = thin_curve(x, y)
    assert len(a) <= MAX_POINTS
    assert np.all(np.diff(a) > 0)
    assert np.nanmax(b) == 99
    assert np.nanmin(b) == -99
    assert np.isnan(b).any()
    np.testing.assert_array_equal(b, y[a.astype(int)])
    np.testing.assert_array_equal(thin_curve(x[:10], y[:10])[1], y[:10])


def test_the_mean_does_not_lean_at_the_ends_and_passes_over_gaps():
    y = np.arange(100.0)
    np.testing.assert_allclose(moving_average(y, 9), y)
    y[50] = np.nan
    out = moving_average(y, 5)
    assert np.isnan(out[50])
    assert out[51] == pytest.approx(np.mean([49, 51, 52, 53]))


def numbers(svg, name):
    return float(re.search(rf'data-{name}="([^"]*)"', svg)[1])


@pytest.mark.parametrize("log", [False, True])
def test_a_curve_is_where_its_values_are(log):
    values = np.array([1.0, 10.0, 100.0])
    svg = draw_chart([Curve("loss/x", np.array([0.0, 5.0, 10.0]), values)], log=log)
    points = [tuple(map(float, p)) for p in re.findall(r"L([\d.]+),([\d.]+)", re.search(r'd="([^"]*)"', svg)[1])]
    top, bottom, y0, y1 = (numbers(svg, k) for k in ("top", "bottom", "y0", "y1"))
    read = [y0 + (bottom - y) / (bottom - top) * (y1 - y0) for _, y in points]
    np.testing.assert_allclose(read, np.log10(values) if log else values, atol=0.02 if not log else 0.001)
    assert points[0][0] == numbers(svg, "left")
    assert points[-1][0] == numbers(svg, "right")


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0, 2.0], [0.0, 0.0], [math.nan, 1.0, math.nan], [-1e30, 1e30], [1e-30] * 3]
)
@pytest.mark.parametrize("log", [None, True])
def test_odd_values_have_a_frame(values, log):
    svg = draw_chart([Curve("a", np.arange(len(values)) * 1.0, np.array(values))], log=log)
    parse(svg)
    assert "nan" not in svg
    assert "inf" not in svg
    assert "no finite value" in draw_chart([Curve("a", np.zeros(2), np.full(2, np.nan))])


def test_metrics_by_columns(tmp_path):
    lay_out(tmp_path, [metric(10, a=1.0), metric(20, a=None, b=3), metric(30, a=2.0, c=True)])
    m = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(m.columns["a"][1], [1, np.nan, 2])
    np.testing.assert_allclose(m.columns["b"][0], [0.32])
    assert m.kimg_at_step(25) == pytest.approx(0.4)
    assert m.kimg_at_step(5) == pytest.approx(0.08)
    assert m.last_time == 1030


def test_a_report_comes_at_the_end_and_never_in_the_way(tmp_path, caplog):
    workdir = lay_out(tmp_path / "run", [metric(1, a=1.0)])
    with write_report_at_end(workdir):
        pass
    (workdir / "report.html").unlink()

    def fails(error, log):
        with write_report_at_end(workdir):
            if log:
                with open(workdir / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metric(2, a=2.0)) + "\n")
            raise error

    with pytest.raises(KeyError):
        fails(KeyError("asked to stop"), True)
    with pytest.raises(UserError):  # it did not come to training: what is there is of others
        fails(UserError("another config"), False)
    assert not (workdir / "report.html").exists()
    with pytest.raises(UserError):
        fails(UserError("diverged"), True)
    assert (workdir / "report.html").exists()
    with write_report_at_end(tmp_path / "none"):
        time.sleep(0)
    assert "no report was written" in caplog.text
