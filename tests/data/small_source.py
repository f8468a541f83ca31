"""A source of small images whose reads are recorded, and helpers for its batches."""

import itertools

import numpy as np

from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.source import Source, identity_of

# Prime: no batch size divides it, so epochs end within batches.
N = 23


class SmallSource(Source):
    """N images that differ, of different sizes, three captions each; `bad` maps indices to causes."""

    def __init__(self, n=N, bad=None):
        self.n = n
        self.bad = bad or {}
        # Indices in the order of reading, to detect repeated and early reads.
        self.reads = []

    def __len__(self):
        return self.n

    def read(self, i):
        self.reads.append(i)
        if i in self.bad:
            raise BadExample(self.bad[i], "it says so")
        # Not square, so that crops differ.
        image = np.random.default_rng(i).integers(0, 256, (8 + i % 3, 12, 3), dtype=np.uint8)
        # Labels repeat after ten, names do not.
        return Record(image, tuple(f"{i} in wording {j}" for j in range(3)), i % 10, self.name(i))

    def name(self, i):
        return f"small/{i}"

    def identity(self):
        return identity_of("small", map(self.name, range(self.n)))


def take_batches(pipeline, batches):
    """The next batches as one, every array concatenated."""
    return join_batches(list(itertools.islice(pipeline, batches)))


def join_batches(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def text_of(tokens):
    # The inverse of ByteTokenizer: special tokens are 0, 1 and 2, byte b is b + 3.
    return bytes((tokens[tokens > 2] - 3).astype(np.uint8)).decode()
