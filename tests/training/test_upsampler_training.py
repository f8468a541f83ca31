"""What an upsampler trains on: small images made on the device, losses that compare, a run that resumes bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import photos
from gigagan_jax import train
from gigagan_jax.checkpoint.manager import states_equal
from gigagan_jax.config import from_dict
from gigagan_jax.models.layers.resample import image_pyramid
from gigagan_jax.training.state import Networks
from gigagan_jax.training.upsampler_objective import UpsamplerObjective
from tests.runs import read


def tiny(**fields):
    c = photos.get_config("tiny")
    for name, value in fields.items():
        group, _, key = name.rpartition("__")
        setattr(c[group] if group else c, key, value)
    return c


def objective(**fields):
    return UpsamplerObjective(Networks(from_dict(tiny(**fields))))


def batch(n=8, side=16):
    rng = np.random.default_rng(0)
    # Smooth, as photographs are: each is a small image, enlarged.
    small = rng.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in small]
    return {"image": jnp.asarray(np.stack(large)), "label": jnp.zeros(n, jnp.int32)}


def test_small_images_are_the_large_ones_reduced():
    o = objective(upsampler__noise=0.0, upsampler__degradation=0.0, upsampler__downsample="area")
    low, level = jax.jit(o.make_low)(batch(), jax.random.key(0))
    real = batch()["image"].astype(jnp.float32) / 127.5 - 1
    np.testing.assert_allclose(low, image_pyramid(real, 2)[1], atol=1e-5)
    assert not level.any()


def test_noise_is_of_the_level_that_the_network_is_told():
    o = objective(upsampler__noise=0.8, upsampler__degradation=0.0)
    clean, _ = jax.jit(objective(upsampler__noise=0.0, upsampler__degradation=0.0).make_low)(
        batch(64), jax.random.key(0)
    )
    low, level = jax.jit(o.make_low)(batch(64), jax.random.key(1))
    assert 0.0 == float(level.min()) < 0.7 < float(level.max()) <= 0.8
    assert 20 <= int((level == 0).sum()) <= 44
    noise = low - jnp.sqrt(1 - level**2)[:, None, None, None] * clean
    np.testing.assert_allclose(jnp.std(noise, axis=(1, 2, 3)), level, rtol=0.25, atol=0.01)


def test_a_share_of_the_images_is_degraded():
    plain = {"upsampler__noise": 0.0}
    clean, _ = jax.jit(objective(upsampler__degradation=0.0, **plain).make_low)(batch(64), jax.random.key(0))
    low, _ = jax.jit(objective(upsampler__degradation=0.25, **plain).make_low)(batch(64), jax.random.key(0))
    changed = np.abs(np.asarray(low - clean)).max((1, 2, 3)) > 1e-6
    assert 6 <= changed.sum() <= 28


def test_the_pixel_loss_is_that_of_the_levels():
    o = objective()
    b = batch()
    real = b["image"].astype(jnp.float32) / 127.5 - 1
    ((name, weight, value),) = o.reconstruction_losses([real + 0.25], b, {})
    assert (name, weight) == ("pixel", o.config.loss.pixel)
    np.testing.assert_allclose(value, 0.25, rtol=1e-5)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tmp_path):
    """Also what is drawn for the small images: degradations and noise follow the step."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    from skimage.data import astronaut

    for i in range(16):
        Image.fromarray(astronaut()[16 * i : 16 * i + 32, 200:240]).save(pictures / f"{i}.png")
    flags = ["--config=configs/photos.py:tiny", f"--config.data.path={pictures}", "--config.checkpoint_kimg=0.032"]
    run = lambda name, kimg: train.verb([*flags, f"--workdir={tmp_path / name}", f"--config.total_kimg={kimg}"])
    assert run("whole", 0.064) == 0
    assert run("parts", 0.032) == 0
    assert run("parts", 0.064) == 0
    config = from_dict(tiny(total_kimg=0.064))
    (whole, data), (parts, data_of_parts) = (read(tmp_path / name, config) for name in ("whole", "parts"))
    assert int(whole.images) == 64
    assert states_equal(whole, parts)
    assert data == data_of_parts
    # The grid has the small images, the enlarged and the real ones.
    grids = sorted((tmp_path / "whole" / "snapshots").iterdir())
    assert grids
