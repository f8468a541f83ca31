"""The upsampler: sizes, the reach of its windows, its layout, and the filters of long axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import imagenet, laion_upsampler, photos
from gigagan_jax.config import from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.build import build_discriminator, build_generator, make_generator
from gigagan_jax.models.layers import resample
from gigagan_jax.models.upsampler import context_radius, embed_noise_level, grid_of


def tiny(module=photos, variant="tiny", **fields):
    values = module.get_config(variant)
    with values.unlocked():
        for name, value in fields.items():
            *groups, key = name.split("__")
            group = values
            for g in groups:
                group = group[g]
            group[key] = value
    return from_dict(values)


def build(config, seed=0):
    return make_generator(config, nnx.Rngs(seed))


def run(network, config, low, seed=0):
    z = jax.random.normal(jax.random.key(seed), (low.shape[0], config.generator.z_dim))
    return network(z, low, jnp.zeros(low.shape[0]))[0]


@pytest.mark.parametrize("kind", ["up", "down", "blur"])
def test_long_axes_are_filtered_as_short_ones(kind, monkeypatch):
    """The sum of shifted copies is the product with the matrix, along both axes."""
    x = jax.random.normal(jax.random.key(0), (2, 12, 20, 3))
    by_matrix = resample._apply_filter(x, kind)
    monkeypatch.setattr(resample, "_LONGEST_MATRIX", 0)
    np.testing.assert_allclose(resample._apply_filter(x, kind), by_matrix, rtol=1e-5, atol=1e-6)


def test_pictures_are_enlarged_as_pillow_does():
    x = np.asarray(jax.random.normal(jax.random.key(0), (12, 14)), np.float32)
    wanted = Image.fromarray(x).resize((28, 24), Image.Resampling.LANCZOS)
    found = np.asarray(resample.enlarge(jnp.asarray(x)[:, :, None]))[:, :, 0]
    # Pillow leaves out what lies outside, at the border.
    np.testing.assert_allclose(found[6:-6, 6:-6], np.asarray(wanted)[6:-6, 6:-6], atol=1e-5)
    np.testing.assert_allclose(resample.enlarge(jnp.ones((3, 5, 2))), 1.0, rtol=1e-6)


@pytest.mark.parametrize("image_skip", [True, False])
def test_the_output_is_larger_by_the_factor_at_any_size(image_skip):
    levels = 1 if image_skip else 3
    config = tiny(upsampler__image_skip=image_skip, discriminator__input_levels=levels)
    network = build(config)
    for h, w in ((8, 8), (8, 24), (16, 8)):
        low = jax.ShapeDtypeStruct((2, h, w, 3), jnp.float32)
        images = jax.eval_shape(lambda x: run(network, config, x), low)
        assert [x.shape for x in images] == [(2, h * r // 8, w * r // 8, 3) for r in config.image_resolutions]
    assert config.image_resolutions == ((16,) if image_skip else (4, 8, 16))


def test_the_image_starts_as_the_small_one():
    """Without what the levels add the result is the input, by Lanczos interpolation."""
    config = tiny()
    network = build(config)
    for level in network.levels:
        if level.to_rgb is not None:
            level.to_rgb.filters[...] = jnp.zeros_like(level.to_rgb.filters[...])
    low = jax.random.normal(jax.random.key(1), (1, 8, 8, 3))
    out = jax.jit(lambda x: run(network, config, x)[-1])(low)
    np.testing.assert_allclose(out, resample.enlarge(low), rtol=1e-5, atol=1e-6)


def test_a_cell_depends_on_its_context_only():
    """With attention in windows: what is further away than the radius changes nothing, and what is near does."""
    config = tiny()
    network, grid = build(config), grid_of(config.upsampler, config.generator)
    radius = context_radius(config.upsampler, config.generator)
    assert grid == 8
    # A map so long that its first cell does not see its end.
    length = -(-(radius + 2 * grid) // grid) * grid
    low = 0.5 * jax.random.normal(jax.random.key(2), (1, grid, length, 3))
    cell = lambda x: run(network, config, x)[-1][:, :, : 2 * grid]
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(cell(x)))))(low)
    reached = np.flatnonzero(np.abs(np.asarray(gradient)).max(axis=(0, 1, 3)))
    assert grid <= reached.max() < grid + radius


def test_windows_are_those_of_a_fixed_grid():
    """A window's tokens see each other and nobody else: a map of four windows is four maps of one."""
    from gigagan_jax.models.generator import AttentionLayer

    config = tiny()
    layer = AttentionLayer(config.generator, 16, 0, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 16))
    w = jax.random.normal(jax.random.key(1), (2, config.generator.w_dim))
    whole = layer(x, w, None, None)
    for top in (0, 4):
        for left in (0, 4):
            part = layer(x[:, top : top + 4, left : left + 4], w, None, None)
            np.testing.assert_allclose(whole[:, top : top + 4, left : left + 4], part, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="6 x 8 does not divide into windows of 4 x 4"):
        layer(x[:, :6], w, None, None)


def test_the_noise_level_is_told_apart():
    levels = embed_noise_level(jnp.array([0.0, 0.1, 0.5, 1.0]))
    np.testing.assert_allclose(jnp.square(levels).mean(-1), 1.0, rtol=1e-5)
    distances = jnp.linalg.norm(levels[:, None] - levels[None], axis=-1)
    assert float(jnp.where(jnp.eye(4) > 0, 9.0, distances).min()) > 0.3


# Millions of parameters: Tables A2, 4 and 5 of the paper.
SIZES = {
    "laion_upsampler": (359.1, 130.1),
    "laion_upsampler:1024": (693.0, None),
    "imagenet:sr": (359.0, 28.9),
    "imagenet:upsampler": (359.8, 30.7),
}


@pytest.mark.parametrize("name", [n if n == "imagenet:sr" else pytest.param(n, marks=pytest.mark.slow) for n in SIZES])
def test_sizes_of_the_paper(name):
    module, _, variant = name.partition(":")
    config = from_dict({"laion_upsampler": laion_upsampler, "imagenet": imagenet}[module].get_config(variant))
    for network, wanted in zip((build_generator(config), build_discriminator(config)), SIZES[name], strict=True):
        if wanted is not None:
            assert network.count() / 1e6 == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"upsampler__input_resolution": 12}, "must be a power of two from 4 to below config.resolution=16"),
        ({"upsampler__input_resolution": 16}, "must be a power of two from 4 to below config.resolution=16"),
        ({"upsampler__bottleneck": 16}, "to config.upsampler.input_resolution=8"),
        ({"upsampler__noise": 2.0}, "config.upsampler.noise=2.0: must be 0 to 1"),
        ({"upsampler__downsample": "box"}, "must be one of 'area', 'bicubic', 'lanczos'"),
        ({"upsampler__encoder_blocks": 0}, "must be at least 1"),
        ({"loss__perceptual": 1.0}, "config.perceptual.path is not set"),
        ({"loss__vision_aided": 1.0}, "is of the base model"),
        ({"evaluators": ("digits",)}, r"an upsampler is judged by tools/measure_upscaling\.py"),
        ({"generator__attention__window": 3}, "must be a power of two"),
        ({"generator__attention__window": 16}, "is larger than the map of 4 x 4"),
        ({"discriminator__attention__window": 4}, "only G's attention has windows"),
        ({"discriminator__input_levels": 2}, "must be 0 to 1, the images that G gives"),
        ({"discriminator__input_levels": 0}, "set it to 1 or less"),
        ({"discriminator__output_levels": 4}, "must be 0 to 3, D's stages"),
        (
            {"generator__blocks": (1, 1)},
            r"config.generator.blocks has 2 entries; resolution 16 has 3 levels \(4, 8, 16\)",
        ),
    ],
)
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(UserError, match=message):
        tiny(**fields)


def test_pixel_loss_needs_an_upsampler():
    from configs import digits

    with pytest.raises(UserError, match=r"config.loss.pixel: compares with the image that was made small"):
        tiny(digits, loss__pixel=1.0)
