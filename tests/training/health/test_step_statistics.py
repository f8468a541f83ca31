"""What a step tells of its health: the measures against closed forms, and the vector that holds them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits import get_config
from gigagan_jax.config import from_dict
from gigagan_jax.models.layers.resample import upsample
from gigagan_jax.training.batch import abstract_batch
from gigagan_jax.training.health import step_statistics
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep


def tiny():
    return from_dict(get_config("tiny"))


@pytest.fixture(scope="module")
def networks():
    return Networks(tiny())


# ---------------------------------------------------------------- measures


def measures_of_d(config, real, fake, real_logit, fake_logit):
    n = len(real)
    exits = [np.full((n, 1), x, np.float32) for x in (0.0, 1.0, 2.0)]
    real_logits = [real_logit + 0 * x for x in exits]
    fake_logits = [fake_logit + 0 * x for x in exits]
    return step_statistics.measure_discriminator(config, real, fake, real_logits, fake_logits)[0]


def test_measures_of_the_discriminators_half():
    config, rng = tiny(), np.random.default_rng(0)
    real = rng.normal(size=(64, 8, 8, 3)).astype(np.float32)
    sure = measures_of_d(config, real, 0.5 * real, 20.0, -20.0)
    assert sure["health/d_gap"] == pytest.approx(1, abs=1e-6)
    assert sure["health/d_right_real"] == sure["health/d_right_fake"] == 1
    assert sure["health/diversity"] == pytest.approx(0.5, rel=1e-5)
    assert sure["health/exit/8"] == pytest.approx(20)
    lost = measures_of_d(config, real, np.broadcast_to(real[:1], real.shape), -1.0, -1.0)
    assert lost["health/d_gap"] == 0
    assert (lost["health/d_right_real"], lost["health/d_right_fake"]) == (0, 1)
    assert lost["health/diversity"] == pytest.approx(0, abs=1e-6)
    assert lost["health/diversity_low"] == pytest.approx(0, abs=1e-6)
    assert lost["health/exit/4"] == lost["health/exit/8"] == 0


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.mark.parametrize("pairing", ["separate", "relativistic"])
def test_what_d_tells_apart_at_each_level(pairing):
    """At the last exit, each level by its own logits, whatever the exit before says."""
    config, rng = tiny(), np.random.default_rng(0)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, pairing=pairing))
    images = rng.normal(size=(6, 8, 8, 3)).astype(np.float32)
    # Predictions (level 0, exit 0), (0, 1) and (1, 1).
    real, fake = (list(rng.normal(scale=2, size=(3, 6, 4)).astype(np.float32)) for _ in range(2))
    measures, _ = step_statistics.measure_discriminator(config, images, images, real, fake)
    if pairing == "separate":
        gaps = [sigmoid(r).mean() - sigmoid(f).mean() for r, f in zip(real, fake, strict=True)]
    else:
        # D's certainty about the difference, 0.5 to 1, as the range 0 to 1.
        gaps = [(2 * sigmoid(r - np.float64(f)) - 1).mean() for r, f in zip(real, fake, strict=True)]
    assert float(measures["health/d_gap"]) == pytest.approx(gaps[1], abs=1e-6)
    assert float(measures["health/d_gap/4"]) == pytest.approx(gaps[2], abs=1e-6)
    assert "health/d_gap/8" not in measures


def test_gap_over_the_layers_of_v():
    """Each layer counts alike, whatever the size of its map."""
    rng = np.random.default_rng(0)
    real, fake = ([rng.normal(size=(5, n)).astype(np.float32) for n in (16, 4, 1)] for _ in range(2))
    gaps = [sigmoid(r).mean() - sigmoid(f).mean() for r, f in zip(real, fake, strict=True)]
    assert float(step_statistics.measure_gap(real, fake)) == pytest.approx(np.mean(gaps), abs=1e-6)


def test_share_of_each_level():
    config, rng = tiny(), np.random.default_rng(0)
    low = rng.normal(size=(4, 4, 4, 3)).astype(np.float32)
    idle, _ = step_statistics.measure_generator(config, [jnp.asarray(low), upsample(jnp.asarray(low))])
    assert idle["health/level/4"] == pytest.approx(1)
    assert idle["health/level/8"] == pytest.approx(0, abs=1e-6)
    only, _ = step_statistics.measure_generator(
        config, [jnp.zeros((4, 4, 4, 3)), jnp.asarray(rng.normal(size=(4, 8, 8, 3)))]
    )
    assert only["health/level/4"] == 0
    assert only["health/level/8"] == pytest.approx(1)


def test_deviation_within_captions():
    """Images by the caption alone have none; images by z alone have as much as there is over all captions."""
    rng = np.random.default_rng(0)
    by_caption = rng.normal(size=(500, 8, 8, 3)).astype(np.float32)
    spread = jnp.std(by_caption, axis=0).mean()
    assert step_statistics.diversity_within_captions(by_caption, by_caption, spread) == 0
    other = rng.normal(size=by_caption.shape).astype(np.float32)
    assert step_statistics.diversity_within_captions(by_caption, other, spread) == pytest.approx(1, rel=0.01)


def test_sizes_of_an_update():
    params, updates = {"a": np.full((3, 4), 2.0), "b": np.full(4, 2.0)}, {"a": np.full((3, 4), 0.5), "b": np.zeros(4)}
    relative, rms = step_statistics.update_sizes(updates, params, 0.1)
    assert relative == pytest.approx(0.1 * math.sqrt(12 * 0.25) / math.sqrt(16 * 4))
    assert rms == pytest.approx(math.sqrt(12 * 0.25 / 16))


def test_bad_rows():
    features = np.zeros((6, 3, 2), np.float32)
    batch = {"image": np.zeros((6, 8, 8, 3), np.uint8), "features": features}
    clean = step_statistics.count_bad_rows(batch)
    assert (clean["bad/features"], clean["first/features"], bool(step_statistics.any_bad(clean))) == (0, -1, False)
    features[2, 1, 0], features[4, 0, 1] = np.inf, np.nan
    rows = step_statistics.count_bad_rows(batch)
    assert (rows["bad/features"], rows["first/features"]) == (2, 2)
    assert (rows["bad/image"], rows["first/image"], rows["bad/clip_text"]) == (0, -1, 0)
    assert step_statistics.any_bad(rows)


# ---------------------------------------------------------------- the vector


def test_every_parameter_belongs_to_a_module_that_is_watched(networks):
    p = step_statistics.HealthVector(networks)
    assert len(set(p.names)) == len(p.names)
    assert "generator/levels/1/to_rgb" in p.modules["g"]
    assert {
        "discriminator/levels/0/down",
        "discriminator/levels/1/head",
        "discriminator/conditioner/transformer",
    } <= set(p.modules["d"])


def test_names_of_the_vector(networks, clip_folder):
    """Entries of V are there where V is; the lowest level has one exit, and no cosine."""
    without = step_statistics.HealthVector(networks).names
    config = tiny()
    vision = dataclasses.replace(config.vision_aided, backbone="clip", path=str(clip_folder), layers=(1, 2))
    vision = dataclasses.replace(vision, text=dataclasses.replace(vision.text, width=16, depth=1, heads=2))
    loss = dataclasses.replace(config.loss, vision_aided=1.0)
    with_v = step_statistics.HealthVector(Networks(dataclasses.replace(config, vision_aided=vision, loss=loss)))
    added = {name for name in with_v.names if name not in without and name not in with_v.modules["v"]}
    assert added == {"health/v_gap", "health/update/v", "health/direction/v", "loss/r1_v"}
    assert {"health/d_gap", "health/d_gap/4", "loss/r1", "r1/last_exit", "r1/cosine/8"} <= set(without)
    assert not {"health/d_gap/8", "r1/cosine/4"} & set(without)


def test_gradient_norms_are_those_of_all_modules(networks):
    p, rng = step_statistics.HealthVector(networks), np.random.default_rng(0)
    values = dict(zip(p.names, rng.uniform(size=len(p.names)), strict=True))
    norms = p.read(list(values.values())).gradient_norms()
    assert set(norms) == {"g", "d"}
    for net, of in (("g", "generator/"), ("d", "discriminator/")):
        squares = [x for name, x in values.items() if name.startswith(of)]
        assert len(squares) > 5
        assert norms[net] == pytest.approx(np.sqrt(np.sum(squares)))


def test_a_step_in_parts_has_the_same_vector():
    """Two micro-batches: what is kept of each part comes together again."""
    config = dataclasses.replace(tiny(), micro_batches=2)
    nets = Networks(config)
    step = TrainStep(nets)
    key = jax.eval_shape(lambda: jax.random.key(0))
    run = lambda state, batch, key: step(state, batch, key, with_r1=False)
    _, metrics = jax.eval_shape(run, nets.abstract(), abstract_batch(config), key)
    assert metrics["health"].shape == (len(step.health_vector.names),)
    assert all(x.shape == () for k, x in metrics.items() if k != "health")
