"""Several data sets in one stream, in exact proportions."""

import hashlib
from collections.abc import Sequence

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import Record
from gigagan_jax.data.sampling import Mixed
from gigagan_jax.data.source import Source


class MixedSource(Source):
    """The examples of several sources, one source after the other; `shuffled` mixes them by weight.

    Args:
      parts: (weight, source); each source is gone through in epochs of its own.

    Raises:
      UserError: no part, or a weight that is not positive.
    """

    def __init__(self, parts: Sequence[tuple[float, Source]]):
        if not parts or any(not 0 < weight < float("inf") for weight, _ in parts):
            raise UserError("a mixture needs parts with positive weights, each written WEIGHT:PATH")
        self.weights = tuple(weight for weight, _ in parts)
        self.parts = tuple(source for _, source in parts)
        self.starts = np.concatenate([[0], np.cumsum([len(s) for s in self.parts])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, i: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return part, i - int(self.starts[part])

    def read(self, i: int) -> Record:
        part, place = self._find(i)
        record = self.parts[part].read(place)
        return Record(record.image, record.captions, record.label, self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        part, place = self._find(i)
        return self.parts[part].captions(place)

    def neighbours(self, i: int) -> range:
        """Those of its own part: a part keeps its share of the stream whatever is bad in it."""
        part, place = self._find(i)
        start, own = int(self.starts[part]), self.parts[part].neighbours(place)
        return range(start + own.start, start + own.stop)

    def name(self, i: int) -> str:
        """Number of the part and the name there: "1:00000.tar/000000012"."""
        part, place = self._find(i)
        return f"{part}:{self.parts[part].name(place)}"

    def identity(self) -> str:
        parts = " ".join(f"{w:g}:{s.identity()}" for w, s in zip(self.weights, self.parts, strict=True))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def shuffled(self, seed: int) -> Sequence[int]:
        """Weights are kept in every block of 1,000 positions."""
        seeds = np.random.SeedSequence((seed, len(self.parts))).generate_state(len(self.parts) + 1, np.uint64)
        orders = [
            (source.shuffled(int(s) >> 1), int(start))
            for source, s, start in zip(self.parts, seeds, self.starts, strict=False)
        ]
        return Mixed(orders, self.weights, int(seeds[-1]) >> 1)
