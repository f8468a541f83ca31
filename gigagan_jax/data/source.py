"""The interface of every source of examples."""

import abc
import hashlib
import os
from collections.abc import Iterable, Sequence

from gigagan_jax.data.decoding import decode_record
from gigagan_jax.data.example import Example, Record
from gigagan_jax.data.sampling import ShuffledOrder


class Source(abc.ABC):
    """A data set with random access.

    Several threads read at once, so `read` must be thread-safe. Worker processes read too: a source must be picklable.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples, good or bad."""

    @abc.abstractmethod
    def read(self, i: int) -> Record:
        """Reads example `i`, 0 <= i < len(self); the same one every time. Raises BadExample if it cannot be read."""

    def __getitem__(self, i: int) -> Example:
        """Example `i`, decoded. Raises BadExample if it cannot be read or decoded."""
        return decode_record(self.read(i))

    # Overridden where captions lie apart from images: `embed` then reads no image.
    def captions(self, i: int) -> tuple[str, ...]:
        """Captions of example `i`, equal to self[i].captions. Raises BadExample."""
        return self.read(i).captions

    def shuffled_order(self, seed: int) -> Sequence[int]:
        """The endless order of training: element k is the index of the k-th example, epoch after epoch.

        Random access takes no memory in the size of the source. Raises UserError for a source too long to shuffle.
        """
        return ShuffledOrder(len(self), seed)

    # A mixture overrides it: bad files of one part must not change the shares of the parts.
    def replacement_range(self, i: int) -> range:
        """The examples, `i` among them, that may replace `i` where it is bad."""
        return range(len(self))

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """Name of example `i`, known without decoding it."""

    @abc.abstractmethod
    def identity(self) -> str:
        """Short hash of the data set (names and count). A resumed run compares it with its checkpoint's."""


def identity_of(kind: str, names: Iterable[str]) -> str:
    """Hash of a kind of source and its names in order: 16 hexadecimal digits, equal on every machine."""
    digest = hashlib.sha256(kind.encode())
    count = 0
    for name in names:
        # surrogateescape: file names that are not UTF-8 reach Python as lone surrogates.
        digest.update(b"\0" + name.encode("utf-8", "surrogateescape"))
        count += 1
    # The count is part of the hash: names may contain the separator.
    digest.update(f"\0{count}".encode())
    return digest.hexdigest()[:16]


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without their common folder: names of shards that do not depend on where the data lies."""
    folders = [p.rpartition("/")[0] for p in paths]
    # os.path.commonpath would collapse the double slash of gs://bucket.
    common = os.path.commonprefix([f + "/" for f in folders])  # noqa: RUF071
    # commonprefix compares characters: the prefix may end within a folder's name.
    cut = common.rfind("/") + 1
    return [p[cut:] for p in paths]
