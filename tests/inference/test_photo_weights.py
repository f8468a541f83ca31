"""The weights that ship for photographs: nearer to the truth than interpolation, by tiles of any size, from JPEG too."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.evaluation.image_quality import psnr, ssim
from gigagan_jax.inference.upscaler import Upscaler

ROOT = Path(__file__).parents[2]
CROPS = sorted((ROOT / "tests" / "fixtures" / "photograph_crops").glob("*.jpg"))


@pytest.fixture(scope="module")
def upscaler():
    return Upscaler.from_pretrained(ROOT / "docs" / "weights" / "photos")


def reduced(truth, quality=None):
    small = truth.resize((truth.width // 4, truth.height // 4), Image.Resampling.BICUBIC)
    if quality is None:
        return small
    stored = io.BytesIO()
    small.save(stored, "JPEG", quality=quality)
    with Image.open(stored) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("quality", [None, 75])
def test_photographs_are_nearer_than_by_bicubic_interpolation(upscaler, quality):
    assert len(CROPS) == 4
    gains, structure = [], []
    for file in CROPS:
        with Image.open(file) as image:
            truth = image.convert("RGB")
        small = reduced(truth, quality)
        ours, theirs = upscaler(small), small.resize(truth.size, Image.Resampling.BICUBIC)
        pixels = [np.asarray(x) for x in (truth, ours, theirs)]
        gains.append(psnr(pixels[1], pixels[0], border=4) - psnr(pixels[2], pixels[0], border=4))
        structure.append(ssim(pixels[1], pixels[0], border=4) - ssim(pixels[2], pixels[0], border=4))
    # The network may trade a little of the squared error for detail.
    assert min(gains) > -1.0
    assert np.mean(structure) > -0.01


def test_tiles_do_not_show(upscaler):
    with Image.open(CROPS[0]) as image:
        photograph = np.asarray(image.convert("RGB"))
    whole = upscaler(photograph, tile=128).astype(int)
    tiled = upscaler(photograph, tile=32).astype(int)
    assert (np.abs(whole - tiled).max(-1) <= 1).mean() >= 0.999
