"""JPEGs decoded at a fraction of their size; all else about decoding is in test_sources.py."""

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.transforms import resize_and_crop
from tests.img2dataset import encoded


@pytest.fixture(scope="module")
def photo():
    """1024 x 1280 pixels."""
    import skimage.data

    image = Image.fromarray(skimage.data.astronaut()).resize((1280, 1024), Image.Resampling.LANCZOS)
    return encoded(image, quality=95)


@pytest.mark.parametrize("least, size", [(None, (1024, 1280)), (1024, (1024, 1280)), (513, (1024, 1280)), (512, (512, 640)),
                                         (192, (256, 320)), (1, (128, 160))])  # fmt: skip
def test_the_smallest_size_that_is_large_enough(photo, least, size):
    assert decode_image(photo, least).shape[:2] == size


def test_formats_without_a_fast_way_are_decoded_whole(photo):
    png = encoded(Image.fromarray(decode_image(photo, 128)), "PNG")
    np.testing.assert_array_equal(decode_image(png, 16), decode_image(png))


def test_what_training_sees_is_nearly_the_same(photo):
    """At three times the resolution the resampling filter decides what is seen: above 50 dB for a photograph."""
    whole, fast = (resize_and_crop(decode_image(photo, least), 64).astype(float) for least in (None, 192))
    assert not np.array_equal(whole, fast)
    assert 10 * np.log10(255**2 / np.mean((whole - fast) ** 2)) > 50
