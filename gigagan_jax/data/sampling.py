"""Orders in which training visits the examples of a source: endless, reshuffled each epoch, computed on access."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from gigagan_jax.core.errors import UserError

# index_shuffle works on 32-bit indices.
_MAX = 2**32 - 1


class ShuffledOrder(Sequence[int]):
    """Element k is the index of the k-th example: epoch k // n is a permutation of 0 ... n - 1, a new one each epoch.

    The permutation is grain's block cipher on the index. An element costs microseconds and no memory.

    Raises:
      UserError: more than 2**32 - 1 examples, the range of the cipher.
    """

    def __init__(self, size: int, seed: int):
        if not 0 < size <= _MAX:
            raise UserError(f"the data set has {size} examples: the shuffle needs 1 to {_MAX} of them")
        self._size = size
        # Epoch e is shuffled by first + e, as in grain.
        # With first = seed, adjacent seeds would share all epochs but one.
        first = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
        self._first = first
        # grain 0.2.18: the cipher is no permutation of 2^16 + 1, 2^18 + 1 ... numbers (one comes twice, one never).
        # Those sizes use the permutation of size + 1 numbers and walk its cycle until an index is below `size`.
        even_power = (size - 1).bit_count() == 1 and (size - 1).bit_length() % 2 == 1
        self._largest = size if size > 4 and even_power else size - 1

    # Endless. Sequence needs a length, and len() allows at most sys.maxsize.
    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k):
        epoch, i = divmod(int(k), self._size)
        # The cipher's seed has 32 bits.
        seed = (self._first + epoch) % 2**32
        # Four rounds, as in grain's own shuffle: another number gives another order.
        i = index_shuffle(i, max_index=self._largest, seed=seed, rounds=4)
        # Cycle walking: the restriction of a permutation to a subset is a permutation again.
        while i >= self._size:
            i = index_shuffle(i, max_index=self._largest, seed=seed, rounds=4)
        return i


class ReshuffledOrder(Sequence[int]):
    """An endless order, shuffled anew from position `start` on. Each epoch still visits every example exactly once.

    Args:
      order: the order to shuffle.
      size: positions in an epoch.
      start: first position that moves; earlier ones stay.
      seed: of the new order.
    """

    def __init__(self, order: Sequence[int], size: int, start: int, seed: int):
        self._order, self._start = order, start
        self._size = min(size, _MAX)
        # `start` lies within an epoch. Its rest is shuffled on its own: no example of the first part may come again.
        self._rest = self._size - start % self._size
        self._shuffled, self._later = ShuffledOrder(self._rest, seed), ShuffledOrder(self._size, seed)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k):
        k = int(k)
        i = k - self._start
        if i < 0:
            return self._order[k]
        if i < self._rest:
            return self._order[self._start + self._shuffled[i]]
        # k - k % size is the first position of k's epoch. _later[k] is a place within that epoch.
        return self._order[k - k % self._size + self._later[k]]


class OrderFrom(Sequence[int]):
    """An endless order that begins at a position: the data set came into the run there.

    Args:
      order: element 0 is that of position `start`.
      start: first position; those before it belong to another data set.
    """

    def __init__(self, order: Sequence[int], start: int):
        self._order, self._start = order, start

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k):
        if int(k) < self._start:
            raise IndexError(f"position {k} is of a data set that was used before position {self._start}")
        return self._order[int(k) - self._start]


class MixedOrder(Sequence[int]):
    """An endless mixture of several endless orders, in exact proportions.

    The stream consists of blocks of `block` positions. Each block holds the same number of examples of each part, in
    an order drawn from (seed, block). Each part follows its own order without gaps, so its epochs stay complete.

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
        self._counts = _apportion_counts(shares, block)
        self._kinds = np.repeat(np.arange(len(self._counts)), self._counts)

    def __len__(self) -> int:
        return min(len(order) for order, _ in self._parts)

    def __getitem__(self, k):
        number, place = divmod(int(k), self._block)
        kinds = np.random.default_rng((self._seed, number)).permutation(self._kinds)
        kind = int(kinds[place])
        # Every earlier block holds exactly counts[kind] of this part: its position follows without a search.
        rank = int(np.count_nonzero(kinds[:place] == kind))
        order, offset = self._parts[kind]
        return offset + order[number * self._counts[kind] + rank]


def _apportion_counts(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in these proportions that sum to `total`: the largest remainders are rounded up."""
    exact = np.asarray(shares, np.float64) / sum(shares) * total
    counts = np.floor(exact).astype(int)
    # Stable: equal remainders go to the earlier part, on every machine.
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    if counts.min() < 1:
        raise UserError(f"the weights {tuple(shares)} leave a part less than one example in {total}: raise its weight")
    return counts.tolist()


def with_new_order(state: Mapping[str, Any], salt: int) -> dict[str, Any]:
    """Adds a reshuffle from the current position on to a pipeline's `state`; `salt` selects the new order."""
    # Appended, not replaced: the positions before it still follow the earlier reshuffles.
    return {**state, "reorders": [*state.get("reorders", ()), [state["examples_seen"], salt]]}


def order_of_stream(
    source_order: Callable[[int], Sequence[int]],
    size: int,
    seed: int,
    starts: Sequence[int],
    reorders: Sequence[tuple[int, int]],
) -> Sequence[int]:
    """The order of a whole stream over its present data set.

    Args:
      source_order: seed -> endless order of the data set.
      size: examples of the data set.
      seed: of the run.
      starts: positions at which another data set came in, the present one at the last; empty for the run's first.
      reorders: (position, salt) of each reshuffle, in the order of their positions.
    """
    start = starts[-1] if starts else 0
    # The number too: a data set that comes back gets an order that it did not have before.
    order = source_order(derive_seed(seed, start, len(starts)) if starts else seed)
    # Each reshuffle permutes the order that the earlier ones left. Those from before `start` were of other data.
    for position, salt in reorders:
        if position >= start:
            order = ReshuffledOrder(order, size, position - start, derive_seed(seed, salt))
    return OrderFrom(order, start) if starts else order


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits from whole numbers; other numbers, or another count of them, give an independent one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
