"""Evaluates the digits model: whether an image shows the digit of its prompt, and how varied the images are.

The judge is an SVM fitted to scikit-learn's 8x8 digits. Real and generated images are processed alike: resized as for
training, then area-averaged to 8x8. The resizing itself therefore causes no difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.evaluation.fid import frechet_distance, gaussian_moments

# The targets below hold for this many images a digit: the Frechet distance of fewer images is larger.
IMAGES_PER_DIGIT = 60
MIN_ACCURACY = 0.98
MIN_DIGIT_ACCURACY = 0.92
MIN_VARIANCE_RATIO = 0.55
# Two halves of the real images are at about 10 from each other.
MAX_FRECHET = 30.0
# The SVM reaches 0.99 (to two places) on held-out real digits. A less accurate judge could not measure MIN_ACCURACY.
MIN_JUDGE_ACCURACY = 0.985

# Pixels of scikit-learn's digits.
_SIDE = 8
# Real images of the 1,797 on which the judge is tested.
_HELD_OUT = 500


@dataclasses.dataclass(frozen=True)
class DigitsReport:
    """The metrics of `DigitsJudge.judge_images`. Accuracies are fractions of 1."""

    # Fraction of the images that the judge classifies as the digit of their prompt.
    accuracy: float
    # [10], by the digit of the prompt.
    per_digit_accuracy: tuple[float, ...]
    # Pixel variance within a digit, generated over real; mean over the ten digits.
    variance_ratio: float
    # From generated to all real images, over 64 pixels in 0..16.
    frechet: float
    # Accuracy of the judge on held-out real digits.
    judge_accuracy: float
    # Number of images of the rarest digit.
    images_per_digit: int

    @property
    def worst_digit_accuracy(self) -> float:
        return min(self.per_digit_accuracy)

    @property
    def worst_digit(self) -> int:
        return self.per_digit_accuracy.index(self.worst_digit_accuracy)

    @property
    def passes(self) -> bool:
        """Whether every figure meets its target (the constants of this module)."""
        return all(met for *_, met in self._target_rows())

    def to_dict(self) -> dict[str, Any]:
        """Returns all metrics as JSON values."""
        return {
            "accuracy": self.accuracy,
            "per_digit_accuracy": list(self.per_digit_accuracy),
            "worst_digit_accuracy": self.worst_digit_accuracy,
            "variance_ratio": self.variance_ratio,
            "frechet": self.frechet,
            "judge_accuracy": self.judge_accuracy,
            "images_per_digit": self.images_per_digit,
            "passes": self.passes,
        }

    def format_table(self) -> str:
        """Formats the metrics with their targets as lines for a terminal, without a trailing newline."""
        lines = [f"{'figure':<36}{'value':>8}{'target':>12}"]
        for name, value, target, met in self._target_rows():
            lines.append(f"{name:<36}{value:>8}{target:>12}  {'ok' if met else 'MISSED'}")
        # No targets here: the line shows which digit fails.
        lines.append("accuracy by digit  " + "  ".join(f"{d}: {a:.2f}" for d, a in enumerate(self.per_digit_accuracy)))
        lines.append("every target is met" if self.passes else "not every target is met")
        return "\n".join(lines)

    def _target_rows(self) -> list[tuple[str, str, str, bool]]:
        """Returns (name, value, target, met) of each metric with a target; NaN meets no target."""
        worst = self.worst_digit_accuracy
        return [
            (
                "images that are the digit asked for",
                f"{self.accuracy:.3f}",
                f">= {MIN_ACCURACY:.3f}",
                self.accuracy >= MIN_ACCURACY,
            ),
            (
                f"  worst digit ({self.worst_digit})",
                f"{worst:.3f}",
                f">= {MIN_DIGIT_ACCURACY:.3f}",
                worst >= MIN_DIGIT_ACCURACY,
            ),
            (
                "variance within a digit, of real",
                f"{self.variance_ratio:.2f}",
                f">= {MIN_VARIANCE_RATIO:.2f}",
                self.variance_ratio >= MIN_VARIANCE_RATIO,
            ),
            (
                "Frechet distance, 8x8 pixels",
                f"{self.frechet:.1f}",
                f"<= {MAX_FRECHET:.1f}",
                self.frechet <= MAX_FRECHET,
            ),
            (
                "judge on held-out real digits",
                f"{self.judge_accuracy:.3f}",
                f">= {MIN_JUDGE_ACCURACY:.3f}",
                self.judge_accuracy >= MIN_JUDGE_ACCURACY,
            ),
            (
                "images a digit",
                f"{self.images_per_digit}",
                f">= {IMAGES_PER_DIGIT}",
                self.images_per_digit >= IMAGES_PER_DIGIT,
            ),
        ]


class DigitsJudge:
    """Fits an SVM to the real digits, which takes about a second; `judge_images` may be called many times.

    Args:
      resize: the resizing of the training pipeline, uint8 `[8, 8, 3]` to uint8 `[R, R, 3]`; R is a multiple of 8.

    Raises:
      ValueError: `resize` returns another shape or dtype.
    """

    def __init__(self, resize: Callable[[np.ndarray], np.ndarray]):
        # Imported here: scikit-learn takes a second to import, and most runs have no digits.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC

        digits = load_digits()
        # scikit-learn's pixels lie in 0..16; they are rounded half up to 0..255.
        gray = np.floor(digits.images * (255 / 16) + 0.5).astype(np.uint8)
        resized = np.stack([resize(np.repeat(image[..., None], 3, axis=-1)) for image in gray])
        self.resolution = resized.shape[1]
        real = self._to_gray_pixels(resized)
        labels = digits.target
        # A fixed split: the metrics of two runs must not differ by their judges.
        train_x, held_x, train_y, held_y = train_test_split(
            real, labels, test_size=_HELD_OUT, random_state=0, stratify=labels
        )
        # gamma is that of scikit-learn's own example for these digits, with pixels in 0..16.
        self._svm = SVC(gamma=0.001).fit(train_x, train_y)
        self.judge_accuracy = float(self._svm.score(held_x, held_y))
        self._moments = gaussian_moments(real)
        self._variance = np.array([_mean_variance(real[labels == digit]) for digit in range(10)])

    def judge_images(self, images: np.ndarray, digits: np.ndarray) -> DigitsReport:
        """Compares generated images with the digits of their prompts.

        Args:
          images: uint8 `[N, R, R, 3]`, R as in training.
          digits: integers `[N]` in 0..9; every digit at least twice, and
            `IMAGES_PER_DIGIT` times to pass.

        Raises:
          ValueError: a shape, a dtype or a digit is another.
          UserError: a digit has fewer than two images.
        """
        images, digits = np.asarray(images), np.asarray(digits)
        if digits.shape != (len(images),) or not np.issubdtype(digits.dtype, np.integer):
            raise ValueError(
                f"digits must be {len(images)} integers, one an image, got {digits.dtype} {list(digits.shape)}"
            )
        if len(digits) and not (digits.min() >= 0 and digits.max() <= 9):
            raise ValueError(f"digits must lie in 0..9, got {digits.min()}..{digits.max()}")
        counts = np.bincount(digits, minlength=10)
        # One image has no variance.
        if counts.min() < 2:
            raise UserError(
                f"the judge needs at least 2 images of every digit, got {counts.min()} of digit {counts.argmin()}: "
                f"generate more (the targets are for {IMAGES_PER_DIGIT} a digit)"
            )
        pixels = self._to_gray_pixels(images)
        correct = self._svm.predict(pixels) == digits
        # Within a digit: a model that draws one picture a digit has all accuracy and no variance.
        variance = np.array([_mean_variance(pixels[digits == digit]) for digit in range(10)])
        return DigitsReport(
            accuracy=float(correct.mean()),
            per_digit_accuracy=tuple(float(correct[digits == digit].mean()) for digit in range(10)),
            variance_ratio=float((variance / self._variance).mean()),
            frechet=frechet_distance(*gaussian_moments(pixels), *self._moments),
            judge_accuracy=self.judge_accuracy,
            images_per_digit=int(counts.min()),
        )

    def _to_gray_pixels(self, images: np.ndarray) -> np.ndarray:
        """Converts uint8 `[N, R, R, 3]` to gray `[N, 64]` in 0..16, area-averaged to 8x8."""
        r = self.resolution
        if images.dtype != np.uint8 or images.shape[1:] != (r, r, 3) or r % _SIDE:
            raise ValueError(
                f"digits are judged as uint8 [N, {r}, {r}, 3] with a side that is a multiple of {_SIDE}, "
                f"got {images.dtype} {list(images.shape)}"
            )
        # Whole cells: the average of an R x R image is exact.
        cell = r // _SIDE
        cells = images.reshape(len(images), _SIDE, cell, _SIDE, cell, 3).astype(np.float64)
        return cells.mean(axis=(2, 4, 5)).reshape(len(images), _SIDE * _SIDE) * (16 / 255)


def _mean_variance(pixels: np.ndarray) -> float:
    """Returns the unbiased variance over images `[N, 64]` of one digit, as the mean over pixels."""
    return float(pixels.var(axis=0, ddof=1).mean())
