"""Evaluates models of emoji: which real picture is nearest to a generated one, and whether it is the cell that was asked for.

A cell is a concept in a style. The real drawing of every cell is known, also of those that training never shows, so following
a prompt that was never seen is a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.ndimage

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.source import Source
from gigagan_jax.data.sources.tar import TarSource

# Pixels of the side at which pictures are compared.
_SIDE = 16
# By how much one picture may be shifted against another, as shares of its side, in each direction.
_SHIFTS = (-1 / 16, -1 / 32, 0, 1 / 32, 1 / 16)
# Features of images: uint8 [N, R, R, 3] -> float [N, ...].
Features = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Cells:
    """The real pictures.

    Attributes:
      images: uint8 [N, R, R, 3].
      captions: the first wording of each, "CONCEPT, STYLE style".
      held_out: bool [N], never shown in training.
    """

    images: np.ndarray
    captions: tuple[str, ...]
    held_out: np.ndarray

    @property
    def concepts(self) -> list[str]:
        return [caption.rpartition(", ")[0] for caption in self.captions]

    @property
    def styles(self) -> list[str]:
        return [caption.rpartition(", ")[2] for caption in self.captions]


def read_cells(train: Source, held_out: Source) -> Cells:
    """All pictures of the two parts that `tools/prepare_data.py emoji` writes.

    Raises:
      UserError: captions that are none of emoji, or pictures of several sizes.
    """
    examples = []
    for source in (train, held_out):
        for i in range(len(source)):
            try:
                examples.append(source[i])
            except BadExample as bad:
                raise UserError(
                    f"evaluators: emoji {source.name(i)} cannot be read ({bad}): prepare them anew"
                ) from bad
    captions = tuple(e.captions[0] if e.captions else "" for e in examples)
    for caption in captions:
        if not caption.endswith(" style") or ", " not in caption:
            raise UserError(
                f"evaluators: the caption {caption!r} is not 'CONCEPT, STYLE style': the judge of emoji needs the data of "
                "tools/prepare_data.py emoji"
            )
    if len({e.image.shape for e in examples}) != 1:
        raise UserError("evaluators: the pictures of the emoji have several sizes: prepare them anew")
    hidden = np.arange(len(examples)) >= len(train)
    return Cells(np.stack([e.image for e in examples]), captions, hidden)


def read_folder(folder: Path) -> Cells:
    """The cells of a folder that `tools/prepare_data.py emoji` wrote. Raises UserError where it is none."""
    return read_cells(*(TarSource(str(folder / part)) for part in ("train", "held_out")))


@dataclasses.dataclass(frozen=True)
class EmojiReport:
    """Shares of pictures whose nearest real picture is right.

    Attributes:
      seen: {"concept", "style", "both"}, of cells that were trained.
      held_out: the same of cells that were not.
      images: number of pictures.
    """

    seen: dict[str, float]
    held_out: dict[str, float]
    images: int

    def to_dict(self) -> dict[str, float]:
        """Flat, with names such as `held_out/concept`."""
        return {f"{part}/{name}": v for part in ("seen", "held_out") for name, v in getattr(self, part).items()}

    def format_table(self) -> str:
        """Returns the report as text."""
        lines = [f"nearest real picture to {self.images} pictures", f"{'right':<24}{'seen':>8}{'held out':>11}"]
        return "\n".join(
            lines + [f"  {name:<22}{self.seen[name]:>8.3f}{self.held_out[name]:>11.3f}" for name in self.seen]
        )


class EmojiJudge:
    """Finds the real picture nearest to a generated one.

    Args:
      cells: the real pictures.
      features: of images; None compares pixels, smoothed, with a pixel of tolerance in place.
    """

    def __init__(self, cells: Cells, features: Features | None = None):
        self.cells, self._features = cells, features
        self._real = _shifted_pixels(cells.images) if features is None else features(cells.images)[None]
        self._concepts, self._styles = np.array(cells.concepts), np.array(cells.styles)

    def nearest(self, images: np.ndarray) -> np.ndarray:
        """int [N], the real picture nearest to each of uint8 [N, R, R, 3]."""
        own = _pixels(images) if self._features is None else self._features(images)
        own = own.reshape(len(own), -1)
        distances = np.full((len(own), self._real.shape[1]), np.inf)
        for real in self._real:
            flat = real.reshape(len(real), -1)
            squares = (own**2).sum(1)[:, None] + (flat**2).sum(1)[None] - 2 * own @ flat.T
            distances = np.minimum(distances, squares)
        return distances.argmin(axis=1)

    def judge_images(self, images: np.ndarray, asked: np.ndarray) -> EmojiReport:
        """Compares pictures with the cells that were asked for.

        Args:
          images: uint8 [N, R, R, 3].
          asked: int [N], numbers of cells.
        """
        found = self.nearest(images)
        right = {"concept": self._concepts[found] == self._concepts[asked]}
        right["style"] = self._styles[found] == self._styles[asked]
        right["both"] = right["concept"] & right["style"]
        hidden = self.cells.held_out[asked]
        share = lambda rows: {k: float(v[rows].mean()) if rows.any() else float("nan") for k, v in right.items()}
        return EmojiReport(share(~hidden), share(hidden), len(images))


def _pixels(images: np.ndarray) -> np.ndarray:
    """Float32 [N, 16, 16, 3], smoothed and shrunk."""
    x = images.astype(np.float32) / 255
    factor = x.shape[1] / _SIDE
    # The blur takes what 16 px cannot show, and edges that are a little off.
    x = scipy.ndimage.gaussian_filter(x, (0, 0.6 * factor, 0.6 * factor, 0), mode="nearest")
    places = ((np.arange(_SIDE) + 0.5) * factor).astype(int)
    return x[:, places][:, :, places]


def _shifted_pixels(images: np.ndarray) -> np.ndarray:
    """[shifts, N, 16, 16, 3]."""
    side = images.shape[1]
    steps = sorted({round(share * side) for share in _SHIFTS})
    most = steps[-1]
    # Shifted before it is shrunk: a pixel of the picture is less than one of those that are compared.
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    cut = lambda step: slice(most + step, most + step + side)
    return np.stack([_pixels(padded[:, cut(dy), cut(dx)]) for dy in steps for dx in steps])
