"""Several data sets in one stream, in exact proportions."""

import hashlib
from collections.abc import Sequence

import numpy as np

from gigagan_jax.config import first_difference
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import Record
from gigagan_jax.data.sampling import MixedOrder
from gigagan_jax.data.source import Source


class MixtureSource(Source):
    """Concatenates several sources; `shuffled_order` mixes them by weight.

    Args:
      parts: pairs (weight, source). Each source has epochs of its own.

    Raises:
      UserError: there is no part, or a weight is not positive.
    """

    def __init__(self, parts: Sequence[tuple[float, Source]]):
        # `0 < weight < inf` is also False for NaN.
        if not parts or any(not 0 < weight < float("inf") for weight, _ in parts):
            raise UserError("a mixture needs parts with positive weights, each written WEIGHT:PATH")
        self.weights = tuple(weight for weight, _ in parts)
        self.parts = tuple(source for _, source in parts)
        # starts[k] is the index of the first example of part k; the last entry is the length.
        self.starts = np.concatenate([[0], np.cumsum([len(s) for s in self.parts])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the parts; empty where a part does not know its own. Raises UserError where they differ."""
        first, *others = (tuple(getattr(part, "classes", None) or ()) for part in self.parts)
        for number, names in enumerate(others, 1):
            # A label would mean one class in one part and another in the next.
            if first and names and (difference := first_difference(first, names)):
                raise UserError(
                    f"config.data.mixture: part {number} has other classes than part 0 ({difference}); give all parts the same"
                )
        return first if all(others) else ()

    def _locate_example(self, i: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return part, i - int(self.starts[part])

    def read(self, i: int) -> Record:
        part, place = self._locate_example(i)
        record = self.parts[part].read(place)
        # The name is prefixed: two parts may hold examples of the same name.
        return Record(record.image, record.captions, record.label, self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        part, place = self._locate_example(i)
        return self.parts[part].captions(place)

    def replacement_range(self, i: int) -> range:
        """Returns the range within the part of example i."""
        # A replacement from another part would change the proportions of the mixture.
        part, place = self._locate_example(i)
        start, local_range = int(self.starts[part]), self.parts[part].replacement_range(place)
        return range(start + local_range.start, start + local_range.stop)

    def name(self, i: int) -> str:
        """Number of the part and the name there: "1:00000.tar/000000012"."""
        part, place = self._locate_example(i)
        return f"{part}:{self.parts[part].name(place)}"

    def identity(self) -> str:
        # Another weight is another data set: a resumed run would otherwise read another order.
        parts = " ".join(f"{w:g}:{s.identity()}" for w, s in zip(self.weights, self.parts, strict=True))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def shuffled_order(self, seed: int) -> Sequence[int]:
        """Returns an order that keeps the weights in every block of 1,000 positions."""
        # Independent seeds for the parts and for the mixing itself, so that equal sources differ in order.
        seeds = np.random.SeedSequence((seed, len(self.parts))).generate_state(len(self.parts) + 1, np.uint64)
        orders = [
            (source.shuffled_order(int(s) >> 1), int(start))
            for source, s, start in zip(self.parts, seeds, self.starts, strict=False)
        ]
        return MixedOrder(orders, self.weights, int(seeds[-1]) >> 1)
