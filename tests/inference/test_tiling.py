"""Tiles against the whole image, for a network whose pixels depend on a known surrounding and for one that sees the tile."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.inference import tiling
from gigagan_jax.inference.row_bands import (
    ArrayRows,
    NoisyRows,
    StreamRows,
    from_float,
    position_noise,
    resize_bands,
    to_float,
)
from gigagan_jax.inference.tiling import Tiling, choose_tile, match_colors, plan_axis


class ConvolutionModel:
    """Three random 3x3 convolutions with zero padding, then pixels from channels. `pooled` adds the mean of the tile."""

    def __init__(self, factor=4, multiple=8, halo=3, blends=False, batch=1, pooled=0.0, noise=0.0, most=None):
        self.factor, self.multiple, self.halo, self.blends, self.batch = factor, multiple, halo, blends, batch
        self.noise, self.seed, self.most = noise, 0, most
        self.shapes = []
        rng = np.random.default_rng(0)
        widths = (3, 8, 8, 3 * factor**2)
        kernels = [
            jnp.asarray(rng.normal(size=(3, 3, a, b)) * (9 * a) ** -0.5, jnp.float32)
            for a, b in itertools.pairwise(widths)
        ]

        @jax.jit
        def run(x):
            n, h, w, _ = x.shape
            y = x
            for i, kernel in enumerate(kernels):
                y = jax.lax.conv_general_dilated(
                    jnp.tanh(y) if i else y, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            y = y + pooled * x.mean((1, 2, 3), keepdims=True)
            y = y.reshape(n, h, w, factor, factor, 3).transpose(0, 1, 3, 2, 4, 5)
            return y.reshape(n, h * factor, w * factor, 3)

        self._run = run

    def __call__(self, low):
        self.shapes.append(low.shape)
        if self.most is not None and low.shape[1] * low.shape[2] > self.most:
            raise MemoryError("RESOURCE_EXHAUSTED: Out of memory allocating tensors")
        return np.asarray(self._run(low))


class RepeatModel:
    """Repeats pixels; with `gain` and `shift` it changes their colours."""

    multiple, halo, blends, batch, noise, seed = 4, 0, False, 1, 0.0, 0

    def __init__(self, factor=2, gain=1.0, shift=0.0):
        self.factor, self.gain, self.shift = factor, gain, shift

    def __call__(self, low):
        return (low * self.gain + self.shift).repeat(self.factor, 1).repeat(self.factor, 2).astype(np.float32)


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (height, width, 3)).astype(np.float32)


def smooth_image(height, width):
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], -1).astype(np.float32) * 0.7


def run_tiles(model, image, tile, wrap=False, progress=None):
    bands = [band.copy() for band in Tiling(model, tile, wrap)(ArrayRows(image), progress)]
    return np.concatenate(bands)


# plan


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("blends", [False, True])
@pytest.mark.parametrize("length, tile", [(1, 16), (5, 16), (64, 16), (67, 24), (200, 16), (200, 64), (33, 1024)])
def test_weights_sum_to_one_and_windows_have_one_size(length, tile, blends, wrap):
    model = types.SimpleNamespace(factor=2, multiple=8, halo=6, blends=blends)
    axis = plan_axis(length, model, tile, wrap)
    total = np.zeros(length * 2)
    for window in axis.windows:
        assert window.start % 8 == 0
        for s in window.segments:
            assert 0 <= s.start < s.stop <= 2 * axis.window
            total[s.at : s.at + s.stop - s.start] += 1 if s.weights is None else s.weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    starts = [w.segments[0].at for w in axis.windows]
    assert starts == sorted(starts)
    assert axis.window % 8 == 0


def test_padding_reflects_repeats_or_wraps():
    model = types.SimpleNamespace(factor=2, multiple=8, halo=0, blends=False)
    axis = plan_axis(6, model, 8)
    assert axis.indices(axis.windows[0]).tolist() == [0, 1, 2, 3, 4, 5, 4, 3]
    axis = plan_axis(2, model, 8)
    assert axis.indices(axis.windows[0]).tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    axis = plan_axis(6, model, 8, wrap=True)
    assert axis.indices(axis.windows[0]).tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


# tiles


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("wrap", [False, True])
def test_tiles_of_any_size_give_the_whole(wrap, batch):
    model = ConvolutionModel(batch=batch)
    image = random_image(75, 93)
    whole = run_tiles(model, image, 512, wrap)
    assert whole.shape == (300, 372, 3)
    for tile in (16, 40):
        model.shapes.clear()
        np.testing.assert_allclose(run_tiles(model, image, tile, wrap), whole, atol=2e-6)
        # One program.
        assert set(model.shapes) == {(batch, tile + 16, tile + 16, 3)}


def test_without_wrap_the_border_is_the_networks_own():
    model = ConvolutionModel()
    image = random_image(64, 64)
    np.testing.assert_allclose(run_tiles(model, image, 16), model(image[None])[0], atol=2e-6)


def test_a_repeating_image_is_shifted_with_its_tiles():
    model = ConvolutionModel()
    image = random_image(48, 64)
    plain = run_tiles(model, image, 16, wrap=True)
    shifted = run_tiles(model, np.roll(image, (8, 24), (0, 1)), 16, wrap=True)
    np.testing.assert_allclose(shifted, np.roll(plain, (32, 96), (0, 1)), atol=2e-6)


def test_neighbours_of_a_network_that_sees_the_tile_are_cross_faded():
    model = ConvolutionModel(blends=True, halo=16, pooled=2.0)
    image = smooth_image(128, 128)
    # What the network adds for the whole tile, alone: constant within the tiles that are cut.
    plain = run_tiles(ConvolutionModel(), image, 512)
    blended = run_tiles(model, image, 32) - plain
    cut = run_tiles(ConvolutionModel(halo=16, pooled=2.0), image, 32) - plain
    # The middles of the overlaps of windows of 64 pixels.
    cuts = (48 * 4, 80 * 4)
    rows = lambda x: x[:, 128:192].mean((1, 2))
    columns = lambda x: x[128:192].mean((0, 2))
    for line in (rows, columns):
        step = np.abs(np.diff(line(cut)))
        assert step.argmax() + 1 in cuts
        assert np.abs(np.diff(line(blended))).max() < 0.1 * step.max()


def test_the_seam_of_a_repeating_image_is_cross_faded():
    model = ConvolutionModel(blends=True, halo=16, pooled=2.0)
    # One half is bright: tiles at both ends of an axis have other means.
    image = smooth_image(128, 128) * 0.2
    image[:, 64:] += 0.6
    result = run_tiles(model, image, 32, wrap=True)
    plain = run_tiles(ConvolutionModel(halo=16, pooled=0.0), image, 32, wrap=True)
    mean_step = lambda x: np.abs(x[:, 0].mean() - x[:, -1].mean())
    cut = run_tiles(ConvolutionModel(halo=16, pooled=2.0), image, 32, wrap=True)
    pooled = lambda x: x - plain
    assert mean_step(pooled(result)) < 0.1 * mean_step(pooled(cut))


def test_out_of_memory_leads_to_smaller_tiles_and_the_same_image(caplog):
    image = random_image(96, 96)
    whole = run_tiles(ConvolutionModel(), image, 512)
    model = ConvolutionModel(most=48 * 48)
    run = Tiling(model, 96)
    with caplog.at_level("INFO"):
        result = np.concatenate([b.copy() for b in run(ArrayRows(image))])
    np.testing.assert_allclose(result, whole, atol=2e-6)
    assert run.tile == 24
    assert caplog.text.count("out of device memory") == 2


def test_memory_that_ends_in_the_middle_costs_no_rows():
    image = random_image(160, 48)
    whole = run_tiles(ConvolutionModel(), image, 512)
    model = ConvolutionModel()
    progress = types.SimpleNamespace(done=0, total=0)

    def step(n=1):
        progress.done += n

    progress.step = step
    run = Tiling(model, 32)
    progress.total = run.count_tiles(160, 48)
    # As a stream, which keeps no rows of before.
    source = StreamRows((image[i : i + 10] for i in range(0, 160, 10)), 160, 48)
    got = []
    for band in run(source, progress):
        got.append(band.copy())
        model.most = 40 * 40
    np.testing.assert_allclose(np.concatenate(got), whole, atol=2e-6)
    assert run.tile == 16
    assert progress.done == progress.total


def test_no_memory_at_all_is_one_line():
    with pytest.raises(UserError, match="no memory for a tile of 16 pixels"):
        run_tiles(ConvolutionModel(most=8), random_image(64, 64), 32)


def test_other_errors_of_the_network_are_not_hidden():
    class Broken(ConvolutionModel):
        def __call__(self, low):
            raise RuntimeError("INVALID_ARGUMENT")

    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT"):
        run_tiles(Broken(), random_image(16, 16), 32)


def test_bands_are_no_higher_than_a_tile():
    run = Tiling(ConvolutionModel(), 16)
    heights = [len(b) for b in run(ArrayRows(random_image(200, 20)))]
    assert sum(heights) == 800
    assert max(heights) <= 4 * (16 + 2 * 8)


def test_tile_of_a_device_that_knows_its_memory():
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 16 << 30, "bytes_in_use": 1 << 30})
    assert 500 < choose_tile(ConvolutionModel(), device) < 900
    large = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 140 << 30})
    assert choose_tile(ConvolutionModel(), large) == 1024
    full = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1 << 30, "bytes_in_use": 1 << 30})
    assert choose_tile(ConvolutionModel(), full) == 0
    assert Tiling(ConvolutionModel(), 0, device=full).tile == 16
    unknown = types.SimpleNamespace(memory_stats=lambda: None)
    assert choose_tile(ConvolutionModel(), unknown) == tiling.DEFAULT_TILE


# noise, colours, resizing


def test_a_window_of_the_noise_is_a_slice_of_the_whole():
    whole = position_noise(7, 0, 0, 150, 200)
    np.testing.assert_array_equal(position_noise(7, 37, 61, 70, 130), whole[37:107, 61:191])
    assert abs(whole.mean()) < 0.02
    assert abs(whole.std() - 1) < 0.02
    # Neighbouring cells are not copies of one another.
    assert abs(np.corrcoef(whole[:64, :64].ravel(), whole[:64, 64:128].ravel())[0, 1]) < 0.03
    assert not np.array_equal(position_noise(8, 0, 0, 4, 4), whole[:4, :4])


def test_noisy_rows_have_the_noise_of_their_numbers():
    image = random_image(100, 30)
    rows = np.array([99, 0, 63, 64, 98, 1])
    got = NoisyRows(ArrayRows(image), 0.6, 3).take(rows)
    want = (1 - 0.6**2) ** 0.5 * image + 0.6 * position_noise(3, 0, 0, 100, 30)
    np.testing.assert_allclose(got, want[rows], atol=1e-6)


def test_tiles_of_a_noisy_image_give_the_whole():
    model = ConvolutionModel()
    image = random_image(75, 93)
    run = lambda tile: np.concatenate([b.copy() for b in Tiling(model, tile)(NoisyRows(ArrayRows(image), 0.3, 5))])
    np.testing.assert_allclose(run(16), run(512), atol=2e-6)


def test_colours_are_matched_by_one_map():
    image = smooth_image(90, 70) * 0.5
    model = RepeatModel(gain=0.8, shift=0.1)
    match = match_colors(model, ArrayRows(image), side=40)
    result = match(run_tiles(model, image, 16))
    np.testing.assert_allclose(result, image.repeat(2, 0).repeat(2, 1), atol=0.01)
    # A flat image is shifted, and not divided by nothing.
    flat = np.full((20, 20, 3), 0.25, np.float32)
    np.testing.assert_allclose(match_colors(model, ArrayRows(flat))(model(flat[None])[0]), 0.25, atol=1e-5)


@pytest.mark.parametrize("size", [(37, 91), (150, 40), (200, 300)])
def test_resize_by_bands_is_pillows(size):
    image = random_image(100, 80)
    got = np.concatenate(list(resize_bands(ArrayRows(image), *size, band_rows=16)))
    whole = [
        np.asarray(Image.fromarray(np.ascontiguousarray(image[..., c])).resize(size[::-1], Image.Resampling.LANCZOS))
        for c in range(3)
    ]
    np.testing.assert_allclose(got, np.stack(whole, -1), atol=1e-5)


def test_resize_of_a_repeating_image_is_periodic():
    image = random_image(40, 60)
    run = lambda x: np.concatenate(list(resize_bands(ArrayRows(x), 20, 30, wrap=True, band_rows=8)))
    np.testing.assert_allclose(run(np.roll(image, (4, 6), (0, 1))), np.roll(run(image), (2, 3), (0, 1)), atol=1e-5)


def test_stream_keeps_the_rows_that_are_asked_for_again():
    image = random_image(50, 3)
    stream = StreamRows((image[i : i + 7] for i in range(0, 50, 7)), 50, 3)
    np.testing.assert_array_equal(stream.take(np.arange(0, 20)), image[:20])
    np.testing.assert_array_equal(stream.take(np.arange(15, 40)), image[15:40])
    np.testing.assert_array_equal(stream.take(np.array([49, 48, 30])), image[[49, 48, 30]])
    with pytest.raises(ValueError, match="row 2 of a stream"):
        stream.take(np.arange(2, 5))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_level_comes_back(dtype):
    levels = np.arange(np.iinfo(dtype).max + 1).astype(dtype).reshape(-1, 16, 1)
    np.testing.assert_array_equal(from_float(to_float(levels), dtype), levels)
    np.testing.assert_array_equal(from_float(np.array([-9.0, 9.0], np.float32), dtype), [0, np.iinfo(dtype).max])
    with pytest.raises(FloatingPointError, match="NaN"):
        from_float(np.full((2, 2, 3), np.nan, np.float32), dtype)
