"""The losses against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from configs import digits, imagenet, laion
from gigagan_jax.config import from_dict
from gigagan_jax.models.discriminator import prediction_pairs
from gigagan_jax.training import losses

RNG = np.random.default_rng(0)
# From the mild to what float32 can only hold when no exponential is taken of it.
LOGITS = np.concatenate([RNG.normal(0, 3, 40), [0.0, 1e4, -1e4, 88.0, -104.0, 1e30, -1e30]]).astype(np.float32)
OWN = np.float32(0.7)


def softplus(x):
    return np.logaddexp(0.0, np.asarray(x, np.float64))


def sigmoid(x):
    return np.exp(-softplus(-np.asarray(x, np.float64)))


FORMULAS = {
    "gan_d": (losses.gan_d, lambda fake, real: softplus(fake) + softplus(-real)),
    "gan_g": (losses.gan_g, lambda fake: softplus(-fake)),
    "match_d": (losses.match_d, lambda fake, real: softplus(real) + softplus(fake)),
    "min_max": (losses.MATCH_G["min_max"], lambda fake: -softplus(fake)),
    "non_saturating": (losses.MATCH_G["non_saturating"], lambda fake: softplus(-fake)),
    "cooperating": (losses.MATCH_G["cooperating"], lambda fake: softplus(fake)),
    # Real images come second in all of these; the own logit of a relativistic matching term is the third.
    "relativistic_d": (losses.relativistic_d, lambda fake, real: softplus(fake - real)),
    "match_d_relativistic": (
        lambda fake, real: losses.match_d_relativistic(fake, real, jnp.asarray(OWN)),
        lambda fake, real: softplus(real - OWN) + softplus(fake),
    ),
    "smoothed_d": (
        lambda fake, real: losses.smoothed_d(fake, real, 0.1),
        lambda fake, real: softplus(fake) + 0.9 * softplus(-real) + 0.1 * softplus(real),
    ),
}
SLOPES = {
    "gan_d": (lambda fake, real: sigmoid(fake), lambda fake, real: -sigmoid(-real)),
    "gan_g": (lambda fake: -sigmoid(-fake),),
    "match_d": (lambda fake, real: sigmoid(fake), lambda fake, real: sigmoid(real)),
    "min_max": (lambda fake: -sigmoid(fake),),
    "non_saturating": (lambda fake: -sigmoid(-fake),),
    "cooperating": (sigmoid,),
    "relativistic_d": (lambda fake, real: sigmoid(fake - real), lambda fake, real: -sigmoid(fake - real)),
    "match_d_relativistic": (lambda fake, real: sigmoid(fake), lambda fake, real: sigmoid(real - OWN)),
    "smoothed_d": (lambda fake, real: sigmoid(fake), lambda fake, real: sigmoid(real) - 0.9),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_is_its_formula_at_any_logit(name):
    loss, formula = FORMULAS[name]
    values = [LOGITS, LOGITS[::-1].copy()][: len(SLOPES[name])]
    out = loss(*map(jnp.asarray, values))
    assert out.shape == LOGITS.shape
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, formula(*values), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SLOPES)
def test_gradient_is_its_formula_at_any_logit(name):
    values = [LOGITS, LOGITS[::-1].copy()][: len(SLOPES[name])]
    grads = jax.grad(lambda *v: FORMULAS[name][0](*v).sum(), argnums=tuple(range(len(values))))(*values)
    for grad, slope in zip(grads, SLOPES[name], strict=True):
        assert np.isfinite(grad).all()
        np.testing.assert_allclose(grad, slope(*values), rtol=1e-5, atol=1e-7)


def test_who_wants_what():
    """D raises the logit of real images with their own caption only; G raises that of its images."""
    high, low = jnp.asarray(3.0), jnp.asarray(-3.0)
    assert losses.gan_d(low, high) < losses.gan_d(high, low)
    assert losses.match_d(low, low) < min(losses.match_d(low, high), losses.match_d(high, low))
    assert losses.gan_g(high) < losses.gan_g(low)
    # The forms of G's matching term differ in who wants what.
    assert losses.MATCH_G["min_max"](high) < losses.MATCH_G["min_max"](low)
    assert losses.MATCH_G["non_saturating"](high) < losses.MATCH_G["non_saturating"](low)
    assert losses.MATCH_G["cooperating"](low) < losses.MATCH_G["cooperating"](high)
    assert losses.relativistic_d(low, high) < losses.relativistic_d(high, low)
    assert losses.centring(high, low) == 0 < losses.centring(high, high)


def test_the_pull_of_min_max_matching_ends_where_d_is_sure():
    """Where D knows that a caption is wrong, a non-saturating term pulls at full weight and the min-max one not at all."""
    pull = lambda form: abs(float(jax.grad(losses.MATCH_G[form])(jnp.asarray(-8.0))))
    assert pull("min_max") < 1e-3
    assert pull("non_saturating") > 0.99


# ---------------------------------------------------------------- weights


def test_contrastive_matching_is_the_cross_entropy_over_the_captions_of_a_group():
    own = RNG.normal(0, 3, (5, 4)).astype(np.float32)
    others = RNG.normal(0, 3, (5, 6, 4)).astype(np.float32)
    valid = RNG.random((5, 6)) < 0.6
    valid[4] = False
    found = jax.jit(losses.match_contrastive)(own, others, valid)
    others[~valid] = -np.inf
    # Classes are the captions, of which the own one is number 0.
    logits = np.moveaxis(np.concatenate([own[:, None], others], axis=1), 1, -1)
    expected = -scipy.special.log_softmax(logits, axis=-1)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[4], 0.0)


def test_contrastive_matching_has_finite_gradients_at_any_logit():
    count = len(LOGITS)
    others = jnp.asarray(np.stack([np.roll(LOGITS, k) for k in range(1, 4)], axis=1))[:, :, None]
    valid = np.ones((count, 3), bool)
    valid[::5] = False
    total = lambda own, others: losses.match_contrastive(own, others, valid).mean()
    for gradient in jax.grad(total, argnums=(0, 1))(jnp.asarray(LOGITS)[:, None], others):
        assert np.isfinite(gradient).all()
        assert not np.any(gradient[::5])


def test_pair_weights_of_the_default_config():
    config = from_dict(laion.get_config())
    gan, match = losses.pair_weights(config)
    at = prediction_pairs(config.discriminator)
    assert len(gan) == len(match) == len(at) == len(set(at)) == 15
    for pair, w_gan, w_match in zip(at, gan, match, strict=True):
        level = (2 if pair.level == 0 else 1) / 6
        assert w_gan == pytest.approx(level * (1 if pair.exit == 4 else 0.01)), pair
        assert w_match == pytest.approx(level * (1 if pair.exit == 4 else 0.05)), pair
    last = [w for pair, w in zip(at, gan, strict=True) if pair.exit == 4]
    assert last == pytest.approx([2 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6])


def test_pair_weights_take_the_configured_levels():
    config = from_dict(digits.get_config())
    assert config.loss.level_weights == (1.0, 0.5, 0.25)
    gan, _ = losses.pair_weights(config)
    expected = {(0, 0): 0.01, (0, 1): 0.01, (1, 1): 0.005, (0, 2): 1.0, (1, 2): 0.5, (2, 2): 0.25}
    assert dict(zip(prediction_pairs(config.discriminator), gan, strict=True)) == pytest.approx(expected)


def test_one_scale_has_weight_one():
    gan, match = losses.pair_weights(from_dict(imagenet.get_config()))
    assert gan == match == (1.0,)


# ---------------------------------------------------------------- sums over pairs


def test_over_pairs_is_a_weighted_sum_of_means():
    shapes, weights = [(6, 1), (6, 16), (6, 64)], (0.5, 2.0, 0.01)
    fakes, reals = ([RNG.normal(size=s).astype(np.float32) for s in shapes] for _ in range(2))
    out = losses.over_pairs(losses.gan_d, weights, fakes, reals)
    expected = sum(w * (softplus(f) + softplus(-r)).mean() for w, f, r in zip(weights, fakes, reals, strict=True))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_over_pairs_leaves_out_examples_that_are_not_valid():
    shapes, weights = [(5, 4), (5, 1)], (1.0, 3.0)
    logits = [RNG.normal(size=s).astype(np.float32) for s in shapes]
    valid = np.array([True, False, True, True, False])
    out = losses.over_pairs(losses.gan_g, weights, logits, valid=jnp.asarray(valid))
    # Each example weighs 1 / N, valid or not: a batch of few captions does not shout.
    expected = sum(w * (softplus(-x).mean(-1) * valid).sum() / len(valid) for w, x in zip(weights, logits, strict=True))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    grads = jax.grad(lambda x: losses.over_pairs(losses.gan_g, weights, x, valid=jnp.asarray(valid)))(logits)
    for g in grads:
        assert (np.abs(g).max(-1) > 0).tolist() == valid.tolist()


def test_over_pairs_with_nothing_valid_is_zero_even_at_extreme_logits():
    logits = [np.full((3, 2), -1e30, np.float32)]
    loss = lambda x: losses.over_pairs(losses.gan_g, (1.0,), x, valid=jnp.zeros(3, bool))
    value, grads = jax.value_and_grad(loss)(logits)
    assert value == 0
    np.testing.assert_array_equal(grads[0], 0)


def test_over_pairs_wants_one_weight_a_pair():
    with pytest.raises(ValueError, match="shorter"):
        losses.over_pairs(losses.gan_g, (1.0, 1.0), [jnp.zeros((2, 1))])
