"""Augmentation of what D sees: which draws each source and level gets, that losses use it, and the choice by the data."""

import jax
import numpy as np
import pytest

from gigagan_jax.cli import load_config
from gigagan_jax.config import with_fields
from gigagan_jax.config.augmentation import AUGMENTATIONS, FEW_IMAGES, with_augmentations
from gigagan_jax.core.errors import UserError
from gigagan_jax.training.diff_augment import POLICIES
from gigagan_jax.training.objectives import GanObjective
from gigagan_jax.training.state import Networks

KEY = jax.random.key(3)


def objective(*augment):
    overrides = ["--config.discriminator.augment=" + ",".join(augment)] if augment else []
    return GanObjective(Networks(load_config("configs/digits.py:tiny", overrides)))


def levels(seed):
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.1, 1, (4, side, side, 3)).astype(np.float32) for side in (16, 8)]


def test_off_by_default_leaves_the_images_alone():
    images = {"real": levels(0)}
    assert objective().augmented(images, KEY) is images


def test_sources_and_levels_have_draws_of_their_own_and_copies_share_them():
    images = levels(0)
    same = dict.fromkeys(("real", "fake", "noisy real", "last"), images)
    out = objective("cutout").augmented(same, KEY)
    holes = {name: [np.asarray(x == 0).all(-1) for x in each] for name, each in out.items()}
    for i in range(2):
        # Finite differences compare an image with its noisy copy: behind the same square.
        np.testing.assert_array_equal(holes["real"][i], holes["noisy real"][i])
        np.testing.assert_array_equal(holes["real"][i], holes["last"][i])
        assert (holes["real"][i] != holes["fake"][i]).any()
        assert holes["real"][i].any()
    halved = holes["real"][0].reshape(4, 8, 2, 8, 2).any((2, 4))
    assert (halved != holes["real"][1]).any()


@pytest.mark.parametrize("loss", ["d_loss", "r1_loss", "g_loss"])
def test_every_loss_sees_augmented_images(loss, monkeypatch):
    """A loss calls D with what `augmented` returns: without it the trace has other images."""
    asked = []
    o = objective("color")
    whole = o.augmented

    def heard(images, key):
        asked.append(sorted(images))
        return whole(images, key)

    monkeypatch.setattr(o, "augmented", heard)
    from gigagan_jax.training.batch import abstract_batch
    from gigagan_jax.training.step import critic_params

    state, batch = o.networks.abstract(), abstract_batch(o.config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    critics, g = critic_params(state), state.g.params
    args = {
        "d_loss": (critics, g, batch, key),
        "r1_loss": (critics, 1.0, g, batch, key),
        "g_loss": (g, critics, batch, key),
    }[loss]
    jax.eval_shape(lambda *a: getattr(o, loss)(*a)[0], *args)
    sources = {name for names in asked for name in names}
    assert sources == {"d_loss": {"fake", "real"}, "r1_loss": {"real"}, "g_loss": {"fake"}}[loss] | (
        {"real", "fake"} if o.config.loss.pairing == "relativistic" and loss == "g_loss" else set()
    ) | ({"fake"} if o.config.loss.r2 and loss == "r1_loss" else set())


def test_auto_follows_the_size_of_the_data_set():
    config = load_config("configs/digits.py:tiny", ["--config.discriminator.augment=auto"])
    assert with_augmentations(config, 300).discriminator.augment == AUGMENTATIONS
    assert with_augmentations(config, None).discriminator.augment == AUGMENTATIONS
    assert with_augmentations(config, FEW_IMAGES).discriminator.augment == ()
    chosen = with_fields(config, {"discriminator.augment": ("color",)})
    assert with_augmentations(chosen, 10**6) == chosen
    assert tuple(POLICIES) == AUGMENTATIONS


@pytest.mark.parametrize("text", ["blur", "auto,color"])
def test_an_unknown_augmentation_is_one_line(text):
    with pytest.raises(UserError, match=r"config.discriminator.augment='(blur|auto)': must be one of"):
        load_config("configs/digits.py:tiny", [f"--config.discriminator.augment={text}"])
