"""scikit-learn's handwritten digits: 1,797 images that come with the package, so that a first run needs no download."""

import numpy as np

from gigagan_jax.data.example import Record
from gigagan_jax.data.source import Source, identity_of

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
    """All wordings for a digit 0..9, in the order of CAPTION_TEMPLATES."""
    return tuple(template.format(word=DIGIT_WORDS[digit], digit=digit) for template in CAPTION_TEMPLATES)


class DigitsSource(Source):
    """`sklearn.datasets.load_digits` as uint8 [8, 8, 3], white on black, with label 0..9 and eight captions each."""

    classes = DIGIT_WORDS

    def __init__(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
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
        return f"digits/{i:04d}"

    def identity(self) -> str:
        return identity_of("digits", map(self.name, range(len(self))))
