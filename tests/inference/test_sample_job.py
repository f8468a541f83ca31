"""Jobs of samples: what is written, and that a job which was stopped anywhere goes on and ends with the same files."""

import io
import json
import logging
import tarfile
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import hold_file_lock
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.inference import sample_job
from gigagan_jax.inference.image_encoding import read_metadata
from gigagan_jax.inference.prompts import Prompt
from gigagan_jax.inference.sample_grid import check_grid, save_picture
from gigagan_jax.inference.sample_job import SampleJob, SampleSettings, check_job, report_cut_prompts, run_job
from gigagan_jax.inference.sample_outputs import parse_destination
from gigagan_jax.inference.text_to_image import TextToImage
from tests.runs import small

ODD = [
    "",
    "   ",
    "two\nlines",
    "日本の城 🏯",
    '-- --prompt=x; $(rm -rf) "q" %s {0}',
    "../../etc/passwd",
    "x" * 5000,
    "",
    "a/b",
]


class FakeModel:
    """What a job asks of `TextToImage`: images of one colour, by prompt and seed. `breaks` stops it before so many batches."""

    def __init__(self, breaks=None, step=4, **config):
        self.config, self.step, self.breaks = small(**config), step, breaks
        self.w_avg = np.full(4, step, np.float32)
        self.sampler = types.SimpleNamespace(fewest=1, batch=4, tokenizer=ByteTokenizer(16))
        self.made = []

    def batches(self, prompts, seeds, *, truncation, global_truncation, full):
        assert full == (len(prompts) > 1 or full)
        for number, start in enumerate(range(0, len(prompts), 4)):
            if number == self.breaks:
                raise KeyboardInterrupt
            rows = range(start, min(start + 4, len(prompts)))
            self.made += [(prompts[i], seeds[i]) for i in rows]
            colors = [zlib.crc32(f"{prompts[i]} {seeds[i]} {truncation}".encode()).to_bytes(4)[:3] for i in rows]
            yield np.array([np.full((8, 8, 3), list(c), np.uint8) for c in colors])


def some_job(n=22, **fields):
    return SampleJob([Prompt(f"picture number {i}") for i in range(n)], **{"num": 1, "own_seeds": True} | fields)


def run(model, job, out, settings=None, **flags):
    return run_job(model, job, parse_destination(str(out), **flags), settings or SampleSettings(), quiet=True)


def contents(folder):
    """{name: bytes} of everything that a job leaves but its record."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.endswith("job.json")}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_folder_for_an_evaluation(tmp_path):
    assert run(FakeModel(), some_job(5), tmp_path / "out") == (5, 0)
    about = lines(tmp_path / "out/metadata.jsonl")
    assert [(a["prompt"], a["seed"], a["step"], a["truncation"]) for a in about] == [
        (f"picture number {i}", i, 4, 1.0) for i in range(5)
    ]
    # As `imagefolder` of Hugging Face wants it: every file is there, and no other image.
    assert [a["file_name"] for a in about] == sorted(f.name for f in (tmp_path / "out").glob("*.png"))
    inside = read_metadata(tmp_path / "out" / about[3]["file_name"])
    assert inside == {
        **{"model": "digits", "step": "4", "truncation": "1", "global_truncation": "1"},
        **{"prompt": "picture number 3", "seed": "3"},
    }


@pytest.mark.parametrize("out", ["folder", "x.tar", "x-%02d.tar"])
def test_odd_prompts_have_names_of_their_own_in_the_order_of_the_job(tmp_path, out):
    job = SampleJob([Prompt(p) for p in ODD], num=2)
    folder = tmp_path / "new" / "place"
    run(FakeModel(), job, folder / out)
    about = lines(next(folder.rglob("*metadata.jsonl")))
    assert [a["prompt"] for a in about] == [p for p in ODD for _ in range(2)]
    assert [a["seed"] for a in about] == [0, 1] * len(ODD)
    names = [a["file_name"] for a in about]
    assert names == sorted(set(names))
    assert all(name.isascii() and "/" not in name and not name.startswith("-") and len(name) < 100 for name in names)


def test_names_of_a_file_are_kept(tmp_path):
    prompts = [Prompt("a cat", seed=7, name="391895"), Prompt("a dog", name="000139")]
    run(FakeModel(), SampleJob(prompts, 1, own_seeds=True), tmp_path / "one")
    assert [(a["file_name"], a["seed"]) for a in lines(tmp_path / "one/metadata.jsonl")] == [
        ("391895.png", 7),
        ("000139.png", 1),
    ]
    run(FakeModel(), SampleJob(prompts, 2, own_seeds=True), tmp_path / "two")
    assert [(a["file_name"], a["seed"]) for a in lines(tmp_path / "two/metadata.jsonl")] == [
        *(("391895_0.png", 7), ("391895_1.png", 8)),
        *(("000139_0.png", 2), ("000139_1.png", 3)),
    ]
    with pytest.raises(UserError, match="may be that of a prompt without one"):
        SampleJob([Prompt("a", name="0001_b_seed1"), Prompt("b")], 1)


@pytest.mark.parametrize("flags", [{}, {"image_format": "jpg"}, {"image_format": "webp"}])
@pytest.mark.parametrize("out", ["folder", "tars/x.tar", "tars/x-%02d.tar"])
def test_a_job_that_was_stopped_goes_on(tmp_path, out, flags):
    """By Ctrl-C between batches, at every place: the files are those of a job that was not stopped, byte for byte."""
    more = flags | ({"shard_size": 7} if "%" in out else {})
    whole = tmp_path / "whole" / out
    run(FakeModel(), some_job(), whole, **more)
    for breaks in (0, 1, 2, 5):
        there = tmp_path / str(breaks) / out
        with pytest.raises(KeyboardInterrupt):
            run(FakeModel(breaks=breaks), some_job(), there, **more)
        model = FakeModel()
        made, kept = run(model, some_job(), there, **more)
        assert made + kept == 22
        assert made == len(model.made)
        # A few batches are still on their way when it is stopped.
        assert kept > 0 if breaks == 5 else made > 0
        whole_folder, folder = (p if out == "folder" else p.parent for p in (whole, there))
        assert contents(folder) == contents(whole_folder)
        # Once more: nothing is left to do. A job in tars makes none of them again.
        again = FakeModel()
        assert run(again, some_job(), there, **more) == (0, 22)
        assert not again.made


def test_what_kill_9_leaves_in_a_folder(tmp_path):
    out = tmp_path / "out"
    run(FakeModel(), some_job(), out)
    whole = contents(out)
    names = sorted(n for n in whole if n.endswith(".png"))
    # A temporary file, an empty file after a power cut, images that are gone, and a line that was cut.
    (out / ".0123456789ab.tmp").write_bytes(b"half")
    (out / names[2]).write_bytes(b"")
    (out / names[5]).unlink()
    (out / names[21]).unlink()
    (out / "metadata.jsonl").write_bytes(whole["metadata.jsonl"][:777])
    model = FakeModel()
    assert run(model, some_job(), out) == (3, 19)
    assert [seed for _, seed in model.made] == [2, 5, 21]
    assert contents(out) == whole


@pytest.mark.parametrize("cut", [1, 511, 512, 1500, 2048, 4000, 9_999, 10_240])
def test_what_kill_9_leaves_of_a_tar(tmp_path, cut):
    run(FakeModel(), some_job(), tmp_path / "x.tar")
    whole = contents(tmp_path)
    (tmp_path / "x.tar").unlink()
    (tmp_path / ".x.tar.part").write_bytes(whole["x.tar"][:-cut])
    made, kept = run(FakeModel(), some_job(), tmp_path / "x.tar")
    assert made + kept == 22
    assert kept >= 10
    assert contents(tmp_path) == whole


def test_tars_are_those_of_webdataset(tmp_path):
    run(FakeModel(), some_job(), tmp_path / "x.tar", shard_size=10)
    keys = []
    for name in ("x-00000.tar", "x-00001.tar", "x-00002.tar"):
        with tarfile.open(tmp_path / name) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        stems = sorted({n.rpartition(".")[0] for n in members})
        assert not any("." in s for s in stems)
        assert set(members) == {f"{s}.{e}" for s in stems for e in ("png", "txt", "json")}
        for stem in stems:
            assert json.loads(members[f"{stem}.json"])["prompt"].encode() == members[f"{stem}.txt"]
            assert Image.open(io.BytesIO(members[f"{stem}.png"])).size == (8, 8)
        keys += stems
    assert len(keys) == 22
    assert [(a["tar"], a["file_name"]) for a in lines(tmp_path / "x.metadata.jsonl")][10] == (
        "x-00001.tar",
        keys[10] + ".png",
    )


def test_another_job_is_refused_and_the_difference_is_said(tmp_path):
    out = tmp_path / "out"
    run(FakeModel(), some_job(5), out)
    before = contents(out)
    for model, job, settings, says in (
        (FakeModel(step=6), some_job(5), None, "step 4, and not 6"),
        (FakeModel(), some_job(6), None, "images 5, and not 6"),
        (FakeModel(), some_job(5, seed=1), None, "other prompts, seeds or names"),
        (FakeModel(), some_job(5), SampleSettings(truncation=0.7), "truncation 1, and not 0.7"),
    ):
        with pytest.raises(UserError, match=f"another job .{says}.: name another --out"):
            run(model, job, out, settings)
    with pytest.raises(UserError, match="format png, and not jpg"):
        run(FakeModel(), some_job(5), out, image_format="jpg")
    assert contents(out) == before
    (out / ".job.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        run(FakeModel(), some_job(5), out)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "holiday.JPG").write_bytes(b"mine")
    (tmp_path / "x.tar").write_bytes(b"mine")
    for out in (tmp_path, tmp_path / "x.tar"):
        with pytest.raises(UserError, match="is there, and of no job of sample"):
            run(FakeModel(), some_job(5), out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["holiday.JPG", "x.tar"]
    # What is no image is in nobody's way.
    (tmp_path / "new").mkdir()
    (tmp_path / "new/prompts.txt").write_text("a")
    assert run(FakeModel(), some_job(5), tmp_path / "new") == (5, 0)


def test_two_processes_of_one_job(tmp_path):
    tmp_path.joinpath("out").mkdir()
    with (
        hold_file_lock(tmp_path / "out/.job.json", lambda: None),
        pytest.raises(UserError, match="another process writes the samples"),
    ):
        run(FakeModel(), some_job(5), tmp_path / "out")


def test_a_full_disk_is_one_line_and_the_job_goes_on(tmp_path, monkeypatch):
    fail = {"left": 9}
    write = sample_job.encode_image

    def encode(*args):
        fail["left"] -= 1
        if fail["left"] < 0:
            raise UserError("cannot write the image x: No space left on device; choose a folder")
        return write(*args)

    monkeypatch.setattr(sample_job, "encode_image", encode)
    with pytest.raises(UserError, match="No space left"):
        run(FakeModel(), some_job(), tmp_path / "out")
    fail["left"] = 1000
    made, kept = run(FakeModel(), some_job(), tmp_path / "out")
    assert (made + kept, kept) == (22, 9)


def test_images_do_not_pile_up(tmp_path, monkeypatch):
    """With a slow disk the devices wait: no more than a few batches are in memory."""
    model, written, most = FakeModel(), [], [0]
    monkeypatch.setattr(sample_job, "encode_image", lambda *a: written.append(1) or b"x")
    batches = model.batches

    def watch(*args, **kw):
        for images in batches(*args, **kw):
            yield images
            most[0] = max(most[0], len(model.made) - len(written))

    model.batches = watch
    run(model, some_job(400), tmp_path / "out")
    assert len(written) == 400
    assert most[0] <= 4 * (sample_job._BATCHES_BEHIND + 2)


def test_classes_and_none(tmp_path):
    classes = {"snapshot__prompts": (), "condition": "class", "num_classes": 3, "class_names": ("cat", "dog", "bird")}
    run(FakeModel(**classes), SampleJob([Prompt("dog"), Prompt("2")], 1), tmp_path / "classes")
    found = lines(tmp_path / "classes/metadata.jsonl")
    assert [(a["class"], a["class_name"]) for a in found] == [(1, "dog"), (2, "bird")]
    run(FakeModel(condition="none"), SampleJob([Prompt("")], 5), tmp_path / "none.tar")
    found = lines(tmp_path / "none.metadata.jsonl")
    assert [a["seed"] for a in found] == [0, 1, 2, 3, 4]
    assert not any("prompt" in a for a in found)


def test_prompts_that_a_model_does_not_take():
    named = small(snapshot__prompts=(), condition="class", num_classes=2, class_names=("cat", "dog"))
    check_job(named, [Prompt("dog")])
    with pytest.raises(UserError, match=r"^p.csv line 7: prompt 'dgo'"):
        check_job(named, [Prompt("dog"), Prompt("dgo", file="p.csv", line=7)])
    with pytest.raises(UserError, match=r"--prompt=TEXT, or --prompts=FILE.*cat, dog"):
        check_job(named, [])
    with pytest.raises(UserError, match="leave --prompt and --prompts out; --num"):
        check_job(small(condition="none"), [Prompt("x")])
    with pytest.raises(UserError, match=r"--prompt=TEXT, or --prompts=FILE"):
        check_job(small(), [])


def test_cut_prompts_are_counted_once(caplog):
    caplog.set_level(logging.WARNING)
    report_cut_prompts(FakeModel(), SampleJob([Prompt("short"), Prompt("w" * 20), Prompt("long " * 20)], 3))
    (record,) = caplog.records
    assert record.message.startswith("2 of 3 prompts are longer than the text encoder reads")
    assert "14 of 100 bytes" in record.message


def test_one_image_is_the_picture_itself_and_several_are_a_grid(tmp_path):
    settings, one, none = SampleSettings(), SampleJob([Prompt("a cat")], 1, 9), SampleJob([Prompt("")], 10)
    for ending in ("png", "jpg", "webp"):
        out = parse_destination(str(tmp_path / f"one.{ending}"))
        save_picture(FakeModel(), one, out, settings)
        with Image.open(out.path) as picture:
            assert picture.size == (8, 8)
        assert read_metadata(out.path) | {"prompt": "a cat", "seed": "9"} == read_metadata(out.path)
    grid = parse_destination(str(tmp_path / "grid.png"))
    save_picture(FakeModel(), SampleJob([Prompt("a"), Prompt("b")], 3), grid, settings)
    assert read_metadata(grid.path)["seed"] == "0..2"
    # Without prompts there is no column of labels, and the last row has gaps.
    save_picture(FakeModel(condition="none"), none, grid, settings)
    with Image.open(grid.path) as picture:
        assert picture.width > 8 * 64
        assert picture.height < 3 * 64
        assert picture.getpixel((picture.width - 40, picture.height - 40)) == (250, 250, 248)


def test_a_grid_too_large_for_a_picture(tmp_path):
    config = small()
    for name, num, says in (("g.png", 20_000, "too many"), ("g.webp", 300, "16383"), ("g.jpg", 1200, "65500")):
        with pytest.raises(UserError, match=rf"a grid of {num} images .*{says}.*name a folder"):
            check_grid(config, SampleJob([Prompt("p")], num), parse_destination(str(tmp_path / name)))
    check_grid(
        config, SampleJob([Prompt(f"p {i}") for i in range(40)], 100), parse_destination(str(tmp_path / "g.png"))
    )


def test_python_takes_classes_and_numbers_of_images():
    class Sampler:
        def __init__(self, **config):
            self.config = small(**config)

        def __call__(self, params, w_avg, prompts, seeds, **settings):
            return [(p, s) for p, s in zip(prompts, seeds, strict=True)]

    make = lambda **config: TextToImage(Sampler(**config), {}, None, 4)
    assert make(condition="none")(3, seed=5) == [("", 5), ("", 6), ("", 7)]
    classes = make(snapshot__prompts=(), condition="class", num_classes=2, class_names=("cat", "dog"))
    assert classes(["dog", "0"], [7, 8]) == [("dog", 7), ("0", 8)]
    assert make()("a cat") == [("a cat", 0)]
    with pytest.raises(UserError, match="3 images of what"):
        make()(3)
