import numpy as np
import pytest
import scipy.linalg

from gigagan_jax.core.errors import UserError
from gigagan_jax.evaluation.fid import frechet_distance, gaussian_moments


def random_cov(seed, d, rank=None):
    a = np.random.default_rng(seed).normal(size=(d, rank or d))
    return a @ a.T / (rank or d)


def test_one_dimension_closed_form():
    # (mu1 - mu2)^2 + (sigma1 - sigma2)^2
    assert frechet_distance([1.0], [[4.0]], [4.0], [[25.0]]) == pytest.approx(9 + 9, rel=1e-12)


def test_diagonal_closed_form():
    s1, s2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.0, 5.0])
    mu1, mu2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    got = frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2))
    assert got == pytest.approx(5 + ((s1 - s2) ** 2).sum(), rel=1e-12)


def test_equal_gaussians_are_at_zero_and_only_the_mean_moves_them():
    cov = random_cov(0, 32)
    mu = np.arange(32.0)
    assert frechet_distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(mu, cov, mu + 2, cov) == pytest.approx(4 * 32, rel=1e-10)


def test_scaling_both_by_s_scales_by_s_squared_and_order_does_not_matter():
    c1, c2 = random_cov(1, 20), random_cov(2, 20)
    mu1, mu2 = np.zeros(20), np.linspace(0, 1, 20)
    d = frechet_distance(mu1, c1, mu2, c2)
    assert frechet_distance(3 * mu1, 9 * c1, 3 * mu2, 9 * c2) == pytest.approx(9 * d, rel=1e-10)
    assert frechet_distance(mu2, c2, mu1, c1) == pytest.approx(d, rel=1e-10)


@pytest.mark.parametrize("d", [2, 17, 64])
def test_agrees_with_sqrtm(d):
    c1, c2 = random_cov(3, d), random_cov(4, d)
    mu1, mu2 = np.random.default_rng(5).normal(size=(2, d))
    root = scipy.linalg.sqrtm(c1 @ c2)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(c1 + c2) - 2 * np.trace(root).real
    assert frechet_distance(mu1, c1, mu2, c2) == pytest.approx(expected, rel=1e-7)


def test_singular_covariances_on_disjoint_subspaces():
    # The product is nilpotent or zero: the roots vanish, and what is left is the sum of both traces.
    q, _ = np.linalg.qr(np.random.default_rng(6).normal(size=(24, 24)))
    c1, c2 = q[:, :8] @ q[:, :8].T, 2 * q[:, 8:12] @ q[:, 8:12].T
    assert frechet_distance(np.zeros(24), c1, np.zeros(24), c2) == pytest.approx(8 + 8, rel=1e-6)
    # and a singular covariance is at zero from itself
    assert frechet_distance(np.zeros(24), c1, np.zeros(24), c1) == pytest.approx(0, abs=1e-6)


def test_float32_statistics_are_accepted():
    x = np.random.default_rng(7).normal(size=(50, 64)).astype(np.float32)  # fewer samples than dimensions
    mu, cov = x.mean(0), np.cov(x, rowvar=False).astype(np.float32)
    assert frechet_distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-3)


def test_moments_are_those_of_numpy_and_reach_float64():
    x = np.random.default_rng(8).normal(loc=100, size=(40, 5)).astype(np.float32)
    mu, cov = gaussian_moments(x)
    assert mu.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_wrong_dimensions_are_named():
    eye3, eye4 = np.eye(3), np.eye(4)
    with pytest.raises(ValueError, match=r"one dimension D, got \(3,\), \(3, 3\) and \(4,\), \(4, 4\)"):
        frechet_distance(np.zeros(3), eye3, np.zeros(4), eye4)
    with pytest.raises(ValueError, match="one dimension D"):
        frechet_distance(np.zeros(3), eye4, np.zeros(3), eye3)
    with pytest.raises(ValueError, match="one dimension D"):
        frechet_distance(np.zeros((3, 1)), eye3, np.zeros((3, 1)), eye3)
    with pytest.raises(ValueError, match=r"features must be \[N, D\]"):
        gaussian_moments(np.zeros((4, 2, 2)))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples(n):
    with pytest.raises(UserError, match=f"at least 2 images, got {n}"):
        gaussian_moments(np.zeros((n, 3)))


def test_a_higher_minimum_can_be_asked_for():
    with pytest.raises(UserError, match="at least 10 images, got 9"):
        gaussian_moments(np.zeros((9, 3)), min_samples=10)


def test_values_that_are_no_statistics_are_refused():
    eye = np.eye(2)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance([0, np.nan], eye, [0, 0], eye)
    with pytest.raises(ValueError, match="cov2 has the negative eigenvalue -1"):
        frechet_distance([0, 0], eye, [0, 0], np.diag([1.0, -1.0]))
    with pytest.raises(ValueError, match="cov1 is not symmetric"):
        frechet_distance([0, 0], [[1.0, 0.5], [0.0, 1.0]], [0, 0], eye)
    x = np.zeros((5, 2))
    x[3, 1] = np.inf
    with pytest.raises(ValueError, match="1 of 5 feature rows"):
        gaussian_moments(x)
