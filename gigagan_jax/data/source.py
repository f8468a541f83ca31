"""What every source of examples offers."""

import abc
import hashlib
import os
from collections.abc import Iterable, Sequence

from gigagan_jax.data.decoding import decode_record
from gigagan_jax.data.example import Example, Record
from gigagan_jax.data.sampling import Shuffled


class Source(abc.ABC):
    """A data set with random access.

    Reading happens in several threads at once, so `read` must be thread-safe; and in worker processes, so a source must
    survive being pickled.
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

    def captions(self, i: int) -> tuple[str, ...]:
        """Captions of example `i`, those of self[i]; without reading its image where the source can. Raises BadExample."""
        return self.read(i).captions

    def shuffled(self, seed: int) -> Sequence[int]:
        """The endless order of training: element k is the index of the k-th example, epoch after epoch.

        Random access to it takes no memory in the size of the source. Raises UserError for a source too long for that.
        """
        return Shuffled(len(self), seed)

    def neighbours(self, i: int) -> range:
        """The examples, `i` among them, from which one is taken in place of `i` where that is bad."""
        return range(len(self))

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """Name of example `i`, known without decoding it."""

    @abc.abstractmethod
    def identity(self) -> str:
        """Short hash of what the data set is (names and count). A resumed run compares it with its checkpoint's."""


def identity_of(kind: str, names: Iterable[str]) -> str:
    """Hash of a kind of source and its names in order: 16 hexadecimal digits, alike on every machine."""
    digest = hashlib.sha256(kind.encode())
    count = 0
    for name in names:
        # surrogateescape: file names that are not UTF-8 reach Python as lone surrogates.
        digest.update(b"\0" + name.encode("utf-8", "surrogateescape"))
        count += 1
    digest.update(f"\0{count}".encode())
    return digest.hexdigest()[:16]


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the folder they have in common: what a person calls a shard, wherever it lies."""
    folders = [p.rpartition("/")[0] for p in paths]
    common = os.path.commonprefix([f + "/" for f in folders])  # noqa: RUF071  (addresses are no paths)
    cut = common.rfind("/") + 1
    return [p[cut:] for p in paths]
