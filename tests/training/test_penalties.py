"""The penalties on D's gradient: their means over draws, and that no exit can pay for another."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.models.discriminator import Logits, prediction_pairs
from gigagan_jax.parallel import sharding
from gigagan_jax.training import losses, penalties
from gigagan_jax.training.objectives import GanObjective, real_levels
from gigagan_jax.training.state import Networks

RNG = np.random.default_rng(0)
N = 3


def objective_of(config, **fields):
    """An objective whose D has two levels, so the predictions (level 0, exit 0), (0, 1) and (1, 1)."""
    disc = dataclasses.replace(config.discriminator, minibatch_std=0)
    loss = dataclasses.replace(config.loss, level_weights=(1.0, 0.5), **fields)
    return GanObjective(Networks(dataclasses.replace(config, discriminator=disc, loss=loss)))


def linear_critic(last, middle, low):
    """A D of three linear predictions: an array [r, r, 3] for each."""

    def say(images, own, wrong=None):
        dot = lambda x, a: jnp.einsum("nhwc,hwc->n", x, a)[:, None]
        return {
            source: Logits([dot(x[0], middle), dot(x[0], last), dot(x[1], low)], []) for source, x in images.items()
        }

    return say


@pytest.fixture(scope="module")
def two_levels():
    """configs/digits.py:tiny: 8 px."""
    return from_dict(digits.get_config("tiny"))


@pytest.fixture(scope="module")
def reals(two_levels):
    return [RNG.normal(size=(N, r, r, 3)).astype(np.float32) for r in two_levels.resolutions[::-1]]


def square(a):
    return float(np.square(np.asarray(a, np.float64)).sum())


# ---------------------------------------------------------------- gradients


def test_squared_gradients_of_a_linear_critic_are_its_weights(reals):
    a = [RNG.normal(size=x.shape[1:]).astype(np.float32) for x in reals]
    out = penalties.squared_gradients(lambda xs: sum((x * w).sum() for x, w in zip(xs, a, strict=True)), reals)
    for squares, w in zip(out, a, strict=True):
        np.testing.assert_allclose(squares, [square(w)] * N, rtol=1e-6)


def test_squared_gradients_of_a_quadratic_critic(reals):
    c = np.array([0.5, -2.0, 3.0], np.float32)  # one factor an image
    out = penalties.squared_gradients(lambda x: 0.5 * (c[:, None, None, None] * x**2).sum(), reals[0])
    expected = c.astype(np.float64) ** 2 * (reals[0].astype(np.float64) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_squared_gradients_do_not_ask_for_the_level_of_the_logit(reals):
    critic = lambda shift: lambda x: jnp.sin(x).sum() + shift
    same = [penalties.squared_gradients(critic(shift), reals[0]) for shift in (0.0, 1e4)]
    np.testing.assert_array_equal(*same)


def test_gradient_of_squared_gradients_reaches_the_weights(reals):
    """d/da |a|^2 = 2 a: the second derivative that the step takes."""
    a = RNG.normal(size=reals[0].shape[1:]).astype(np.float32)
    grad = jax.grad(lambda w: penalties.squared_gradients(lambda x: (x * w).sum(), reals[0]).mean())(a)
    np.testing.assert_allclose(grad, 2 * a, rtol=1e-6)


# ---------------------------------------------------------------- signs


def test_signs_are_even_and_independent():
    signs = np.asarray(penalties.draw_signs(jax.random.key(0), 4096, 3))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    # Standard deviations of a mean of 4096 signs are 1/64: five of them.
    assert np.abs(np.cov(signs.T, bias=True) - np.eye(3)).max() < 5 / 64
    assert np.abs(signs.mean(0)).max() < 5 / 64


@pytest.mark.parametrize("form", ["gradient", "finite_differences"])
def test_mean_over_signs_is_the_sum_of_the_exits_own_penalties(two_levels, monkeypatch, form):
    """With D itself, over all patterns of signs: exactly, without a statistical error."""
    objective = objective_of(two_levels, r1_form=form, intermediate_gan=0.3)
    c = objective.config
    module = objective.networks.d
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    disc = module.bind(module.init(0, module.shardings(mesh, c.rules)))
    batch = {
        "image": RNG.integers(0, 256, (N, c.resolution, c.resolution, 3)).astype(np.uint8),
        "tokens": RNG.integers(3, 200, (N, c.text.length)).astype(np.int32),
        "label": np.full(N, -1, np.int32),
    }
    batch["tokens"][:, -1] = 2
    images = real_levels(batch, c)
    own = disc.condition(batch["tokens"], batch["label"])
    pairs = prediction_pairs(c.discriminator)
    assert len(pairs) == 3

    @jax.jit
    def penalty(signs):
        monkeypatch.setattr(penalties, "draw_signs", lambda key, n, exits: signs)
        return objective.penalties(disc, {"real": images}, own, jax.random.key(1))["real"]

    patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=3)), np.float32)
    # The same noise for all patterns: of finite differences the mean over signs is exact too.
    mean = np.mean([float(penalty(np.tile(p, (N, 1)))) for p in patterns])
    weights = [1.0 if losses.is_last_exit(c, pair) else 0.3 for pair in pairs]
    levels = losses.level_weights(c)
    alone = sum(
        float(penalty(np.tile(np.eye(3, dtype=np.float32)[k], (N, 1)))) for k in range(3)
    )  # a sign of zero takes an exit out
    np.testing.assert_allclose(mean, alone, rtol=1e-5)
    if form == "gradient":
        expected = 0.0
        for k, pair in enumerate(pairs):
            of_exit = lambda x, k=k: disc({"real": x}, own)["real"].own[k].mean(-1).sum()
            squares = penalties.squared_gradients(of_exit, images)[pair.level]
            expected += levels[pair.level] * weights[k] ** 2 * float(squares.mean())
        np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["gradient", "finite_differences"])
@pytest.mark.parametrize("exits", ["signs", "sum"])
def test_an_exit_trained_to_cancel_the_last_cannot_pay_for_it(two_levels, reals, exits, form):
    """The intermediate exit is trained against the penalty from a hundredfold opposite of the last one.

    At weight 0.01 it cancels the last one in a weighted sum without signs. The plain sum is cancelled at any scale.
    """
    objective = objective_of(two_levels, r1_exits=exits, r1_form=form, intermediate_gan=0.01)
    last, low = (RNG.normal(size=x.shape[1:]).astype(np.float32) for x in reals)
    scale = -100.0 if exits == "signs" else -1.2

    @jax.jit
    def mean_penalty(middle, key):
        critic = linear_critic(last, middle, 0.0 * low)
        each = lambda k: objective.penalties(critic, {"real": reals}, None, k)["real"]
        return jax.vmap(each)(jax.random.split(key, 256)).mean()

    def train(middle):
        # Its gradient is linear in the weights: steps of the inverse curvature reach the minimum.
        curvature = 1e-4 if exits == "signs" else 1.0
        for step in range(20):
            grad = jax.jit(jax.grad(mean_penalty))(middle, jax.random.key(step))
            middle = middle - 0.3 * grad / (2 * curvature)
        return middle

    middle = train(scale * last)
    penalty = float(mean_penalty(middle, jax.random.key(99)))
    if exits == "signs":
        # Finite differences have a standard error of sqrt(2 / (256 * 3)) over the draws of noise.
        assert penalty >= (0.98 if form == "gradient" else 0.8) * square(last)
        first = float(mean_penalty(-100.0 * last, jax.random.key(99)))
        assert first >= (1.9 if form == "gradient" else 1.6) * square(last)
    else:
        assert penalty < 0.05 * square(last)


def test_levels_weigh_as_in_the_loss(two_levels, reals):
    objective = objective_of(two_levels)
    last, low = (RNG.normal(size=x.shape[1:]).astype(np.float32) for x in reals)
    critic = linear_critic(last, 0.0 * last, low)
    out = objective.penalties(critic, {"real": reals}, None, jax.random.key(0))["real"]
    assert float(out) == pytest.approx(square(last) + 0.5 * square(low), rel=1e-5)
    full = objective_of(two_levels, r1_levels="full")
    out = full.penalties(critic, {"real": reals}, None, jax.random.key(0))["real"]
    assert float(out) == pytest.approx(square(last), rel=1e-5)


def test_generated_images_have_a_penalty_of_their_own(two_levels, reals):
    """R2 is R1 by other images, and each source has its own signs."""
    objective = objective_of(two_levels)
    images = {"real": reals, "fake": [2.0 * x for x in reals]}

    def critic(images, own, wrong=None):
        energy = lambda x: (0.5 * jnp.square(x)).sum((1, 2, 3))[:, None]
        return {k: Logits([0 * energy(x[0]), energy(x[0]), 0 * energy(x[1])], []) for k, x in images.items()}

    out = objective.penalties(critic, images, None, jax.random.key(0))
    assert float(out["real"]) == pytest.approx(square(reals[0]) / N, rel=1e-5)
    assert float(out["fake"]) == pytest.approx(4 * square(reals[0]) / N, rel=1e-5)


# ---------------------------------------------------------------- measures


def test_measured_exits_of_a_linear_critic(two_levels, reals, monkeypatch):
    objective = objective_of(two_levels)
    last, low = (RNG.normal(size=x.shape[1:]).astype(np.float32) for x in reals)
    noise = RNG.normal(size=last.shape).astype(np.float32)
    middle = noise - 3 * last
    monkeypatch.setattr(objective.networks.d, "bind", lambda params: linear_critic(last, middle, low))
    out = objective.measure_exits({}, reals, None)
    assert float(out["r1/last_exit"]) == pytest.approx(square(last) + 0.5 * square(low), rel=1e-5)
    cosine = float((last * middle).sum()) / np.sqrt(square(last) * square(middle))
    assert float(out[f"r1/cosine/{two_levels.resolution}"]) == pytest.approx(cosine, rel=1e-4)
    # The lowest level has one exit, which has no other to pay for it.
    assert set(out) == {"r1/last_exit", f"r1/cosine/{two_levels.resolution}"}


@pytest.mark.parametrize("fields", [{"r1_exits": "sum"}, {"r1_levels": "full"}])
def test_last_exits_own_penalty_is_on_the_scale_of_r1(two_levels, reals, monkeypatch, fields):
    """Where the other exits say nothing both are one number, whatever the levels and their weights are."""
    objective = objective_of(two_levels, **fields)
    last, low = (RNG.normal(size=x.shape[1:]).astype(np.float32) for x in reals)
    critic = linear_critic(last, 0 * last, low)
    monkeypatch.setattr(objective.networks.d, "bind", lambda params: critic)
    own = float(objective.measure_exits({}, reals, None)["r1/last_exit"])
    paid = float(objective.penalties(critic, {"real": reals}, None, jax.random.key(0))["real"])
    assert own == pytest.approx(paid, rel=1e-5)
    assert own == pytest.approx(square(last) + (square(low) if "r1_exits" in fields else 0.0), rel=1e-5)


def test_cosine_of_nothing_is_zero():
    assert float(penalties.cosine(jnp.zeros(3), jnp.ones(3))) == 0.0


def test_r1_of_the_vision_aided_discriminator_is_by_its_features(two_levels, reals, monkeypatch):
    objective = objective_of(two_levels)
    layers = len(objective.weights_vision)
    features = [RNG.normal(size=(N, 2, 2, 4)).astype(np.float32) for _ in range(layers)]
    a = [RNG.normal(size=x.shape[1:]).astype(np.float32) for x in features]
    # Four predictions a layer: R1 is of their mean.
    heads = lambda xs, t: [
        jnp.einsum("nhwc,hwc->n", x, w)[:, None] * jnp.ones((1, 4)) for x, w in zip(xs, a, strict=True)
    ]
    monkeypatch.setattr(objective, "vision_inputs", lambda *args: (heads, None, features))
    out = objective.vision_r1({}, {}, reals[0], {}, jax.random.key(0))
    assert float(out) == pytest.approx(np.mean([square(w) for w in a]), rel=1e-5)
