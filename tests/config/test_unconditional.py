"""`condition=none` on every config file, by itself: it validates, and its whole step passes abstract evaluation."""

import importlib
import json

import jax
import pytest

from gigagan_jax import cli
from gigagan_jax.config import from_dict, to_dict
from gigagan_jax.training.batch import abstract_batch
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep
from tests.config.test_configs import VARIANTS, ids

# The step of these is evaluated: each has a way of its own to use captions or classes. Others are larger ones of a kind.
SLOW = (("digits", ""), ("emoji_upsampler", "tiny"), ("imagenet", "upsampler-tiny"))
EVALUATED = (("digits", "tiny"), *(pytest.param(v, marks=pytest.mark.slow) for v in SLOW))


def load(variant, *overrides):
    notes = []
    name, arg = variant
    path = importlib.import_module(f"configs.{name}").__file__
    return cli.load_config(f"{path}:{arg}" if arg else path, overrides, notes), notes


@pytest.mark.parametrize("variant", VARIANTS, ids=ids)
def test_every_config_is_unconditional_by_one_flag(variant):
    before, _ = load(variant)
    config, notes = load(variant, "--config.condition=none")
    assert (config.condition, config.class_count) == ("none", 0)
    assert config.loss.clip == (0.0, 0.0)
    assert config.evaluators == ()
    # A stored config is the same again.
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    if before.condition == "none":
        assert before == config
    else:
        assert notes
    assert len(notes) <= 1


@pytest.mark.parametrize("variant", EVALUATED, ids=ids)
def test_its_step_needs_neither_captions_nor_classes(variant):
    config, _ = load(variant, "--config.condition=none")
    networks = Networks(config)
    assert not networks.frozen.towers
    batch = abstract_batch(config)
    assert batch.keys() == {"image", "label"}
    args = networks.abstract(), batch, jax.eval_shape(lambda: jax.random.key(0)), networks.frozen.abstract()
    state, metrics = jax.eval_shape(lambda *a: TrainStep(networks)(*a, with_r1=True), *args)
    assert jax.tree.structure(state) == jax.tree.structure(args[0])
    assert not {"loss/clip", "loss/d_match"} & metrics.keys()


def test_the_line_says_what_is_off():
    assert load(("laion", ""), "--config.condition=none")[1] == [
        "condition='none': neither captions nor classes are read; off: the text encoder (clip) and cross-attention; "
        "the matching-aware loss; the contrastive loss of CLIP; the projection head (in its place: a head without a condition)"
    ]
    (line,) = load(("imagenet", ""), "--config.condition=none")[1]
    assert line.endswith("off: the class embedding; the projection head (in its place: a head without a condition)")
    (line,) = load(("digits", ""), "--config.condition=none")[1]
    assert line.endswith("the evaluators digits")
    # Nothing is off that was never on.
    assert load(("photos", ""))[1] == []


def test_a_head_without_a_condition_is_no_wider_than_the_network():
    assert load(("digits", ""), "--config.condition=none")[0].discriminator.head_width == 48
    assert load(("imagenet", ""), "--config.condition=none")[0].discriminator.head_width == 256
