import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from gigagan_jax.core.errors import UserError
from gigagan_jax.evaluation import digits as judging
from gigagan_jax.evaluation.digits import DigitsJudge
from gigagan_jax.evaluation.fid import frechet_distance, gaussian_moments


def resize(image):
    return np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def judge():
    return DigitsJudge(resize)


@pytest.fixture(scope="module")
def real():
    """All real digits as training sees them, shuffled: uint8 [1797, 16, 16, 3] and their digits [1797]."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    gray = np.rint(data.images[order] * 255 / 16).astype(np.uint8)
    return np.stack([resize(np.stack([g] * 3, -1)) for g in gray]), data.target[order]


def test_the_judge_reads_held_out_real_digits(judge):
    assert round(judge.judge_accuracy, 2) >= 0.99


def test_pixels_are_area_averages_in_0_to_16(judge):
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[0, 0:2, 2:4] = 255
    image[0, 14:16, 14] = 255  # half of the last cell
    expected = np.zeros((8, 8))
    expected[0, 1], expected[7, 7] = 16, 8
    np.testing.assert_allclose(judge._to_gray_pixels(image)[0].reshape(8, 8), expected, atol=1e-12)


def test_half_of_the_real_digits_pass(judge, real):
    images, digits = real
    report = judge.judge_images(images[:900], digits[:900])
    assert report.accuracy >= 0.985
    assert report.variance_ratio == pytest.approx(1, abs=0.05)
    assert report.frechet < 10
    assert report.images_per_digit == np.bincount(digits[:900]).min()
    assert report.passes


def test_real_halves_are_at_about_ten_from_each_other(judge, real):
    pixels = judge._to_gray_pixels(real[0])
    distance = frechet_distance(*gaussian_moments(pixels[:898]), *gaussian_moments(pixels[898:]))
    assert 6 < distance < 14


def test_one_image_a_digit_repeated_is_accurate_but_fails(judge, real):
    images, digits = real
    first = np.array([np.flatnonzero(digits == d)[0] for d in range(10)])
    asked = np.repeat(np.arange(10), 60)
    report = judge.judge_images(images[first][asked], asked)
    assert report.accuracy >= 0.9
    assert report.variance_ratio == pytest.approx(0, abs=1e-9)
    assert report.frechet > 2 * judging.MAX_FRECHET
    assert not report.passes


def test_shuffled_prompts_are_right_one_time_in_ten(judge, real):
    images, digits = real
    report = judge.judge_images(images, np.random.default_rng(1).permutation(digits))
    assert report.accuracy == pytest.approx(0.1, abs=0.03)
    # the images are the real ones all the same
    assert report.frechet == pytest.approx(0, abs=1e-3)
    assert not report.passes


def test_one_digit_that_is_another_is_found(judge, real):
    images, digits = real
    images = images.copy()
    threes, eights = np.flatnonzero(digits == 3), np.flatnonzero(digits == 8)
    images[eights] = images[threes[: len(eights)]]
    report = judge.judge_images(images, digits)
    assert report.worst_digit == 8
    assert report.worst_digit_accuracy < 0.05
    assert report.per_digit_accuracy[3] > 0.95
    assert report.accuracy == pytest.approx(0.9, abs=0.02)


def test_noise_is_neither_accurate_nor_near(judge):
    images = np.random.default_rng(2).integers(0, 256, (600, 16, 16, 3), dtype=np.uint8)
    report = judge.judge_images(images, np.repeat(np.arange(10), 60))
    assert report.accuracy < 0.3
    assert report.frechet > 200


def test_report_as_json_and_as_table(judge, real):
    report = judge.judge_images(*real)
    figures = json.loads(json.dumps(report.to_dict()))
    assert figures["accuracy"] == report.accuracy
    assert len(figures["per_digit_accuracy"]) == 10
    assert figures["passes"] is True
    assert figures["worst_digit_accuracy"] == min(figures["per_digit_accuracy"])
    table = report.format_table()
    assert table.count(" ok") == 6
    assert "MISSED" not in table
    assert table.endswith("every target is met")
    assert f"{report.accuracy:.3f}" in table
    assert ">= 0.980" in table
    assert "<= 30.0" in table
    assert all(len(line) <= 120 for line in table.splitlines())


GOOD = judging.DigitsReport(0.98, (0.92,) + (1.0,) * 9, 0.55, 30.0, 0.99, 60)


def test_a_report_at_the_thresholds_passes():
    assert GOOD.passes


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": 0.9799},
        {"per_digit_accuracy": (1.0,) * 9 + (0.9199,)},
        {"variance_ratio": 0.5499},
        {"frechet": 30.01},
        {"frechet": float("nan")},
        {"judge_accuracy": 0.97},
        {"images_per_digit": 59},
    ],
)
def test_each_figure_alone_can_fail_the_report(change):
    report = dataclasses.replace(GOOD, **change)
    assert not report.passes
    assert report.format_table().count("MISSED") == 1
    assert "not every target" in report.format_table()


def test_a_digit_without_images_is_named(judge, real):
    images, digits = real
    with pytest.raises(UserError, match="at least 2 images of every digit, got 0 of digit 4"):
        judge.judge_images(images[digits != 4], digits[digits != 4])


def test_no_images_at_all(judge):
    with pytest.raises(UserError, match="got 0 of digit 0"):
        judge.judge_images(np.zeros((0, 16, 16, 3), np.uint8), np.zeros(0, int))


def test_wrong_arrays_are_refused(judge, real):
    images, digits = real
    with pytest.raises(ValueError, match=r"uint8 \[N, 16, 16, 3\].*got float64"):
        judge.judge_images(images / 127.5 - 1, digits)
    with pytest.raises(ValueError, match=r"got uint8 \[1797, 8, 8, 3\]"):
        judge.judge_images(images[:, :8, :8], digits)
    with pytest.raises(ValueError, match="1797 integers"):
        judge.judge_images(images, digits[:-1])
    with pytest.raises(ValueError, match=r"0\.\.9"):
        judge.judge_images(images, digits + 1)


def test_a_resize_to_an_odd_size_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        DigitsJudge(lambda image: np.zeros((12, 12, 3), np.uint8))
