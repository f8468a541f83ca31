"""JPEGs decoded at a fraction of their size, and captions in other encodings. sources/test_sources.py tests the rest."""

import codecs

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.data.decoding import decode_captions, decode_image
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.transforms import resize_and_crop
from tests.img2dataset import encoded


@pytest.fixture(scope="module")
def photo_file():
    """1024 x 1280 pixels."""
    import skimage.data

    image = Image.fromarray(skimage.data.astronaut()).resize((1280, 1024), Image.Resampling.LANCZOS)
    return encoded(image, quality=95)


# The decoder offers 1/1, 1/2, 1/4 and 1/8 of the size. `least` applies to the short side of 1024.
@pytest.mark.parametrize(
    "least, size",
    [
        (None, (1024, 1280)),
        (1024, (1024, 1280)),
        (513, (1024, 1280)),
        (512, (512, 640)),
        (192, (256, 320)),
        (1, (128, 160)),
    ],
)
def test_the_smallest_size_that_is_large_enough(photo_file, least, size):
    assert decode_image(photo_file, least).shape[:2] == size


def test_formats_without_a_fast_way_are_decoded_whole(photo_file):
    png = encoded(Image.fromarray(decode_image(photo_file, 128)), "PNG")
    np.testing.assert_array_equal(decode_image(png, 16), decode_image(png))


def test_what_training_sees_is_nearly_the_same(photo_file):
    """From three times the resolution on, the resampling filter determines the image: above 50 dB for a photograph."""
    # 192 = DECODE_MARGIN * 64.
    full, fast = (resize_and_crop(decode_image(photo_file, least), 64).astype(float) for least in (None, 192))
    # Different at all: otherwise the fast decoder was not used.
    assert not np.array_equal(full, fast)
    # Peak signal-to-noise ratio in dB.
    assert 10 * np.log10(255**2 / np.mean((full - fast) ** 2)) > 50


MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", MARKS)
def test_captions_with_a_byte_order_mark(encoding):
    assert decode_captions(MARKS[encoding] + "été\r\n🐈 two".encode(encoding)) == ("été", "🐈 two")
    # One byte short: a file that was cut off.
    with pytest.raises(BadExample, match=f"caption_undecodable: not UTF-{encoding[4:6].rstrip('-')}"):
        decode_captions(MARKS[encoding] + "é".encode(encoding)[:-1])
