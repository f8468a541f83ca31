"""What --out may be, and image files with their metadata."""

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.image_encoding import read_metadata, save_image
from gigagan_jax.inference.sample_outputs import TarOutput, parse_destination


@pytest.mark.parametrize(
    ("out", "kind", "ending"),
    [
        ("cat.png", "file", ".png"),
        ("CAT.JPG", "file", ".jpg"),
        ("new/cat.jpeg", "file", ".jpeg"),
        ("cat.webp", "file", ".webp"),
        ("samples", "folder", ".png"),
        ("cat.jpg/", "folder", ".png"),
        ("there.png", "folder", ".png"),
        ("runs/v1.5", "folder", ".png"),
        ("my photos of 3. May", "folder", ".png"),
        (".hidden", "folder", ".png"),
        ("x.tar", "tars", ".png"),
    ],
)
def test_the_ending_says_what_is_written(tmp_path, monkeypatch, out, kind, ending):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").mkdir()
    found = parse_destination(out)
    assert (found.kind, found.ending) == (kind, ending)


@pytest.mark.parametrize("ending", [".gif", ".bmp", ".tif", ".npz", ".mp4", ".TXT", ".tgz", ".pdf"])
def test_other_endings_are_refused(tmp_path, ending):
    with pytest.raises(UserError, match=r"cannot be written; use \.png, \.jpg.* or a folder"):
        parse_destination(str(tmp_path / f"x{ending}"))


def test_flags_that_do_not_fit(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").write_text("")
    for out, flags, says in (
        ("", {}, "--out is empty"),
        ("file", {}, "is a file: name a folder"),
        ("file/x.png", {}, "cannot be written"),
        ("x.png", {"image_format": "jpg"}, "leave --format out"),
        ("x.png", {"shard_size": 3}, "is no .tar"),
        ("x.tar", {"shard_size": 0}, "at least 1"),
        ("x-{00..09}.tar", {"shard_size": 3}, "names 10 tars"),
        ("x-{09..00}.tar", {}, "ends before it begins"),
    ):
        with pytest.raises(UserError, match=says):
            parse_destination(str(tmp_path / out) if out else out, **flags)
    assert parse_destination(str(tmp_path / "x.jpg"), "jpg").ending == ".jpg"


@pytest.mark.parametrize(
    ("out", "size", "total", "names"),
    [
        ("x.tar", None, 30_000, ["x.tar"]),
        ("x.tar", 10, 25, ["x-00000.tar", "x-00001.tar", "x-00002.tar"]),
        ("x-%03d.tar", 10, 20, ["x-000.tar", "x-001.tar"]),
        ("x-%d.tar", None, 10_001, ["x-0.tar", "x-1.tar"]),
        ("x-{00010..00012}.tar", None, 7, ["x-00010.tar", "x-00011.tar", "x-00012.tar"]),
    ],
)
def test_names_of_tars(tmp_path, out, size, total, names):
    tars = TarOutput(parse_destination(str(tmp_path / out), None, size), total)
    assert [tars._shard_path(i).name for i in tars._shards()] == names
    assert tars.metadata.name == "x.metadata.jsonl"


def test_more_tars_than_images(tmp_path):
    with pytest.raises(UserError, match="names 10 tars for 3 images"):
        TarOutput(parse_destination(str(tmp_path / "x-{0..9}.tar")), 3)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp"])
def test_metadata_in_any_script_in_every_format(tmp_path, name):
    image = np.full((16, 12, 3), 90, np.uint8)
    metadata = {"prompt": 'été 数字の六 🙂\nsecond "line"', "seed": "42", "empty": ""}
    save_image(tmp_path / name, image, metadata)
    assert read_metadata(tmp_path / name) == metadata
    with Image.open(tmp_path / name) as picture:
        assert abs(np.asarray(picture.convert("RGB")).astype(int) - image).max() <= 2
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_prompt_too_long_for_a_jpeg_is_cut(tmp_path):
    metadata = {"prompt": "数" * 100_000, "seed": "42"}
    save_image(tmp_path / "a.jpg", np.zeros((4, 4, 3), np.uint8), metadata)
    found = read_metadata(tmp_path / "a.jpg")
    assert found["seed"] == "42"
    assert found["prompt"].startswith("数" * 5000)
    assert found["prompt"].endswith("...")


def test_quality(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.webp"):
        save_image(tmp_path / f"low_{name}", noise, {}, 30)
        save_image(tmp_path / f"high_{name}", noise, {}, 100)
        assert (tmp_path / f"low_{name}").stat().st_size < (tmp_path / f"high_{name}").stat().st_size
    # Lossless.
    with Image.open(tmp_path / "high_a.webp") as picture:
        np.testing.assert_array_equal(np.asarray(picture), noise)
