"""The judge of the digits model: are they the digits that were asked for, and as varied as the real ones?

The judge is an SVM fitted to scikit-learn's 8x8 digits. Real images take the same way as generated ones: resized as for
training, then area-averaged back to 8x8, so that the resizing itself cannot make a difference between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.evaluation.fid import frechet_distance, gaussian_moments

IMAGES_PER_DIGIT = 60
MIN_ACCURACY = 0.98
MIN_DIGIT_ACCURACY = 0.92
MIN_VARIANCE_RATIO = 0.55
MAX_FRECHET = 30.0
# The judge itself: 0.99 on held-out real digits, to two places. Below that its verdict would mean little.
MIN_JUDGE_ACCURACY = 0.985

_SIDE = 8
_HELD_OUT = 500


@dataclasses.dataclass(frozen=True)
class DigitsReport:
    """What `DigitsJudge.judge` found. Accuracies are fractions of 1."""

    accuracy: float  # of all images, those that the judge reads as the digit of their prompt
    per_digit_accuracy: tuple[float, ...]  # ten, by the digit of the prompt
    variance_ratio: float  # pixel variance within a digit, generated over real, mean over the ten digits
    frechet: float  # in 64 pixels of 0..16, generated to all real images; real halves are at about 10
    judge_accuracy: float  # of the judge on held-out real digits
    images_per_digit: int  # of the digit with the fewest images

    @property
    def worst_digit_accuracy(self) -> float:
        return min(self.per_digit_accuracy)

    @property
    def worst_digit(self) -> int:
        return self.per_digit_accuracy.index(self.worst_digit_accuracy)

    @property
    def passes(self) -> bool:
        """Whether every figure meets its target (the constants of this module)."""
        return all(met for *_, met in self._rows())

    def to_dict(self) -> dict[str, Any]:
        """Every figure, as plain JSON values."""
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

    def table(self) -> str:
        """The figures beside their targets, as lines for a terminal (no trailing newline)."""
        lines = [f"{'figure':<36}{'value':>8}{'target':>12}"]
        for name, value, target, met in self._rows():
            lines.append(f"{name:<36}{value:>8}{target:>12}  {'ok' if met else 'MISSED'}")
        lines.append("accuracy by digit  " + "  ".join(f"{d}: {a:.2f}" for d, a in enumerate(self.per_digit_accuracy)))
        lines.append("every target is met" if self.passes else "not every target is met")
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, str, bool]]:
        """(name, value, target, met) of each figure that has a target; a NaN meets none."""
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
    """Fits the judge once (about a second); `judge` may be called many times.

    Args:
      resize: the resizing of the training pipeline, uint8 `[8, 8, 3]` to uint8 `[R, R, 3]`; R a multiple of 8.

    Raises:
      ValueError: `resize` returns something else.
    """

    def __init__(self, resize: Callable[[np.ndarray], np.ndarray]):
        # Here and not above: scikit-learn takes a second to import, and most runs have no digits.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC

        digits = load_digits()
        gray = np.floor(digits.images * (255 / 16) + 0.5).astype(np.uint8)
        resized = np.stack([resize(np.repeat(image[..., None], 3, axis=-1)) for image in gray])
        self.resolution = resized.shape[1]
        real = self._pixels(resized)
        labels = digits.target
        train_x, held_x, train_y, held_y = train_test_split(
            real, labels, test_size=_HELD_OUT, random_state=0, stratify=labels
        )
        # gamma is scikit-learn's own choice for these digits, in pixels of 0..16.
        self._svm = SVC(gamma=0.001).fit(train_x, train_y)
        self.judge_accuracy = float(self._svm.score(held_x, held_y))
        self._moments = gaussian_moments(real)
        self._variance = np.array([_variance(real[labels == digit]) for digit in range(10)])

    def judge(self, images: np.ndarray, digits: np.ndarray) -> DigitsReport:
        """Judges generated images against the digits that their prompts named.

        Args:
          images: uint8 `[N, R, R, 3]`, R as training had it.
          digits: integers `[N]` in 0..9; every digit at least twice, and
            `IMAGES_PER_DIGIT` times to pass.

        Raises:
          ValueError: shapes, dtypes or digits are not these.
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
        if counts.min() < 2:
            raise UserError(
                f"the judge needs at least 2 images of every digit, got {counts.min()} of digit {counts.argmin()}: "
                f"generate more (the targets are for {IMAGES_PER_DIGIT} a digit)"
            )
        pixels = self._pixels(images)
        correct = self._svm.predict(pixels) == digits
        variance = np.array([_variance(pixels[digits == digit]) for digit in range(10)])
        return DigitsReport(
            accuracy=float(correct.mean()),
            per_digit_accuracy=tuple(float(correct[digits == digit].mean()) for digit in range(10)),
            variance_ratio=float((variance / self._variance).mean()),
            frechet=frechet_distance(*gaussian_moments(pixels), *self._moments),
            judge_accuracy=self.judge_accuracy,
            images_per_digit=int(counts.min()),
        )

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        """uint8 `[N, R, R, 3]` to gray `[N, 64]` in 0..16, area-averaged to 8x8."""
        r = self.resolution
        if images.dtype != np.uint8 or images.shape[1:] != (r, r, 3) or r % _SIDE:
            raise ValueError(
                f"digits are judged as uint8 [N, {r}, {r}, 3] with a side that is a multiple of {_SIDE}, "
                f"got {images.dtype} {list(images.shape)}"
            )
        cell = r // _SIDE
        cells = images.reshape(len(images), _SIDE, cell, _SIDE, cell, 3).astype(np.float64)
        return cells.mean(axis=(2, 4, 5)).reshape(len(images), _SIDE * _SIDE) * (16 / 255)


def _variance(pixels: np.ndarray) -> float:
    """The variance over images `[N, 64]` of one digit, mean over pixels."""
    return float(pixels.var(axis=0, ddof=1).mean())
