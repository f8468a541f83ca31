"""Resizing, cropping and flipping, against slices of the image and Pillow's own resize."""

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.data.transforms import CROPS, FILTERS, random_flip, resize_and_crop


# In noise all pixels differ, so that any displacement shows.
def noise_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("size", [(8, 8), (5, 40), (40, 5), (1, 1), (33, 32)])
def test_result_is_square_uint8_from_any_size(size, crop, filter):
    # Thin, single-pixel and larger images, enlarged or shrunk to 16 px.
    square = resize_and_crop(noise_image(*size), 16, crop=crop, filter=filter, rng=np.random.default_rng(0))
    assert square.shape == (16, 16, 3)
    assert square.dtype == np.uint8


@pytest.mark.parametrize("filter", FILTERS)
def test_an_image_of_the_right_size_is_left_alone(filter):
    # At scale 1 every filter is the identity.
    image = noise_image(16, 16)
    np.testing.assert_array_equal(resize_and_crop(image, 16, filter=filter), image)


def test_center_crop_keeps_the_middle():
    # (12 - 8) / 2 = 2 columns go at each side.
    image = noise_image(8, 12)
    np.testing.assert_array_equal(resize_and_crop(image, 8), image[:, 2:10])
    np.testing.assert_array_equal(resize_and_crop(image.transpose(1, 0, 2), 8), image[:, 2:10].transpose(1, 0, 2))


def test_center_crop_equals_resizing_the_short_side_and_then_cropping():
    image = noise_image(32, 64)
    # The filter must read beyond the border of the crop, as it does in two steps.
    resized = np.asarray(Image.fromarray(image).resize((32, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resize_and_crop(image, 16), resized[:, 8:24])


def test_random_crop_reaches_every_window_and_nothing_else():
    image = noise_image(4, 7)
    rng = np.random.default_rng(0)
    # Four windows: 100 draws miss one of them with probability 1e-12.
    crops = {resize_and_crop(image, 4, crop="random", rng=rng).tobytes() for _ in range(100)}
    assert crops == {np.ascontiguousarray(image[:, left : left + 4]).tobytes() for left in range(4)}


def test_a_patch_is_a_window_of_the_files_own_pixels():
    image = noise_image(5, 6)
    rng = np.random.default_rng(0)
    # Six windows: 200 draws miss one of them with probability 1e-15.
    crops = {resize_and_crop(image, 4, crop="patch", rng=rng).tobytes() for _ in range(200)}
    windows = [image[top : top + 4, left : left + 4] for top in range(2) for left in range(3)]
    assert crops == {np.ascontiguousarray(w).tobytes() for w in windows}
    # There is no such window in a smaller image: its short side is scaled.
    small = noise_image(4, 4)
    np.testing.assert_array_equal(resize_and_crop(small, 8, crop="patch", rng=rng), resize_and_crop(small, 8))


def test_no_crop_keeps_both_ends():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 0] = 200
    image[:, -1] = 100
    square = resize_and_crop(image, 4, crop="none", filter="box")
    # The box filter averages pairs of columns.
    np.testing.assert_array_equal(square[0, :, 0], [100, 0, 0, 50])


def test_pad_keeps_the_whole_image_and_its_aspect():
    image = noise_image(8, 16)
    square = resize_and_crop(image, 16, crop="pad")
    np.testing.assert_array_equal(square[4:12], image)
    # The margins are white.
    assert (square[:4] == 255).all()
    assert (square[12:] == 255).all()
    np.testing.assert_array_equal(resize_and_crop(image.transpose(1, 0, 2), 16, crop="pad"), square.transpose(1, 0, 2))
    shrunk = np.asarray(Image.fromarray(image).resize((8, 4), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resize_and_crop(image, 8, crop="pad")[2:6], shrunk)


def test_nearest_repeats_pixels_and_lanczos_does_not():
    image = noise_image(4, 4)
    doubled = image.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(resize_and_crop(image, 8, filter="nearest"), doubled)
    assert (resize_and_crop(image, 8, filter="lanczos") != doubled).any()


def test_flip_mirrors_about_half():
    image = noise_image(4, 4)
    rng = np.random.default_rng(0)
    flipped = [np.array_equal(random_flip(image, rng), image[:, ::-1]) for _ in range(400)]
    # Mean 200, standard deviation 10.
    assert 160 < sum(flipped) < 240


def test_bad_arguments():
    with pytest.raises(ValueError, match="generator"):
        resize_and_crop(noise_image(8, 8), 4, crop="random")
    with pytest.raises(ValueError, match="unknown crop"):
        resize_and_crop(noise_image(8, 8), 4, crop="middle")
    with pytest.raises(ValueError, match="unknown filter"):
        resize_and_crop(noise_image(8, 8), 4, filter="cubic")
    with pytest.raises(ValueError, match="uint8"):
        resize_and_crop(noise_image(8, 8).astype(np.float32), 4)
