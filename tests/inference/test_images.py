import stat

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.image_encoding import read_metadata
from gigagan_jax.inference.images import draw_grid, file_name, save_png, side_by_side, to_uint8

GROUND = np.array([250, 250, 248])


def cells(rows, cols, side):
    """Each image one flat colour of its own, none of them the ground."""
    out = np.zeros((rows, cols, side, side, 3), np.uint8)
    for r in range(rows):
        for c in range(cols):
            out[r, c] = (40 + 20 * r, 40 + 20 * c, 200)
    return out


def columns_with_ink(picture):
    return np.flatnonzero((np.asarray(picture) != GROUND).any(axis=(0, 2)))


def rows_with_ink(picture):
    return np.flatnonzero((np.asarray(picture) != GROUND).any(axis=(1, 2)))


# to_uint8


def test_every_level_comes_back():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    got = to_uint8(levels / np.float32(127.5) - 1)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, levels)


def test_halves_round_up_and_the_outside_is_clipped():
    x = np.array([-1.0, 1.0, 0.0, -3.0, 3.0, 0.5 / 127.5 * 255 - 1]).reshape(1, 2, 3)
    np.testing.assert_array_equal(to_uint8(x).ravel(), [0, 255, 128, 0, 255, 128])


def test_bfloat16_from_jax():
    got = to_uint8(jnp.full((2, 4, 4, 3), -1, jnp.bfloat16))
    assert got.shape == (2, 4, 4, 3)
    assert not got.any()


def test_nan_is_counted():
    x = np.zeros((2, 4, 4, 3), np.float32)
    x[0, 0, 0] = np.nan
    x[1, 2, 3, 1] = np.inf
    with pytest.raises(ValueError, match="4 of 96 image values are NaN or infinite"):
        to_uint8(x)


@pytest.mark.parametrize("x", [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 1)), np.zeros((4, 3))])
def test_what_is_no_float_image_is_refused(x):
    with pytest.raises(ValueError, match="images must be"):
        to_uint8(x)


# grid


@pytest.mark.parametrize(("side", "scale"), [(8, 8), (16, 4), (32, 2), (24, 3), (33, 1), (64, 1)])
def test_small_images_are_enlarged_and_large_ones_are_not(side, scale):
    images = cells(2, 3, side)
    picture = draw_grid(images, None)
    ink = columns_with_ink(picture)
    assert ink[-1] - ink[0] + 1 == 3 * side * scale + 2 * 2
    pixels = np.asarray(picture)
    # every image is there, in its own colour and its full size
    for r in range(2):
        for c in range(3):
            assert (pixels == images[r, c, 0, 0]).all(-1).sum() == (side * scale) ** 2


def test_enlarging_is_by_nearest_neighbour():
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 4, 4, 3), dtype=np.uint8)
    picture = np.asarray(draw_grid(image, None, scale=5))
    y, x = rows_with_ink(picture)[0], columns_with_ink(picture)[0]
    expected = np.kron(image[0, 0], np.ones((5, 5, 1), np.uint8))
    np.testing.assert_array_equal(picture[y : y + 20, x : x + 20], expected)


def test_the_padding_is_even():
    ink = np.asarray(draw_grid(cells(2, 2, 16), None, pad=6))
    ys, xs = rows_with_ink(ink), columns_with_ink(ink)
    assert ys[0] == xs[0] == ink.shape[0] - 1 - ys[-1] == ink.shape[1] - 1 - xs[-1] > 0
    assert list(np.flatnonzero(np.diff(xs) > 1)) == [63]
    assert np.diff(xs)[63] == 7


def test_each_row_label_is_drawn_beside_its_row_and_nowhere_else():
    images = cells(3, 2, 16)
    plain = np.asarray(draw_grid(images, ["", "a handwritten seven", ""]))
    left_of_images = np.flatnonzero((plain == images[0, 0, 0, 0]).all(-1).any(0))[0]
    ys = rows_with_ink(plain[:, :left_of_images])
    row = np.flatnonzero((plain == images[1, 0, 0, 0]).all(-1).any(1))
    assert row[0] <= ys[0]
    assert ys[-1] <= row[-1]
    # dark on light
    assert plain[:, :left_of_images].min() < 80


@pytest.mark.parametrize(
    "prompt",
    [
        "a very long prompt " * 600,
        "x" * 10_000,
        "",
        "two\nlines\tand\x00a NUL",
        "数字の六 🙂 עברית",
        "lone \udce9 surrogate",
        "été – «fünf» …",
    ],
)
def test_any_prompt_keeps_within_its_row(prompt):
    images = cells(2, 2, 16)
    # the neighbour below is empty, so that any ink there would be this prompt's
    picture = np.asarray(draw_grid(images, [prompt, ""], title=prompt or None, col_labels=[prompt, "b"]))
    first = np.argwhere((picture == images[0, 0, 0, 0]).all(-1))
    below = np.flatnonzero((picture == images[1, 0, 0, 0]).all(-1).any(1))
    assert len(first) == 64 * 64  # no image is drawn over
    assert (picture[below[0] :, : first[0, 1]] == GROUND).all()
    assert picture.shape[1] < 600


def test_a_long_label_differs_from_a_short_one_only_by_what_fits():
    images = cells(1, 1, 16)
    a, b = (draw_grid(images, ["word " * n]) for n in (500, 900))
    assert a.tobytes() == b.tobytes()


def test_accents_are_left_out_of_labels():
    images = cells(1, 1, 16)
    assert draw_grid(images, ["été – à Zürich"]).tobytes() == draw_grid(images, ["ete - a Zurich"]).tobytes()


def test_title_and_column_labels_add_ink_above_the_images():
    images = cells(1, 2, 16)
    heights = [
        np.flatnonzero((np.asarray(p) == images[0, 0, 0, 0]).all(-1).any(1))[0]
        for p in (
            draw_grid(images, None),
            draw_grid(images, None, ["seed 0", "seed 1"]),
            draw_grid(images, None, ["seed 0", "seed 1"], title="digits"),
        )
    ]
    assert heights[0] < heights[1] < heights[2]
    above = np.asarray(draw_grid(images, None, ["seed 0", "seed 1"], title="digits"))[: heights[2]]
    assert (above != GROUND).any()


def test_wrong_grids_are_refused():
    images = cells(2, 2, 16)
    with pytest.raises(ValueError, match="row_labels has 1 texts for 2 rows"):
        draw_grid(images, ["a"])
    with pytest.raises(ValueError, match="col_labels has 3 texts for 2 cols"):
        draw_grid(images, None, ["a", "b", "c"])
    with pytest.raises(ValueError, match="float64"):
        draw_grid(images / 255, None)
    with pytest.raises(ValueError, match=r"\[0, 2, 16, 16, 3\]"):
        draw_grid(images[:0], [])
    with pytest.raises(ValueError, match="scale must be at least 1"):
        draw_grid(images, None, scale=0)


# side_by_side


def test_side_by_side_keeps_both_pictures_and_aligns_their_tops():
    a, b = Image.new("RGB", (80, 50), (200, 0, 0)), Image.new("RGB", (60, 30), (0, 0, 200))
    both = np.asarray(side_by_side([a, b], ["truncation 1.0", "truncation 0.7"]))
    red, blue = ((both == colour).all(-1) for colour in ((200, 0, 0), (0, 0, 200)))
    assert red.sum() == 80 * 50
    assert blue.sum() == 60 * 30
    assert np.argwhere(red)[0, 0] == np.argwhere(blue)[0, 0] > 0
    assert np.flatnonzero(red.any(0))[-1] < np.flatnonzero(blue.any(0))[0]


def test_side_by_side_without_titles_adds_no_height():
    a = Image.new("RGB", (80, 50))
    assert side_by_side([a, a]).height == 50


def test_side_by_side_needs_pictures_and_as_many_titles():
    with pytest.raises(ValueError, match="at least one"):
        side_by_side([])
    with pytest.raises(ValueError, match="1 titles for 2"):
        side_by_side([Image.new("RGB", (8, 8))] * 2, ["a"])


# PNG files


def test_png_round_trip_with_metadata_in_any_script(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    metadata = {"prompt": "été 数字の六 🙂\nsecond line", "seed": "42", "empty": "", "long": "x" * 100_000}
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(path, image, metadata)
    assert read_metadata(path) == metadata
    with Image.open(path) as png:
        np.testing.assert_array_equal(np.asarray(png), image)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_metadata_that_utf8_or_png_cannot_hold_is_replaced(tmp_path):
    save_png(tmp_path / "a.png", Image.new("RGB", (4, 4)), {"prompt": "a\udce9b\0c"})
    assert read_metadata(tmp_path / "a.png") == {"prompt": "a?b�c"}


def test_a_png_is_replaced_whole_and_readable_as_the_umask_says(tmp_path):
    path = tmp_path / "a.png"
    save_png(path, Image.new("RGB", (4, 4)), {"v": "1"})
    save_png(path, Image.new("RGB", (8, 8)), {"v": "2"})
    assert read_metadata(path) == {"v": "2"}
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.png"
    save_png(path, Image.new("RGB", (4, 4)), {"v": "1"})
    with pytest.raises(UserError):
        save_png(path, Image.new("HSV", (4, 4)), {"v": "2"})  # PNG has no such mode
    assert read_metadata(path) == {"v": "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_unwritable_places_are_user_errors(tmp_path):
    image = Image.new("RGB", (4, 4))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png", tmp_path / ("x" * 300 + ".png")):
        with pytest.raises(UserError, match=r"cannot write the image .*; choose") as e:
            save_png(path, image, {})
        assert "\n" not in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_wrong_arguments_of_save_png(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        save_png(tmp_path / "a.png", np.zeros((4, 4, 3)), {})
    for key in ("", "x" * 80, "prömpt", " seed"):
        with pytest.raises(ValueError, match="PNG text key"):
            save_png(tmp_path / "a.png", Image.new("RGB", (4, 4)), {key: "v"})
    assert not list(tmp_path.iterdir())


def test_reading_what_is_no_png(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_metadata(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match="not a whole PNG"):
        read_metadata(tmp_path / "text.png")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(UserError, match="not a whole JPEG"):
        read_metadata(tmp_path / "text.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", noise, {"v": "1"})
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with pytest.raises(UserError, match="not a whole PNG"):
        read_metadata(tmp_path / "half.png")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a handwritten seven", "0003_a-handwritten-seven_seed42.png"),
        ("A Café, at NIGHT!", "0003_a-cafe-at-night_seed42.png"),
        ("../../etc/passwd\0\n\\C:*?", "0003_etc-passwd-c_seed42.png"),
        ("the cat's hat", "0003_the-cats-hat_seed42.png"),
        ("", "0003_image_seed42.png"),
        ("数字の六 🙂", "0003_image_seed42.png"),
        ("lone \udce9 surrogate", "0003_lone-surrogate_seed42.png"),
        ("x" * 10_000, f"0003_{'x' * 60}_seed42.png"),
    ],
)
def test_file_names(prompt, expected, tmp_path):
    assert file_name(3, prompt, 42) == expected
    save_png(tmp_path / expected, Image.new("RGB", (2, 2)), {"prompt": prompt})


def test_long_prompts_are_cut_between_words():
    name = file_name(0, "wonderful " * 1000, 7)
    assert name == f"0000_{'-'.join(['wonderful'] * 6)}_seed7.png"
