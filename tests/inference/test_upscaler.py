"""The face of an upsampler: tiles, devices, weights, the second stage after a base model, and what it refuses."""

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms

from configs import laion_upsampler, photos
from gigagan_jax import sample
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.tokenizers import make_tokenizer
from gigagan_jax.inference.tiling import Tiling
from gigagan_jax.inference.upscale_job import upscale_array
from gigagan_jax.inference.upscaler import Upscaler
from gigagan_jax.models.layers.resample import enlarge
from gigagan_jax.parallel import sharding
from tests.runs import ROOT
from tools.export_weights import scale_detail


def make(config, devices=1):
    """An upscaler with initial weights, its levels' images of a size that shows."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    upscaler = Upscaler(config, mesh)
    upscaler.params = upscaler.module.init(3, upscaler.shardings)
    return upscaler


@pytest.fixture(scope="module")
def windowed():
    return make(from_dict(photos.get_config("tiny")))


@pytest.fixture(scope="module")
def published(windowed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "photos"
    windowed.save_pretrained(folder)
    return folder


def photograph(height, width):
    from skimage.data import astronaut

    return astronaut()[60 : 60 + height, 130 : 130 + width]


def test_tiles_of_any_size_give_the_same_picture(windowed):
    image = photograph(75, 93)
    assert windowed.factor == 2
    # 24 and 40 with the halo, and the whole image in one tile.
    pictures = [windowed(image, tile=tile).astype(int) for tile in (8, 24, 1000)]
    assert pictures[0].shape == (150, 186, 3)
    assert pictures[0].std() > 10
    for other in pictures[1:]:
        assert np.abs(pictures[0] - other).max() <= 1
    # And the seed means something.
    assert (windowed(image, seed=1, noise=0.1) != windowed(image, seed=2, noise=0.1)).any()


def test_whole_maps_of_attention_are_faded_over(windowed):
    values = photos.get_config("tiny")
    values.generator.attention.window = 0
    upscaler = make(from_dict(values))
    model = upscaler.tile_model()
    assert model.blends
    assert not windowed.tile_model().blends
    image = photograph(48, 64)
    tiled, whole = (upscale_array(Tiling(model, tile), image).astype(float) for tile in (16, 1000))
    rows = range(32, 96, 32)
    difference = np.abs(tiled - whole).mean((1, 2))
    # A tile that ends is no line in the picture.
    at_borders = np.mean([difference[y - 2 : y + 2].mean() for y in rows])
    assert at_borders <= 1.5 * difference.mean() + 0.05


def test_rows_on_eight_devices_parity(windowed):
    """One image cut into strips over the devices, and tiles shared between them."""
    eight = make(windowed.config, devices=8)
    low = np.random.default_rng(0).uniform(-1, 1, (1, 64, 16, 3)).astype(np.float32)
    one = windowed.tile_model()(low)
    np.testing.assert_allclose(eight.tile_model()(low), one, atol=1e-5)
    tiles = np.concatenate([low[:, 8 * i : 8 * i + 8] for i in range(8)])
    np.testing.assert_allclose(eight.tile_model()(tiles)[3], windowed.tile_model()(tiles[3:4])[0], atol=1e-5)


def test_published_weights(windowed, published):
    read = Upscaler.from_pretrained(published)
    image = photograph(40, 40)
    assert np.abs(read(image).astype(int) - windowed(image).astype(int)).max() <= 2
    picture = read(Image.fromarray(image), scale=3)
    assert (picture.size, picture.mode) == ((120, 120), "RGB")
    assert read(image[:, :, 0], scale=1.5).shape == (60, 60)


def read(file):
    with Image.open(file) as image:
        return np.asarray(image).astype(float), image.text


def test_the_second_stage_of_text_to_image(published, tmp_path, capsys):
    base, out = ROOT / "docs" / "weights" / "digits", tmp_path / "grid"
    arguments = [f"--workdir={base}", "--prompt=a handwritten seven", "--num=2", f"--out={out}"]
    assert sample.verb([*arguments, f"--upsampler={published}"]) == 0
    pixels, texts = zip(*(read(f) for f in sorted(out.glob("*.png"))), strict=True)
    assert [x.shape for x in pixels] == [(32, 32, 3)] * 2
    assert texts[0]["upsampler"] == "photos-tiny"
    # The small image is the base model's: averaged again, it is near.
    assert sample.verb([*arguments[:-1], f"--out={tmp_path / 'small'}"]) == 0
    small, _ = read(min((tmp_path / "small").glob("*.png")))
    large = pixels[0].reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.8


def test_models_of_the_other_kind_are_refused(published, tmp_path):
    with pytest.raises(UserError, match=r"digits is a base model, .*python -m gigagan_jax.sample"):
        Upscaler.from_pretrained(ROOT / "docs" / "weights" / "digits")
    with pytest.raises(
        UserError, match=r"photos-tiny is an upsampler: it enlarges images, by python -m gigagan_jax.upscale"
    ):
        sample.verb([f"--workdir={published}", "--prompt=x", f"--out={tmp_path / 'x.png'}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.5}, "seed 1.5: must be 0 to"),
        ({"noise": "much"}, r"noise much: must be 0 \(none\) to 1"),
        ({"seed": -1}, "seed -1: must be 0 to"),
        ({"noise": 2.0}, r"noise 2.0: must be 0 \(none\) to 1"),
        ({"noise": 0.5}, "was trained with noise up to 0.1"),
        ({"prompt": "a cat"}, "was trained without captions: leave it out"),
        ({"label": 3}, "was trained without classes: leave it out"),
    ],
)
def test_bad_requests(windowed, options, message):
    with pytest.raises(UserError, match=message):
        windowed.tile_model(**options)
    with pytest.raises(UserError, match=r"an image of float64 \[4, 4, 3\]: must be uint8 or uint16"):
        windowed(np.zeros((4, 4, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"scale": s}, f"scale {s}: must be a number, 1 to 64") for s in (np.nan, -1, 0, 65, "4")),
        *(({"tile": t}, f"tile {t}: must be 'auto', 0 or") for t in (-1, 1.5, "big")),
        ({"image": np.zeros((0, 0, 3), np.uint8)}, r"\[0, 0, 3\] has no pixels"),
        ({"image": Image.new("RGB", (0, 0))}, "has no pixels: 0 x 0"),
        ({"image": Image.new("F", (4, 4))}, "the image has 32 bits a channel"),
        ({"image": "photo.png"}, "str is no image: give a PIL image or a NumPy array"),
    ],
)
def test_bad_images_and_sizes(windowed, options, message):
    with pytest.raises(UserError, match=message):
        windowed(**({"image": np.zeros((4, 4, 3), np.uint8)} | options))


def test_pictures_of_every_mode(windowed):
    rgb = Image.fromarray(photograph(16, 24))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb.info["icc_profile"] = profile
    large = windowed(rgb, tile="auto")
    assert (large.mode, large.size, large.info["icc_profile"]) == ("RGB", (48, 32), profile)
    clear = rgb.convert("P")
    clear.info["transparency"] = 0
    modes = {"L": "L", "1": "L", "P": "RGB", "LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA", "HSV": "RGB"}
    for mode, result in modes.items():
        picture = rgb.convert("LA").convert("La") if mode == "La" else rgb.convert(mode)
        assert windowed(picture).mode == result, mode
    assert windowed(clear).mode == "RGBA"
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB")
    assert np.abs(np.asarray(windowed(converted)).astype(int) - np.asarray(large)).mean() < 4
    # 16 bits stay what they are, in either byte order.
    deep = photograph(16, 24)[..., 0].astype(np.uint16) * 257 - 100 * (photograph(16, 24)[..., 0] > 0).astype(np.uint16)
    want = windowed(deep)
    big = windowed(deep.astype(">u2"))
    assert big.dtype == np.dtype(">u2")
    np.testing.assert_array_equal(big, want)
    for picture in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert windowed(picture).mode == "I;16"
        np.testing.assert_array_equal(np.asarray(windowed(picture)), want)


def test_a_caption_changes_the_picture():
    upscaler = make(from_dict(laion_upsampler.get_config("tiny")))
    low = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    first, second = (upscaler.tile_model(prompt=p)(low) for p in ("a cat", "a red car"))
    assert first.shape == (1, 32, 32, 3)
    assert np.abs(first - second).max() > 1e-3


def test_detail_interpolates_between_lanczos_and_the_network(windowed):
    low = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    images = []
    for share in (0.0, 0.5, 1.0):
        other = make(windowed.config)
        other.params = scale_detail(windowed.params, share)
        images.append(other.tile_model()(low))
    np.testing.assert_allclose(images[0], enlarge(low), atol=1e-5)
    np.testing.assert_allclose(images[1], (images[0] + images[2]) / 2, atol=1e-5)
    assert np.abs(images[2] - images[0]).max() > 0.01


def test_the_tokenizer_is_made_once_for_many_images(monkeypatch):
    """That of a frozen text encoder is read from its files, which takes longer than a small image."""
    made = []
    make_one = lambda *args, **options: made.append(args) or make_tokenizer(*args, **options)
    monkeypatch.setattr("gigagan_jax.inference.upscaler.make_tokenizer", make_one)
    model = Upscaler(from_dict(photos.get_config("tiny")))
    monkeypatch.setattr(model, "_prepare", lambda params, frozen, inputs: inputs["tokens"])
    for seed in range(3):
        model.tile_model(seed=seed)
    assert len(made) == 1


def test_noise_of_the_second_stage_is_checked_before_the_first(published, tmp_path):
    flags = [f"--workdir={ROOT / 'docs' / 'weights' / 'digits'}", "--prompt=x", f"--out={tmp_path / 'x.png'}"]
    with pytest.raises(UserError, match="are of an upsampler: name it by --upsampler"):
        sample.verb([*flags, "--upsampler_noise=0.1"])
    with pytest.raises(UserError, match=r"noise 0\.7: this model was trained with noise up to 0\.1"):
        sample.verb([*flags, f"--upsampler={published}", "--upsampler_noise=0.7"])
