"""Low-resolution input: resizing and JPEG against PIL, filters against SciPy, and what a draw depends on."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from skimage import data

from gigagan_jax.config import MeshConfig
from gigagan_jax.parallel import sharding
from gigagan_jax.training import degradations
from gigagan_jax.training.degradations import add_noise, degrade, downsample_image
from gigagan_jax.training.jpeg import jpeg_compress, quantization_tables

PIL_FILTERS = {
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
KEY, SIZE = jax.random.key(3), 8
PROGRAM = jax.jit(degrade, static_argnums=2)


def resized(x, size, kind):
    """[H, W, C] by PIL, each channel as an image of floats."""
    channels = [Image.fromarray(c).resize(size[::-1], PIL_FILTERS[kind]) for c in np.moveaxis(x, 2, 0)]
    return np.stack([np.asarray(c) for c in channels], axis=-1)


def run(key, x, strength=1.0):
    """One program for all tests."""
    return np.asarray(PROGRAM(key, x, SIZE, jnp.full(8, strength)))


def uniform(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def photograph():
    return np.asarray(data.chelsea())


@pytest.fixture(scope="module")
def patches(photograph):
    """float32 [8, 32, 32, 3] in [-1, 1]"""
    cut = [photograph[a : a + 32, b : b + 32] for a in (60, 120) for b in (100, 160, 220, 280)]
    return np.stack(cut).astype(np.float32) / 127.5 - 1


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize("kind", ["area", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape, size", [((64, 64), 16), ((48, 80), (12, 20)), ((50, 37), (21, 11)), ((9, 9), (9, 20))])
def test_downsampling_is_that_of_pil(kind, shape, size):
    x = uniform(2, *shape, 3)
    ours = downsample_image(x, size, kind)
    height, width = (size, size) if isinstance(size, int) else size
    assert ours.shape == (2, height, width, 3)
    theirs = np.stack([resized(image, (height, width), kind) for image in x])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_batch_of_many_sizes_is_resized_as_pil_does(kind):
    """Each image fills its part of the canvas, and its last row and column go on outside of it."""
    x, old, new = uniform(3, 24, 20, 3), [(24, 20), (17, 20), (9, 5)], [(12, 10), (7, 17), (11, 7)]
    parts = [image[:h, :w] for image, (h, w) in zip(x, old, strict=True)]
    filled = np.stack([np.pad(p, ((0, 24 - len(p)), (0, 20 - p.shape[1]), (0, 0)), "edge") for p in parts])

    class Chosen(degradations._Draws):
        def choice(self, weights):
            return jnp.full(3, kind)

    canvas = degradations._Canvas(jnp.asarray(filled), jnp.array(old))
    out = degradations._resize_canvas(Chosen(KEY, 3), canvas, jnp.array(new), (13, 17))
    assert out.pixels.shape == (3, 13, 17, 3)
    for part, pixels, (a, b) in zip(parts, np.asarray(out.pixels), new, strict=True):
        theirs = resized(part, (a, b), ("area", "bilinear", "bicubic")[kind]).clip(-1, 1)
        np.testing.assert_allclose(pixels[:a, :b], theirs, atol=2e-3)
        np.testing.assert_array_equal(pixels[a:], np.broadcast_to(pixels[a - 1], pixels[a:].shape))
        np.testing.assert_array_equal(pixels[:, b:], np.broadcast_to(pixels[:, b - 1 : b], pixels[:, b:].shape))


def test_noise_augmentation_keeps_the_variance():
    x, noise = np.random.default_rng(0).normal(size=(2, 3, 64, 64, 3)).astype(np.float32)
    y = np.asarray(add_noise(x, jnp.array([0.0, 0.6, 1.0]), noise))
    np.testing.assert_array_equal(y[0], x[0])
    np.testing.assert_allclose(y[1], 0.8 * x[1] + 0.6 * noise[1], atol=1e-6)
    np.testing.assert_array_equal(y[2], noise[2])
    np.testing.assert_allclose(y.var((1, 2, 3)), 1, atol=0.05)


# ---------------------------------------------------------------- filters


def test_images_are_filtered_each_by_its_own_kernel():
    x, kernels = uniform(2, 12, 17, 3), np.random.default_rng(1).uniform(size=(2, 21, 21)).astype(np.float32)
    ours = jax.jit(degradations._filter_images)(x, kernels)
    theirs = [scipy.ndimage.correlate(i, k[:, :, None], mode="nearest") for i, k in zip(x, kernels, strict=True)]
    np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-3)


def test_kernels_have_sum_one_and_the_drawn_forms():
    draw = jax.jit(lambda strength: degradations._draw_kernel(degradations._Draws(KEY, 512), stage, strength))
    stage = degradations._SECOND
    kernels = np.asarray(draw(jnp.ones(512)))
    np.testing.assert_allclose(kernels.sum((1, 2)), 1, atol=1e-5)
    # Each is its own image when turned by half a circle.
    np.testing.assert_allclose(kernels, kernels[:, ::-1, ::-1], atol=1e-6)
    centre = kernels[:, 10, 10]
    assert ((centre == 1).mean()) == pytest.approx(1 - stage.blur, abs=0.08)
    # Only the sinc filter has negative weights.
    assert (kernels.min((1, 2)) < 0).mean() == pytest.approx(0.8 * degradations._SINC_BLUR, abs=0.05)
    at = np.arange(-10, 11.0)
    moments = np.stack([np.einsum("nij,i,j->n", kernels, at**a, at**b) for a, b in ((2, 0), (0, 2), (1, 1))])
    # Stretched along many directions.
    assert moments[2].min() < -0.3
    assert moments[2].max() > 0.3
    assert np.asarray(draw(jnp.zeros(512)))[:, 10, 10].min() > 0.9


def test_sinc_kernels_keep_what_is_below_their_cutoff():
    kernels = degradations._sinc_kernels()
    response = np.abs(np.fft.fft2(kernels, s=(64, 64)))
    frequency = np.hypot(*np.meshgrid(*[2 * np.pi * np.fft.fftfreq(64)] * 2))
    for gain, cutoff in zip(response, np.linspace(np.pi / 3, np.pi, len(kernels)), strict=True):
        assert gain[frequency < 0.6 * cutoff].min() > 0.8
        above = gain[frequency > 1.4 * cutoff]
        assert above.size == 0 or above.max() < 0.2


# ---------------------------------------------------------------- JPEG


@pytest.mark.parametrize("quality", [10, 40, 75, 95])
@pytest.mark.parametrize("subsample", [False, True])
def test_jpeg_is_that_of_pil(photograph, quality, subsample):
    # The sides are no multiples of 8: the blocks at the border are filled up.
    crop = photograph[40:173, 90:261]
    file = io.BytesIO()
    Image.fromarray(crop).save(file, "JPEG", quality=quality, subsampling=2 if subsample else 0)
    theirs = Image.open(file)
    tables = np.asarray(quantization_tables(jnp.array([quality], jnp.float32)))[0]
    for k in range(2):
        np.testing.assert_array_equal(tables[k].ravel(), theirs.quantization[k])
    theirs = np.asarray(theirs).astype(np.float32)
    x = crop[None].astype(np.float32) / 127.5 - 1
    ours = jax.jit(jpeg_compress)(x, jnp.array([quality], jnp.float32), jnp.array([subsample]))
    ours = (np.asarray(ours)[0] + 1) * 127.5
    np.testing.assert_allclose(ours, ours.round(), atol=1e-3)
    # What differs is the rounding of integer arithmetic; what JPEG loses is several times as much.
    difference, loss = np.abs(ours - theirs).mean(), np.abs(theirs - crop).mean()
    assert difference < 0.7
    assert difference < 0.4 * loss


# ---------------------------------------------------------------- the pipeline


def test_degraded_images_are_bytes_that_depend_on_the_key(patches):
    y = run(KEY, patches)
    assert (y.shape, y.dtype) == ((8, SIZE, SIZE, 3), np.float32)
    levels = (y + 1) * 127.5
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    assert levels.min() >= 0
    assert levels.max() <= 255
    np.testing.assert_array_equal(run(KEY, patches), y)
    other = run(jax.random.key(4), patches)
    assert (np.abs(other - y).mean((1, 2, 3)) > 0.01).all()


def test_an_image_is_degraded_by_its_place_alone(patches):
    y = run(KEY, patches)
    changed = patches.copy()
    changed[5] = -changed[5]
    again = run(KEY, changed)
    different = (again != y).any((1, 2, 3))
    assert np.flatnonzero(different).tolist() == [5]
    same = run(KEY, np.repeat(patches[:1], 8, axis=0))
    # Equal images at other places are degraded otherwise.
    assert len(np.unique(same.reshape(8, -1), axis=0)) == 8


def test_degradations_grow_with_the_strength(patches):
    clean = np.asarray(downsample_image(patches, SIZE, "area"))
    losses = []
    for strength in (0.0, 0.5, 1.0):
        keys = jax.random.split(KEY, 8)
        runs = [run(key, patches, strength) for key in keys]
        losses.append(np.mean([np.abs(y - clean).mean() for y in runs]) * 127.5)
    # At 0 what is left is the choice of the resizing filter, and rounding.
    assert losses[0] < 4
    assert losses[1] > 1.5 * losses[0]
    assert losses[2] > 1.3 * losses[1]


def test_a_sharded_batch_is_degraded_alike_on_a_mesh_without_gathering_it(patches):
    mesh = sharding.make_mesh(MeshConfig(data=8, fsdp=1))
    placed = jax.device_put(patches, NamedSharding(mesh, PartitionSpec("data")))
    strength = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("data")))
    compiled = PROGRAM.lower(KEY, placed, SIZE, strength).compile()
    assert "all-gather" not in compiled.as_text()
    ours, alone = compiled(KEY, placed, strength), run(KEY, patches)
    # Rounding to bytes turns a difference in the last bit into one level.
    assert np.abs(np.asarray(ours) - alone).max() <= 1.01 / 127.5
    assert (np.asarray(ours) != alone).mean() < 0.01
