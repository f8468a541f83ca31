"""In which order the examples of a source are trained on: endless, shuffled anew each epoch, and without a list of it."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from gigagan_jax.core.errors import UserError

_MAX = 2**32 - 1


class Shuffled(Sequence[int]):
    """Element k is the index of the k-th example: epoch k // n is a permutation of 0 ... n - 1, another one each epoch.

    A permutation is a block cipher on the index (grain's), so an element costs microseconds and no memory.

    Raises:
      UserError: more than 2**32 - 1 examples, which the cipher does not reach.
    """

    def __init__(self, size: int, seed: int):
        if not 0 < size <= _MAX:
            raise UserError(f"the data set has {size} examples: the shuffle needs 1 to {_MAX} of them")
        self._size = size
        # Epoch e is shuffled by seed + e, as grain does it: neighbouring seeds would share all epochs but one.
        first = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
        self._first = first
        # Grain's cipher is no permutation of 2^16 + 1, 2^18 + 1 ... (grain 0.2.18: one number comes twice, one never). There the
        # permutation of one more number is walked until it leads back among the first `size`, which is one of those.
        even_power = (size - 1).bit_count() == 1 and (size - 1).bit_length() % 2 == 1
        self._largest = size if size > 4 and even_power else size - 1

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k):
        epoch, i = divmod(int(k), self._size)
        seed = (self._first + epoch) % 2**32
        i = index_shuffle(i, max_index=self._largest, seed=seed, rounds=4)
        while i >= self._size:
            i = index_shuffle(i, max_index=self._largest, seed=seed, rounds=4)
        return i


class Reordered(Sequence[int]):
    """An endless order whose positions from `start` on are shuffled anew, within each epoch: nothing is lost or seen twice by it.

    Args:
      order: what to shuffle.
      size: positions in an epoch.
      start: first position that is moved; those before it stay.
      seed: of the new order.
    """

    def __init__(self, order: Sequence[int], size: int, start: int, seed: int):
        self._order, self._start = order, start
        self._size = min(size, _MAX)
        self._rest = self._size - start % self._size  # of the epoch that `start` is in
        self._shuffled, self._later = Shuffled(self._rest, seed), Shuffled(self._size, seed)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k):
        k = int(k)
        i = k - self._start
        if i < 0:
            return self._order[k]
        if i < self._rest:
            return self._order[self._start + self._shuffled[i]]
        return self._order[k - k % self._size + self._later[k]]


class Mixed(Sequence[int]):
    """An endless mixture of several endless orders, in exact proportions.

    The stream is cut into blocks of `block` positions; each holds the same number of examples of each part, in an order
    drawn from (seed, block). Each part goes through its own order without a gap: each of its examples is seen once in each
    of its own epochs.

    Args:
      parts: (order, offset) of each part; `offset` is added to its indices.
      shares: weight of each part, positive.
      seed: of the order within blocks.
      block: positions in a block; weights are rounded to multiples of 1 / block.

    Raises:
      UserError: a weight so small that a block would hold no example of its part.
    """

    def __init__(
        self, parts: Sequence[tuple[Sequence[int], int]], shares: Sequence[float], seed: int, block: int = 1000
    ):
        self._parts, self._seed, self._block = tuple(parts), seed, block
        self._counts = _apportion(shares, block)
        self._kinds = np.repeat(np.arange(len(self._counts)), self._counts)

    def __len__(self) -> int:
        return min(len(order) for order, _ in self._parts)

    def __getitem__(self, k):
        number, place = divmod(int(k), self._block)
        kinds = np.random.default_rng((self._seed, number)).permutation(self._kinds)
        kind = int(kinds[place])
        rank = int(np.count_nonzero(kinds[:place] == kind))
        order, offset = self._parts[kind]
        return offset + order[number * self._counts[kind] + rank]


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in these proportions that sum to `total`: the largest remainders are rounded up."""
    exact = np.asarray(shares, np.float64) / sum(shares) * total
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    if counts.min() < 1:
        raise UserError(f"the weights {tuple(shares)} leave a part less than one example in {total}: raise its weight")
    return counts.tolist()


def reordered(state: Mapping[str, Any], salt: int) -> dict[str, Any]:
    """The position `state` of a pipeline, with another order of the examples from there on; `salt` picks which."""
    return {**state, "reorders": [*state.get("reorders", ()), [state["examples_seen"], salt]]}
