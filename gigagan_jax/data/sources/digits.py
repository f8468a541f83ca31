"""scikit-learn's handwritten digits: 1,797 images inside the package. A first run needs no download."""

import numpy as np

from gigagan_jax.data.example import Record
from gigagan_jax.data.source import Source, identity_of

# Also the names of the classes.
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION_TEMPLATES = (
    "a handwritten {word}",
    "a handwritten {digit}",
    "the digit {digit}",
    "the digit {word}",
    "the number {word}",
    "a small picture of the number {digit}",
    "a {word} in white on black",
    "{word}, written by hand",
)


def digit_captions(digit: int) -> tuple[str, ...]:
    """Returns all captions of a digit 0..9, in the order of CAPTION_TEMPLATES."""
    return tuple(template.format(word=DIGIT_WORDS[digit], digit=digit) for template in CAPTION_TEMPLATES)


class DigitsSource(Source):
    """Digits of `sklearn.datasets.load_digits`: uint8 [8, 8, 3], white on black, label 0..9, eight captions each."""

    classes = DIGIT_WORDS

    def __init__(self):
        # Imported here: only this source needs scikit-learn.
        from sklearn.datasets import load_digits

        digits = load_digits()
        # scikit-learn stores grey levels 0..16 as floats.
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        # Three equal channels: the networks take RGB.
        self._images = np.repeat(grey[..., None], 3, axis=3)
        self._labels = [int(label) for label in digits.target]

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, i: int) -> Record:
        label = self._labels[i]
        return Record(image=self._images[i], captions=digit_captions(label), label=label, name=self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return digit_captions(self._labels[i])

    def name(self, i: int) -> str:
        # Four digits hold 1,797 examples and keep the names in sorted order.
        return f"digits/{i:04d}"

    def identity(self) -> str:
        return identity_of("digits", map(self.name, range(len(self))))
