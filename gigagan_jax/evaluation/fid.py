"""The Frechet distance between two Gaussians fitted to features; with Inception's features it is the FID."""

from __future__ import annotations

import numpy as np

from gigagan_jax.core.errors import UserError


def gaussian_moments(features: np.ndarray, min_samples: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean `[D]` and the unbiased covariance `[D, D]` of features `[N, D]`, in float64.

    Args:
      features: `[N, D]`, any real dtype.
      min_samples: minimum number of rows; at least 2, since one sample has no covariance.

    Raises:
      ValueError: features are not two-dimensional, or not finite.
      UserError: fewer than `min_samples` rows.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"features must be [N, D] with D > 0, got shape {features.shape}")
    needed = max(2, min_samples)
    if len(features) < needed:
        raise UserError(
            f"a Frechet distance needs at least {needed} images, got {len(features)}: raise the number of images"
        )
    # float64: sums over tens of thousands of float32 rows lose the digits that small distances need.
    features = features.astype(np.float64)
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise ValueError(f"{bad} of {len(features)} feature rows hold NaN or infinity")
    mean = features.mean(axis=0)
    # Centred first: E[x x'] - mean mean' cancels where the mean is large.
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """Returns |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), the squared distance (Heusel et al., 2017).

    Args:
      mu1, mu2: means `[D]`.
      cov1, cov2: symmetric covariances `[D, D]`.

    Raises:
      ValueError: the shapes do not fit together, a value is not finite, or a covariance is not symmetric positive
        semidefinite (to within rounding).
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mu1, cov1, mu2, cov2))
    d = mu1.size
    if mu1.shape != (d,) or mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        raise ValueError(
            "frechet_distance takes means [D] and covariances [D, D] of one dimension D, "
            f"got {mu1.shape}, {cov1.shape} and {mu2.shape}, {cov2.shape}"
        )
    if not all(np.isfinite(a).all() for a in (mu1, cov1, mu2, cov2)):
        raise ValueError("frechet_distance: a mean or covariance holds NaN or infinity")
    # The trace of the root is the sum of the roots of the eigenvalues of sqrt(cov1) cov2 sqrt(cov1). That matrix is
    # symmetric: unlike a general root of cov1 cov2 it never turns complex, and a singular covariance is no problem.
    root1 = _psd_sqrt(cov1, "cov1")
    # For its checks only.
    _psd_sqrt(cov2, "cov2")
    product = root1 @ cov2 @ root1
    # eigvalsh reads one triangle: rounding must not make the result depend on which.
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    # Rounding can leave the eigenvalues of a singular matrix just below zero.
    trace_root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * trace_root
    # Rounding can leave the distance of equal Gaussians just below zero.
    return max(0.0, float(distance))


def _psd_sqrt(cov: np.ndarray, name: str) -> np.ndarray:
    """Returns the symmetric square root `[D, D]` of a positive semidefinite matrix `[D, D]`."""
    # A zero matrix has no scale; tiny keeps the comparisons below valid.
    scale = max(float(np.abs(cov).max()), np.finfo(np.float64).tiny)
    # The tolerances allow for statistics that were computed in float32.
    if np.abs(cov - cov.T).max() > 1e-5 * scale:
        raise ValueError(f"{name} is not symmetric, so it is no covariance")
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -1e-4 * scale * len(cov) ** 0.5:
        raise ValueError(f"{name} has the negative eigenvalue {values[0]:.3g}, so it is no covariance")
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
