"""tools/measure_upscaling.py on small crops: what is measured, what is kept, the table, the picture, bad input."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from gigagan_jax.core.errors import UserError
from gigagan_jax.preparation.photographs import gradient_energy
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

import measure_upscaling

CROPS = ROOT / "tests" / "fixtures" / "photograph_crops"
DRAW = {"crops": 6, "crop": 64, "seed": 0, "reduce": 1, "scale": 4}


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_squares_are_chosen_by_the_seed():
    first, again, other = (list(measure_upscaling.read_truths(CROPS, **DRAW | {"seed": seed})) for seed in (0, 0, 1))
    place = lambda truths: [(t.photograph, t.top, t.left) for t in truths]
    assert place(first) == place(again) != place(other)
    # Each of the four once, then two of them again.
    assert len({t.photograph for t in first}) == 4
    for truth in first:
        image = np.asarray(Image.open(CROPS / truth.photograph))
        np.testing.assert_array_equal(truth.pixels, image[truth.top : truth.top + 64, truth.left : truth.left + 64])
        assert gradient_energy(truth.pixels) >= 20
    whole = list(measure_upscaling.read_truths(CROPS, **DRAW | {"crops": 0, "reduce": 2, "scale": 3}))
    assert [t.pixels.shape for t in whole] == [(63, 63, 3)] * 4


def test_the_command(tmp_path, capsys):
    flags = [f"--photographs={CROPS}", "--crops=2", "--crop=64", "--jpeg=50", f"--out={tmp_path / 'x.jsonl'}"]
    picture = ["--rows=2", f"--picture={tmp_path / 'x.png'}"]
    assert measure_upscaling.verb([*flags, *picture]) == 0
    lines = read_lines(tmp_path / "x.jsonl")
    assert [(line["input"], line["method"]) for line in lines[:4]] == [
        ("clean", "bicubic"),
        ("clean", "Lanczos"),
        ("JPEG 50", "bicubic"),
        ("JPEG 50", "Lanczos"),
    ]
    for line in lines:
        truth = np.asarray(Image.open(CROPS / line["photograph"]))[line["top"] :, line["left"] :][:64, :64]
        low = measure_upscaling.make_low(truth, 4, 50 if line["input"] == "JPEG 50" else 0)
        filter = {"bicubic": Image.BICUBIC, "Lanczos": Image.LANCZOS}[line["method"]]
        high = np.asarray(Image.fromarray(low).resize((64, 64), filter))
        expected = peak_signal_noise_ratio(truth[4:-4, 4:-4], high[4:-4, 4:-4])
        assert line["psnr"] == pytest.approx(expected, abs=1e-4)
        assert line["megapixels"] == 64 * 64 / 1e6
    # JPEG makes each worse.
    for clean, stored in zip(lines[:2] + lines[4:6], lines[2:4] + lines[6:], strict=True):
        assert stored["psnr"] < clean["psnr"]
    with Image.open(tmp_path / "x.png") as image:
        # Input, bicubic, photograph.
        assert 3 * 64 < image.width < 4 * 64 + 40
        assert image.height > 2 * 64
    table = (tmp_path / "x.md").read_text().splitlines()
    assert len(table) == 2 + 4
    assert table[0].startswith("| input | method | PSNR, dB | worst")
    # What is there is not measured again; other settings are.
    assert measure_upscaling.verb(flags) == 0
    assert read_lines(tmp_path / "x.jsonl") == lines
    assert (tmp_path / "x.md").read_text().splitlines() == table
    assert measure_upscaling.verb([*flags, "--reduce=2"]) == 0
    more = read_lines(tmp_path / "x.jsonl")[len(lines) :]
    assert len(more) == 8
    assert {line["reduce"] for line in more} == {2}
    capsys.readouterr()


def test_a_network_runs_in_tiles():
    class Nearest:
        factor, multiple, halo, blends, batch, noise, seed = 4, 1, 2, False, 1, 0.0, 0

        def __call__(self, low):
            return low.repeat(4, axis=1).repeat(4, axis=2)

    low = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    upscale = measure_upscaling._run_tiles(Nearest(), tile=16)
    np.testing.assert_array_equal(upscale(low, 4), low.repeat(4, axis=0).repeat(4, axis=1))
    # Other scales are a Lanczos resize of passes.
    assert upscale(low, 8).shape == (320, 448, 3)


def test_means_and_worst_values():
    base = {"input": "clean", "method": "a", "megapixels": 0.5}
    lines = [
        base | {"psnr": 20.0, "ssim": 0.5, "hed": 0.3, "seconds": 1.0},
        base | {"psnr": 30.0, "ssim": 0.9, "hed": 0.1, "seconds": 2.0},
        base | {"method": "b", "psnr": 25.0, "ssim": 0.7, "seconds": 0.25},
    ]
    assert measure_upscaling.tabulate(lines) == [
        ("clean", "a", "25.00", "20.00", "0.7000", "0.5000", "0.2000", "0.3000", "3"),
        ("clean", "b", "25.00", "25.00", "0.7000", "0.7000", "", "", "0.5"),
    ]


@pytest.mark.parametrize("length, side", [(512, 512), (1100, 512), (1024, 512), (300, 300)])
def test_squares_cover_an_axis(length, side):
    covered = np.zeros(length, int)
    for start in measure_upscaling._starts(length, side):
        assert 0 <= start <= length - side
        covered[start : start + side] += 1
    assert covered.min() == 1


def test_bad_input(tmp_path):
    (tmp_path / "images").mkdir()
    base = [f"--photographs={tmp_path / 'images'}", f"--out={tmp_path / 'x.jsonl'}"]
    with pytest.raises(UserError, match="no images there"):
        measure_upscaling.verb(base)
    shutil.copy(CROPS / "coffee.jpg", tmp_path / "images" / "coffee.jpg")
    for flags, message in (
        ([], "coffee.jpg: 128x128 px are smaller than --crop=512"),
        (["--scale=3"], "--scale=3: must be 2 or more and divide --crop=512"),
        (["--jpeg=0"], "qualities are 1 to 95"),
        (["--crops=-1"], "--crops=-1 must be 0 or more"),
        (["--reduce=0"], "--reduce=0 must be positive"),
        (["--picture=x.jpg"], "name a .png"),
        ([f"--out={tmp_path / 'x.txt'}"], "name a .jsonl"),
        (["--checkpoint=bicubic=x"], "two methods are called bicubic"),
        ([f"--real_esrgan={tmp_path / 'none.bin'}"], "none.bin cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            measure_upscaling.verb([*base, *flags])
    (tmp_path / "images" / "coffee.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"coffee.jpg cannot be read"):
        measure_upscaling.verb(base)
