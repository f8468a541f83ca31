"""The upsampler here against that of `torch_gigagan.py`, written from the paper: every image, every prediction, the way back."""

import sys

import jax
import numpy as np
import pytest
import torch

from configs import imagenet, laion_upsampler, photos
from gigagan_jax.config import from_dict
from gigagan_jax.config.parameter_renames import nest
from gigagan_jax.interop import torch_check, torch_gigagan
from gigagan_jax.interop.artefact import example_conditions
from gigagan_jax.interop.model_folder import torch_config
from gigagan_jax.interop.torch_table import from_torch, to_torch
from gigagan_jax.models.build import build_discriminator, build_generator
from gigagan_jax.models.discriminator import prediction_pairs
from gigagan_jax.models.upsampler import grid_of
from tests.interop.test_torch_parity import FAST, changed, close, load, nchw
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

from measure_parity import draw_params

N = 2
CONFIGS = {
    # Whole maps, every image from the bottleneck up, attention spread over two blocks.
    "text": lambda: small(
        laion_upsampler, "tiny", generator__blocks=(2, 2, 1, 1), generator__attention_depth=(2, 1, 0, 0)
    ),
    # Windows of a quarter of the map, of a map of their size, and an image that starts as the small one.
    "windows": lambda: small(photos, "tiny", generator__blocks=(2, 1, 1), generator__attention_depth=(1, 2, 0)),
    "words": lambda: small(
        laion_upsampler,
        "tiny",
        text__encoder="words",
        text__buckets=16,
        upsampler__image_skip=True,
        upsampler__encoder_blocks=2,
        upsampler__skip_gain=0.5,
        generator__blocks=(1, 2, 1, 1),
        generator__attention_placement="last",
        generator__attention__window=4,
        discriminator__output_levels=1,
    ),
    "class": lambda: small(
        imagenet,
        "upsampler-tiny",
        generator__blocks=(2, 2, 1, 1),
        generator__attention_placement="every",
        discriminator__class_mapping_depth=1,
    ),
    "none": lambda: small(imagenet, "sr-tiny", generator__attention__window=2, generator__attention_placement="every"),
    "plain": lambda: small(
        laion_upsampler,
        "tiny",
        **{f"generator__{name}": False for name in ("w_token", "cross_attention", "mlp_after_self")},
        upsampler__bottleneck=8,
        generator__blocks=(2, 1, 1),
        generator__bank=(1, 2, 2),
        generator__attention_depth=(1, 0, 0),
        generator__attention__norm="none",
        generator__attention__kind="dot",
        generator__layer_scale=0.1,
        discriminator__input_levels=0,
        discriminator__output_levels=2,
    ),
}


def small(base, variant, **values):
    return changed(from_dict(base.get_config(variant)), **({"dtype": "float32", "remat": False} | values))


# Between them those of the default tier have every switch that is not in test_torch_parity.py.
_DEFAULT = ("windows", "words", "class")
TIERS = [pytest.param(name, marks=() if name in _DEFAULT else pytest.mark.slow) for name in CONFIGS]


@pytest.fixture(scope="module", params=TIERS)
def config(request):
    return CONFIGS[request.param]()


def as_torch(x):
    return torch.from_numpy(x) if x.dtype == np.float32 else torch.from_numpy(x).long()


def test_every_image_of_an_input_that_is_not_square(config):
    network = build_generator(config)
    params = draw_params(network, 1)
    theirs = load(torch_gigagan.make_generator(torch_config(config)), network, config, params)
    assert isinstance(theirs, torch_gigagan.Upsampler)
    grid = grid_of(config.upsampler, config.generator)
    h, w = config.upsampler.input_resolution, config.upsampler.input_resolution + grid
    rng, conditions = np.random.default_rng(2), example_conditions(config, N)
    z = rng.standard_normal((N, config.generator.z_dim)).astype(np.float32)
    low = rng.uniform(-1, 1, (N, h, w, 3)).astype(np.float32)
    noise = np.array([0.3, 0.8], np.float32)
    run = jax.jit(lambda p: network.bind(p)(z, low, noise, **conditions), compiler_options=FAST)
    images, _ = run(params)
    with torch.no_grad():
        given = {name: as_torch(x) for name, x in conditions.items()}
        expected = theirs(torch.from_numpy(z), nchw(low), torch.from_numpy(noise), **given)
    assert [x.shape[1] for x in images] == list(config.image_resolutions)
    assert images[-1].shape[2] == w * config.resolution // h
    for ours, image in zip(images, expected, strict=True):
        close(np.moveaxis(np.asarray(ours), -1, 1), image, 1e-4)


def test_every_prediction(config):
    network = build_discriminator(config)
    params = draw_params(network, 3)
    theirs = load(torch_gigagan.Discriminator(torch_config(config)), network, config, params)
    count = config.discriminator.minibatch_std or N
    found = list(torch_check.run_discriminator(config, network, params, theirs, count))
    assert len(found) == len(prediction_pairs(config.discriminator))
    for name, ours, expected in found:
        assert torch_check.difference(ours, expected) < 1e-4, name


@pytest.mark.parametrize("build", [build_generator, build_discriminator])
def test_there_and_back_changes_no_bit(config, build):
    network = build(config)
    params = draw_params(network, 7)
    state = dict(to_torch(network, config, params))
    read = state.__getitem__
    back = nest(dict(from_torch(network, config, {k: x.shape for k, x in state.items()}, read, "here")))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_levels_of_the_discriminator_that_are_tested():
    pairs = {name: len(prediction_pairs(make().discriminator)) for name, make in CONFIGS.items()}
    assert pairs == {"text": 6, "windows": 3, "words": 2, "class": 1, "none": 1, "plain": 7}
