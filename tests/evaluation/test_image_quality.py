"""PSNR and SSIM against scikit-image, seams against closed forms, and the memory of large images."""

import math
import tracemalloc

import numpy as np
import pytest
from skimage import color, data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gigagan_jax.core.errors import UserError
from gigagan_jax.evaluation import image_quality
from gigagan_jax.evaluation.image_quality import measure_seams, psnr, seam_ratio, ssim


@pytest.fixture(scope="module")
def pair():
    """Two uint8 [150, 201, 3], the second with noise."""
    a = np.asarray(data.chelsea())[50:200, 100:301]
    noise = np.random.default_rng(0).normal(0, 12, a.shape)
    return a, (a + noise).round().clip(0, 255).astype(np.uint8)


def theirs(a, b, channel, border):
    """(PSNR, SSIM) by scikit-image, whose rgb2ycbcr has the same luma."""
    inner = slice(border, -border or None)
    a, b = a[inner, inner].astype(float), b[inner, inner].astype(float)
    if channel == "y":
        a, b = (color.rgb2ycbcr(x / 255)[..., 0] for x in (a, b))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    axis = 2 if channel == "rgb" else None
    return peak_signal_noise_ratio(a, b, data_range=255), structural_similarity(a, b, channel_axis=axis, **options)


@pytest.mark.parametrize("channel", ["rgb", "y"])
@pytest.mark.parametrize("border", [0, 7])
def test_psnr_and_ssim_are_those_of_scikit_image(pair, monkeypatch, channel, border):
    expected = theirs(*pair, channel, border)
    # At once, and in strips whose last one is shorter.
    for strip in (2**18, 1000):
        monkeypatch.setattr(image_quality, "_STRIP", strip)
        assert psnr(*pair, border, channel) == pytest.approx(expected[0], abs=1e-9)
        assert ssim(*pair, border, channel) == pytest.approx(expected[1], abs=1e-9)


def test_floats_are_the_same_images_in_another_range(pair):
    floats = [x.astype(np.float32) / 127.5 - 1 for x in pair]
    assert psnr(*floats) == pytest.approx(psnr(*pair), abs=1e-4)
    assert ssim(*floats) == pytest.approx(ssim(*pair), abs=1e-5)
    assert psnr(pair[0], floats[1]) == pytest.approx(psnr(*pair), abs=1e-4)


def test_closed_forms():
    a, b = np.full((2, 20, 30, 3), 100, np.uint8)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == 1
    b[:10] = 110
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 50))
    # Of constant images only the term of the means is left.
    b[:] = 110
    c1 = 2.55**2
    assert ssim(a, b) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1))
    # White has luma 235, black 16.
    a[:], b[:] = 0, 255
    assert psnr(a, b, channel="y") == pytest.approx(20 * math.log10(255 / 219))


def test_seams_are_the_mean_difference_near_borders_over_that_inside():
    untiled = np.full((40, 60, 3), 100, np.uint8)
    image = untiled + 2
    # Borders at row 20 and at columns 20 and 40, with bands of 2 pixels at each side.
    image[18:22] = image[:, 18:22] = image[:, 38:42] = 106
    assert measure_seams(image, untiled, [20], [20, 40], band=2) == pytest.approx((6, 2))
    assert seam_ratio(image, untiled, [20], [20, 40], band=2) == pytest.approx(3)
    # A band twice as wide: 8 of 40 rows and 16 of 60 columns, of which half have 6 in them.
    near, wrong = 40 * 60 - 32 * 44, 40 * 60 - 36 * 52
    assert seam_ratio(image, untiled, [20], [20, 40], band=4) == pytest.approx((2 + 4 * wrong / near) / 2)
    assert seam_ratio(untiled, untiled, [20], []) == 1
    image = untiled.copy()
    image[19] += 1
    assert seam_ratio(image, untiled, [20], []) == math.inf


def test_seams_are_the_same_in_strips(pair, monkeypatch):
    whole = measure_seams(*pair, [64, 128], [64, 128, 192])
    monkeypatch.setattr(image_quality, "_STRIP", 1000)
    assert measure_seams(*pair, [64, 128], [64, 128, 192]) == pytest.approx(whole)


def test_memory_does_not_grow_with_the_height(monkeypatch):
    monkeypatch.setattr(image_quality, "_STRIP", 2**16)
    peaks = []
    for height in (2000, 8000):
        a = np.zeros((height, 400, 3), np.uint8)
        tracemalloc.start()
        psnr(a, a)
        ssim(a, a)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]


def test_bad_images_are_one_line(pair):
    a, b = pair
    with pytest.raises(UserError, match=r"shapes \(150, 201, 3\) and \(150, 200, 3\): both must be"):
        psnr(a, b[:, :-1])
    with pytest.raises(UserError, match="border of 75 px leaves nothing"):
        psnr(a, b, border=75)
    with pytest.raises(UserError, match="10x20 px: SSIM needs 11 or more"):
        ssim(a[:10, :20], b[:10, :20])
    with pytest.raises(UserError, match="leave all of"):
        measure_seams(a, b, [], [])
    with pytest.raises(UserError, match="leave nothing of"):
        measure_seams(a, b, [75], [], band=100)
    with pytest.raises(ValueError, match="channel 'luma'"):
        psnr(a, b, channel="luma")
