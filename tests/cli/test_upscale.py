"""The verb `upscale` around a stand-in network that computes: files, folders, flags, formats, and what goes wrong."""

import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from gigagan_jax import cli, upscale
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference import upscale_job
from gigagan_jax.inference.image_reader import read_image
from gigagan_jax.inference.tiling import Tiling
from gigagan_jax.inference.upscale_job import Settings, count_passes, fill_transparent, upscale_array, upscale_file

ROOT = Path(__file__).parents[2]


class Repeat:
    """Repeats pixels, and records what it was asked for."""

    multiple, halo, blends, batch = 8, 0, False, 1

    def __init__(self, factor=2, noise=0.0, seed=0, value=None):
        self.factor, self.noise, self.seed, self.value = factor, noise, seed, value
        self.shapes = []

    def __call__(self, low):
        self.shapes.append(low.shape)
        out = low.repeat(self.factor, 1).repeat(self.factor, 2)
        return out if self.value is None else np.full_like(out, self.value)


class StandIn:
    """What the verb sees of an Upscaler."""

    step = 7
    config = types.SimpleNamespace(name="stand_in")

    def __init__(self, **options):
        self.options, self.asked, self.loaded = options, None, []

    def load(self, checkpoint, mesh, text_path):
        self.loaded.append((checkpoint, mesh, text_path))
        return self

    def tile_model(self, *, prompt, label, seed, noise):
        self.asked = types.SimpleNamespace(prompt=prompt, label=label, seed=seed, noise=noise)
        self.model = Repeat(noise=noise, seed=seed, **self.options)
        return self.model


@pytest.fixture
def call(capsys):
    """call(*flags): (exit code, stdout, stderr) of the verb with the stand-in, which is call.model."""
    stand_in = StandIn()

    def run(*args):
        with pytest.raises(SystemExit) as leave:
            cli.main(
                lambda argv: upscale.run(upscale.parse_arguments(argv), stand_in.load), ["-n", "run", *map(str, args)]
            )
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return leave.value.code, out.out, out.err

    run.stand_in = stand_in
    return run


def picture(height=11, width=13, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def pixels_of(path):
    return read_image(path).pixels


# what it makes


def test_one_file_gets_its_name_beside_it(call, tmp_path):
    picture().save(tmp_path / "a.jpg", quality=95)
    code, out, _ = call(tmp_path / "a.jpg", "--prompt=a cat", "--seed=5")
    assert code == 0
    assert out.strip() == str(tmp_path / "a_out.png")
    np.testing.assert_array_equal(
        pixels_of(tmp_path / "a_out.png"), pixels_of(tmp_path / "a.jpg").repeat(2, 0).repeat(2, 1)
    )
    with Image.open(tmp_path / "a_out.png") as image:
        assert image.text == {"model": "stand_in", "step": "7", "seed": "5", "prompt": "a cat"}
    assert (call.stand_in.asked.prompt, call.stand_in.asked.seed) == ("a cat", 5)
    assert call.stand_in.loaded[0][0] == "run"


def test_short_flags(call, tmp_path):
    picture(40, 40).save(tmp_path / "a.png")
    code, _, _ = call("-i", tmp_path / "a.png", "-o", tmp_path / "new", "-s", 3, "-t", 16, "-f", "webp", "-g", 1)
    assert code == 0
    assert pixels_of(tmp_path / "new" / "a_out.webp").shape == (120, 120, 3)
    # Tiles of 16, and a second pass of 80 pixels.
    assert {s[1:3] for s in call.stand_in.model.shapes} == {(16, 16)}
    assert call.stand_in.loaded[0][1].devices.size == 1


@pytest.mark.parametrize(
    "scale, size", [(1, (11, 13)), (1.5, (16, 20)), (2, (22, 26)), (3.3, (36, 43)), (8, (88, 104))]
)
def test_any_scale(call, tmp_path, scale, size):
    picture().save(tmp_path / "a.png")
    assert call(tmp_path / "a.png", f"--out={tmp_path}/b.png", f"--scale={scale}")[0] == 0
    result = pixels_of(tmp_path / "b.png")
    assert result.shape == (*size, 3)
    if scale == 1:
        # Lanczos of doubled pixels is nearly the image itself.
        assert np.abs(result.astype(int) - pixels_of(tmp_path / "a.png")).mean() < 20


def test_alpha_grey_16_bits_and_profile_are_kept(call, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture(channels=4).save(tmp_path / "alpha.png", icc_profile=profile)
    picture(channels=1).save(tmp_path / "grey.png")
    deep = np.random.default_rng(0).integers(0, 65536, (9, 8), np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert call(tmp_path, f"--out={tmp_path}/out")[0] == 0
    alpha = read_image(tmp_path / "out" / "alpha_out.png")
    assert alpha.pixels.shape == (22, 26, 4)
    assert alpha.icc == profile
    source = pixels_of(tmp_path / "alpha.png").repeat(2, 0).repeat(2, 1)
    seen = source[..., 3] > 0
    np.testing.assert_array_equal(alpha.color[seen], source[seen][:, :3])
    # In floats: Pillow clips bytes after each of the two directions.
    want = picture(channels=4).getchannel("A").convert("F").resize((26, 22), Image.Resampling.LANCZOS)
    assert np.abs(alpha.alpha[..., 0] - np.asarray(want).clip(0, 255)).max() <= 1
    grey = pixels_of(tmp_path / "out" / "grey_out.png")
    np.testing.assert_array_equal(grey, pixels_of(tmp_path / "grey.png").repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(pixels_of(tmp_path / "out" / "deep_out.png")[..., 0], deep.repeat(2, 0).repeat(2, 1))


def test_pixels_without_cover_take_the_colour_near_them():
    color = np.zeros((9, 14, 3), np.uint8)
    alpha = np.zeros((9, 14, 1), np.uint8)
    color[2:5, 1:3], alpha[2:5, 1:3] = (200, 10, 60), 255
    color[6:8, 11:13], alpha[6:8, 11:13] = (0, 90, 250), 3
    filled = fill_transparent(color, alpha)
    assert filled.dtype == np.uint8
    np.testing.assert_array_equal(filled[alpha[..., 0] > 0], color[alpha[..., 0] > 0])
    # Beside the first patch and beside the second one.
    for place in ((5, 2), (2, 0), (1, 1), (2, 3)):
        assert np.abs(filled[place].astype(int) - (200, 10, 60)).max() <= 2
    for place in ((7, 13), (8, 12), (5, 11), (6, 10)):
        assert np.abs(filled[place].astype(int) - (0, 90, 250)).max() <= 2
    nothing = np.zeros_like(alpha)
    np.testing.assert_array_equal(fill_transparent(color, nothing), color)


def test_jpeg_lays_alpha_over_white(call, tmp_path):
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[:, 8:] = (200, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "a.png")
    code, _, err = call(tmp_path / "a.png", "-o", tmp_path / "b.jpg")
    assert code == 0
    assert "laid over white" in err
    result = pixels_of(tmp_path / "b.jpg").astype(int)
    assert np.abs(result[:, :12] - 255).max() < 12
    assert np.abs(result[:, 20:] - (200, 0, 0)).max() < 12


def test_noise_and_wrap(call, tmp_path):
    picture(24, 24).save(tmp_path / "a.png")
    for tile in (8, 16, 0):
        assert call(tmp_path / "a.png", "-o", tmp_path / f"{tile}.png", "-t", tile, "--noise=0.3", "--wrap")[0] == 0
    results = [pixels_of(tmp_path / f"{tile}.png") for tile in (8, 16, 0)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert (results[0] != pixels_of(tmp_path / "a.png").repeat(2, 0).repeat(2, 1)).mean() > 0.9
    assert call(tmp_path / "a.png", "-o", tmp_path / "other.png", "--noise=0.3", "--wrap", "--seed=1")[0] == 0
    assert (pixels_of(tmp_path / "other.png") != results[0]).mean() > 0.9


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (1, 50)])
def test_extreme_shapes(call, tmp_path, size):
    picture(*size).save(tmp_path / "a.png")
    assert call(tmp_path / "a.png")[0] == 0
    np.testing.assert_array_equal(
        pixels_of(tmp_path / "a_out.png"), pixels_of(tmp_path / "a.png").repeat(2, 0).repeat(2, 1)
    )


def test_repeating_passes_in_memory():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    for wrap in (False, True):
        result = upscale_array(Tiling(Repeat(), 8, wrap), pixels, Settings(scale=8))
        np.testing.assert_array_equal(result, pixels.repeat(8, 0).repeat(8, 1))
    assert [count_passes(4, s) for s in (1, 4, 4.1, 16, 17)] == [1, 1, 2, 2, 3]


def test_colour_match_of_a_whole_image():
    pixels = np.full((40, 40, 3), 128, np.uint8)
    model = Repeat(value=0.5)
    assert upscale_array(Tiling(model, 8), pixels, Settings()).mean() > 180
    assert abs(upscale_array(Tiling(model, 8), pixels, Settings(color_match=True)).mean() - 128) < 1


def test_memory_grows_by_the_input_and_not_by_the_output(tmp_path):
    def peak(height):
        picture(height, 128).save(tmp_path / "a.png")
        tracemalloc.start()
        upscale_file(
            Tiling(Repeat(4), 32), tmp_path / "a.png", tmp_path / "b.png", Settings(), overwrite=True, quiet=True
        )
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    low, high = peak(128), peak(1024)
    # Of the input three bytes a pixel; the output is 4.7 MB larger.
    assert high - low < 1.2 * (1024 - 128) * 128 * 3
    assert low < 8e6


# folders


def test_a_folder_goes_on_after_failures(call, tmp_path):
    for i, name in enumerate(("a.png", "c.png", "d.jpg")):
        picture(seed=i).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "e.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no input")
    code, out, err = call(tmp_path, "-o", tmp_path / "out")
    assert code == 2
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a_out.png", "c_out.png", "d_out.png"]
    assert len(out.splitlines()) == 3
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [Path(line.split()[1]).name for line in lines] == ["b.png", "e.png"]
    assert "3 of 5 images upscaled" in err


def test_a_folder_into_itself_twice(call, tmp_path):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "a.jpg")
    picture().save(tmp_path / "b.png")
    names = ["a.jpg", "a.png", "a_jpg_out.png", "a_png_out.png", "b.png", "b_out.png"]
    for _ in range(2):
        code, out, err = call(tmp_path)
        assert code == 0
        assert sorted(f.name for f in tmp_path.iterdir()) == names
    assert out == ""
    assert "3 outputs exist and were kept" in err
    code, out, _ = call(tmp_path, "--overwrite")
    assert len(out.splitlines()) == 3


def test_patterns(call, tmp_path):
    for name in ("a.png", "b.png", "c.webp"):
        picture().save(tmp_path / name)
    code, out, _ = call(tmp_path / "*.png", tmp_path / "a.png", "-o", tmp_path / "out", "--suffix=", "-f", "auto")
    assert code == 0
    assert sorted(Path(line).name for line in out.splitlines()) == ["a.png", "b.png"]
    assert "matches no files" in call(tmp_path / "*.tif")[2]


def test_two_inputs_of_one_output_are_refused(call, tmp_path):
    for name in ("x/a.png", "y/a.png", "z/a.png", "z/a.jpg", "z/a_png.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name)
    line = error_of(call, tmp_path / "x" / "a.png", tmp_path / "y" / "a.png", "-o", tmp_path / "out")
    assert f"{tmp_path}/x/a.png and {tmp_path}/y/a.png would both be written to {tmp_path}/out/" in line
    assert "z/a.png and " in error_of(call, tmp_path / "z")
    assert not (tmp_path / "out").exists()
    # One file by two names is one.
    code, out, _ = call(tmp_path / "x", f"{tmp_path}/y/../x/a.png", "-o", tmp_path / "out")
    assert (code, len(out.splitlines())) == (0, 1)


def test_a_job_survives_what_a_library_raises(call, tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)

    def read(path):
        if path.name == "a.png":
            raise ValueError("odd\nfile")
        return read_image(path)

    monkeypatch.setattr(upscale_job, "read_image", read)
    code, out, err = call(tmp_path)
    assert (code, out.strip()) == (2, f"{tmp_path}/b_out.png")
    assert f"error: {tmp_path}/a.png: ValueError: odd file" in err


def test_text_path_and_all_devices(call, tmp_path):
    picture().save(tmp_path / "a.png")
    assert call(tmp_path / "a.png", "--text_path=moved", "-g", "auto")[0] == 0
    _, mesh, text_path = call.stand_in.loaded[0]
    assert (mesh.devices.size, text_path) == (8, "moved")


# what goes wrong


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--scale=0.5"], "--scale=0.5: must be 1 to 64"),
        (["--scale=nan"], "--scale=nan: must be 1 to 64"),
        (["--tile=big"], "--tile=big: must be auto, 0 or a number"),
        (["--noise=2"], "--noise=2: must be 0 to 1"),
        (["--seed=-1"], "--seed=-1: must be 0 to"),
        (["--gpu=one"], "--gpu=one: must be auto or the index"),
        ([""], "an empty INPUT"),
        (["--gpu=99"], "--gpu=99: there are 8 devices, 0 to 7"),
        (["--format=bmp"], "argument -f/--format: invalid choice"),
        (["--out=x.bmp/../a.png", "--suffix=a/b"], "--suffix=a/b"),
    ],
)
def test_bad_flags_are_one_line(call, tmp_path, flags, message):
    picture().save(tmp_path / "a.png")
    code, _, err = call(tmp_path / "a.png", *flags)
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def error_of(call, *flags):
    code, _, err = call(*flags)
    assert code == 2
    assert call.stand_in.loaded == [], "the model was loaded before the input was looked at"
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_bad_files_are_one_line_before_the_model_is_loaded(call, tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    Image.new("L", (60_000, 1)).save(tmp_path / "wide.png")
    before = sorted(f.name for f in tmp_path.iterdir())
    assert "no input" in error_of(call)
    assert "does not exist" in error_of(call, tmp_path / "none.png")
    assert "not an image" in error_of(call, tmp_path / "text.png")
    assert "truncated" in error_of(call, tmp_path / "half.png")
    assert "holds no images" in error_of(call, tmp_path / "empty")
    assert "too large for JPEG" in error_of(call, tmp_path / "wide.png", "-s", 2, "-o", tmp_path / "w.jpg")
    assert "exists: --overwrite" in error_of(call, tmp_path / "a.png", "-o", tmp_path / "text.png")
    assert "is the input itself" in error_of(call, tmp_path / "a.png", "-o", tmp_path / "a.png", "--overwrite")
    assert "is the input itself" in error_of(call, tmp_path / "a.png", "--suffix=")
    assert "name a folder" in error_of(call, tmp_path / "a.png", tmp_path / "half.png", "-o", tmp_path / "b.png")
    assert "cannot be made" in error_of(call, tmp_path / "a.png", "-o", tmp_path / "a.png" / "sub" / "b.png")
    assert "one of .png, " in error_of(call, tmp_path / "a.png", "-o", tmp_path / "x.bmp")
    assert "is a file" in error_of(call, tmp_path / "a.png", tmp_path / "half.png", "-o", tmp_path / "text.png")
    assert "is a file" in error_of(call, tmp_path / "a.png", tmp_path / "half.png", "-o", ROOT / "LICENSE")
    assert "would lie among the inputs" in error_of(call, tmp_path, "--suffix=")
    assert "too long" in error_of(call, tmp_path / ("x" * 300))
    assert "too long" in error_of(call, tmp_path / "a.png", "-o", tmp_path / f"{'x' * 300}.png")
    assert sorted(f.name for f in tmp_path.iterdir()) == before


def test_a_diverged_model_is_one_line(tmp_path):
    picture().save(tmp_path / "a.png")
    args = upscale.parse_arguments(["-n", "run", str(tmp_path / "a.png")])
    with pytest.raises(UserError, match="has its training diverged"):
        upscale.run(args, StandIn(value=np.nan).load)
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_without_a_checkpoint_the_command_says_so(tmp_path):
    picture().save(tmp_path / "a.png")
    command = [sys.executable, "-W", "error", "-m", "gigagan_jax.upscale", str(tmp_path / "a.png")]
    done = subprocess.run(
        [*command, f"--checkpoint={tmp_path}/none"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert f"--checkpoint={tmp_path}/none" in done.stderr
    assert "Traceback" not in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]
