"""Sources, on real files: what people really have in their folders."""

import dataclasses
import io
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources import make_source, survey_data
from gigagan_jax.data.sources.digits import CAPTION_TEMPLATES, DIGIT_WORDS, DigitsSource, digit_captions
from gigagan_jax.data.sources.folder import FolderSource
from gigagan_jax.data.survey import survey_path


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height=12, width=20, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def one_image(folder, name, data, **options):
    """The example, or the BadExample, that a folder with this one file holds."""
    (folder / name).write_bytes(data)
    return FolderSource(folder, caption_required=False, **options)[0]


def cause_of(folder, name, data):
    with pytest.raises(BadExample) as error:
        one_image(folder, name, data)
    return error.value.cause


def png_claiming(width, height):
    """A PNG of a few bytes that says it is large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


# --- digits


def test_digits_are_what_scikit_learn_has():
    source = DigitsSource()
    digits = load_digits()
    assert len(source) == 1797
    # First, middle and last.
    for i in (0, 17, 1796):
        example = source[i]
        assert example.label == digits.target[i]
        assert example.image.dtype == np.uint8
        assert example.image.shape == (8, 8, 3)
        for channel in range(3):
            np.testing.assert_allclose(example.image[..., channel], digits.images[i] * 255 / 16, atol=0.5)
        assert example.captions == digit_captions(example.label)
        assert example.name == source.name(i)


def test_digit_captions_name_their_digit_and_no_two_are_alike():
    assert len(CAPTION_TEMPLATES) == 8
    captions = [caption for digit in range(10) for caption in digit_captions(digit)]
    assert len(set(captions)) == 80
    for digit in range(10):
        for caption in digit_captions(digit):
            # Each caption names the digit once, as a number or as a word.
            assert (str(digit) in caption) != (DIGIT_WORDS[digit] in caption)


def test_auto_finds_each_kind_by_its_path(tmp_path, tars):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(noise()).save(pictures / "a.png")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "images-train.array_record-00000-of-00001").write_bytes(b"x")
    for path, kind in (
        # The folder also holds a .parquet beside each tar.
        (str(tars), "tar"),
        (f"{tars}/{{00000..00002}}.tar", "tar"),
        # Decided by the name, without a request.
        ("gs://bucket/{00000..01234}.tar", "tar"),
        (str(tars / "00000.parquet"), "parquet"),
        (str(tmp_path / "records"), "arrayrecord"),
        (str(pictures), "folder"),
        # No local path of this name exists.
        ("imagenet2012", "tfds"),
        ("coco_captions/2014:1.1.0", "tfds"),
    ):
        assert survey_path(path, DataConfig(), "text").kind == kind, path
    with pytest.raises(UserError, match="there is nothing at this path"):
        survey_path(str(tmp_path / "nowhere"), DataConfig(), "text")


def test_make_source_by_config(tmp_path):
    assert len(make_source(DataConfig(source="digits"))) == 1797
    Image.fromarray(noise()).save(tmp_path / "a.png")
    source = make_source(DataConfig(path=str(tmp_path), captions="optional"))
    assert isinstance(source, FolderSource)
    mixed = make_source(DataConfig(mixture=(f"1:{tmp_path}", f"2.5:{tmp_path}"), captions="optional"))
    # Weights stay as written; only their proportions count.
    assert mixed.weights == (1.0, 2.5)
    assert len(mixed) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(), "config.data.path is empty"),
        (DataConfig(path="s3://bucket/photos", source="folder"), "folders of images are read from local disks only"),
        (DataConfig(mixture=("photos",)), "'photos' is not WEIGHT:PATH"),
        (DataConfig(mixture=("0:photos",)), "'0:photos' is not WEIGHT:PATH"),
        (DataConfig(mixture=("1:a",), path="b"), "both set"),
    ],
)
def test_make_source_refuses(data, message):
    with pytest.raises(UserError, match=message):
        make_source(data)
    # A run looks at the paths first.
    with pytest.raises(UserError, match=message):
        make_source(data, surveys=survey_data(data, "text"))


# --- a folder's good files


def test_folder_is_found_recursively_in_the_order_of_its_paths(tmp_path):
    # Not in sorted order, with suffixes in both cases.
    for name in ("b/z.PNG", "b/a.jpeg", "c.webp", "a/deep/x.bmp", "a/y.gif", "b/w.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise()).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "._c.webp").write_bytes(b"litter that macOS leaves")
    source = FolderSource(tmp_path)
    names = [source.name(i) for i in range(len(source))]
    assert names == ["a/deep/x.bmp", "a/y.gif", "b/a.jpeg", "b/w.JPG", "b/z.PNG", "c.webp"]
    for i, name in enumerate(names):
        example = source[i]
        assert example.name == name
        assert example.captions == (f"caption of {name}",)
        assert example.label == -1
        assert example.image.shape == (12, 20, 3)
        assert example.image.dtype == np.uint8
    np.testing.assert_array_equal(source[4].image, noise())


def test_several_captions_one_a_line(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    # A byte order mark, Windows line ends, a blank line and blanks around a caption.
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n  zwölf \n".encode())
    assert FolderSource(tmp_path)[0].captions == ("one", "zwölf")


def test_labels_are_the_top_folders_in_sorted_order(tmp_path):
    # The label is the top folder, however deep the image lies.
    for name in ("dog/1.png", "cat/deep/1.png", "ant/1.png", "cat/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise()).save(tmp_path / name)
    source = FolderSource(tmp_path, labels="folder")
    assert source.classes == ("ant", "cat", "dog")
    assert [source[i].label for i in range(4)] == [0, 1, 1, 2]
    assert source[0].captions == ()


def test_identity_changes_with_the_names_only(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    before = FolderSource(tmp_path, caption_required=False).identity()
    # Another image under the same name.
    Image.fromarray(noise(5, 5)).save(tmp_path / "a.png")
    assert FolderSource(tmp_path, caption_required=False).identity() == before
    Image.fromarray(noise()).save(tmp_path / "b.png")
    assert FolderSource(tmp_path, caption_required=False).identity() != before
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    assert FolderSource(tmp_path, caption_required=False).identity() == before
    assert DigitsSource().identity() == DigitsSource().identity() != before


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(noise()).save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    # Leads back up: following it would never end.
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "set")
    source = FolderSource(tmp_path / "set", caption_required=False)
    assert [source.name(i) for i in range(len(source))] == ["linked/a.png"]


# --- colours and orientation


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    # Pillow must not convert it while saving.
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    image = one_image(tmp_path, "a.jpg", data).image
    np.testing.assert_allclose(image, np.broadcast_to([255, 0, 0], image.shape), atol=4)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    # 257 = 65535 / 255: one step of 8 bits.
    grey = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = one_image(tmp_path, "a.png", encoded(Image.fromarray(grey), "PNG")).image
    np.testing.assert_array_equal(image, np.repeat(np.array([[[0], [1], [128], [255]]]), 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_bilevel_and_palette(tmp_path, mode):
    # Exactly representable in all three modes.
    square = np.kron([[0, 255], [255, 0]], np.ones((4, 4))).astype(np.uint8)
    data = encoded(Image.fromarray(square).convert(mode), "PNG")
    assert Image.open(io.BytesIO(data)).mode == mode
    np.testing.assert_array_equal(one_image(tmp_path, "a.png", data).image, np.repeat(square[..., None], 3, axis=2))


def test_alpha_goes_over_white(tmp_path):
    # Opaque red, invisible red, and half transparent black.
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    image = one_image(tmp_path, "a.png", encoded(Image.fromarray(pixels), "PNG")).image
    np.testing.assert_array_equal(image, [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]])


def test_transparent_palette_and_grey_go_over_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    # PNG palettes mark one transparent colour, or give an alpha for each.
    for transparency in (1, bytes([255, 0])):
        image = one_image(tmp_path, "a.png", encoded(palette, "PNG", transparency=transparency)).image
        np.testing.assert_array_equal(image, [[[255, 0, 0], [255, 255, 255]]])
    grey = Image.fromarray(np.array([[10, 200]], dtype=np.uint8))
    grey.putalpha(Image.fromarray(np.array([[255, 0]], dtype=np.uint8)))
    assert grey.mode == "LA"
    image = one_image(tmp_path, "a.png", encoded(grey, "PNG")).image
    np.testing.assert_array_equal(image, [[[10, 10, 10], [255, 255, 255]]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    quadrants = np.kron([[0, 80], [160, 240]], np.ones((16, 24))).astype(np.uint8)
    exif = Image.Exif()
    # The EXIF tag of the orientation.
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(quadrants), "JPEG", quality=95, exif=exif.tobytes())
    turns = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x.T, 2),
        8: np.rot90,
    }
    image = one_image(tmp_path, "a.jpg", data).image
    # JPEG is lossy.
    np.testing.assert_allclose(image[..., 0].astype(int), turns[orientation](quadrants).astype(int), atol=6)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(one_image(tmp_path, "a.gif", data).image, np.array(frames[0]))


# --- bad files


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "bmp", "gif"])
def test_truncated_image_is_bad(tmp_path, format):
    # Pillow knows the format by its full name.
    data = encoded(Image.fromarray(noise(64, 64)), {"jpg": "jpeg"}.get(format, format))
    assert cause_of(tmp_path, f"a.{format}", data[: len(data) // 2]) == "image_undecodable"


def test_other_broken_images_are_bad(tmp_path):
    assert cause_of(tmp_path, "a.png", b"") == "image_empty"
    assert cause_of(tmp_path, "a.png", b"<html>404 Not Found</html>") == "image_undecodable"
    assert cause_of(tmp_path, "a.png", b"\x89PNG\r\n\x1a\n" + bytes(100)) == "image_undecodable"


@pytest.mark.parametrize("side", [10_000, 100_000])  # Pillow warns of the first and refuses the second.
def test_decompression_bomb_is_bad(tmp_path, side):
    assert cause_of(tmp_path, "a.png", png_claiming(side, side)) == "decompression_bomb"


def test_vanished_image_is_bad(tmp_path):
    # A dangling link stands for a file that vanishes after the listing.
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(BadExample, match="image_unreadable"):
        FolderSource(tmp_path, caption_required=False)[0]


def test_bad_captions(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    # Not UTF-8.
    (tmp_path / "a.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(BadExample, match="caption_undecodable"):
        FolderSource(tmp_path)[0]
    (tmp_path / "a.txt").write_bytes(b"\n \n")
    with pytest.raises(BadExample, match="caption_empty"):
        FolderSource(tmp_path)[0]
    assert FolderSource(tmp_path, caption_required=False)[0].captions == ()
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(BadExample, match="caption_unreadable"):
        FolderSource(tmp_path)[0]


# --- bad folders


def test_missing_captions_are_counted(tmp_path):
    for name in ("a", "b", "c"):
        Image.fromarray(noise()).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"a\.png has no caption file a\.txt \(3 of 3 .*data\.captions=optional"):
        FolderSource(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    data = DataConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=r"2 of 3 images have no caption, more than .*max_bad_fraction=0\.05"):
        make_source(data)
    # Few of many are bad examples, as in tars.
    source = make_source(dataclasses.replace(data, max_bad_fraction=0.7))
    with pytest.raises(BadExample, match=r"caption_missing: b\.png"):
        source[1]
    # Optional captions: both other images have none.
    assert [FolderSource(tmp_path, caption_required=False)[i].captions for i in range(3)] == [("a",), (), ()]


def test_folders_that_are_not(tmp_path):
    with pytest.raises(UserError, match="there is nothing at this path"):
        FolderSource(tmp_path / "missing")
    with pytest.raises(UserError, match="empty path"):
        FolderSource("")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        FolderSource(tmp_path / "file")
    (tmp_path / "image.psd").write_text("x")
    with pytest.raises(UserError, match=r"no image in .*looked for \.png \.jpg"):
        FolderSource(tmp_path)
    with pytest.raises(UserError, match=r"cannot read the image folder .*name too long"):
        FolderSource(tmp_path / ("x" * 300))


def test_images_without_a_class_folder(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.fromarray(noise()).save(tmp_path / "cat" / "1.png")
    Image.fromarray(noise()).save(tmp_path / "stray.png")
    with pytest.raises(UserError, match=r"stray\.png lies in .* has no class"):
        FolderSource(tmp_path, labels="folder")
    with pytest.raises(UserError, match="unknown kind of labels 'file'"):
        FolderSource(tmp_path, labels="file")


@pytest.mark.parametrize("locked", [".", "sub"])
def test_unreadable_folder(locked):
    """Runs in a separate process without root's rights, because root may read everything."""
    script = (
        "import os, sys\n"
        "from gigagan_jax.data.sources.folder import FolderSource\n"
        "from gigagan_jax.core.errors import UserError\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    FolderSource(sys.argv[1], caption_required=False)\n"
        "except UserError as error:\n"
        "    print('UserError:', error)\n"
    )
    # pytest's temporary folders are closed to other users.
    with tempfile.TemporaryDirectory() as outer:
        Path(outer).chmod(0o755)
        folder = Path(outer) / "set"
        (folder / "sub").mkdir(parents=True)
        Image.fromarray(noise()).save(folder / "sub" / "a.png")
        (folder / locked).chmod(0)
        try:
            run = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=120)
        finally:
            (folder / locked).chmod(0o755)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("UserError: cannot read the image folder"), run.stdout
    assert "Permission denied" in run.stdout
    assert str(folder / locked) in run.stdout
