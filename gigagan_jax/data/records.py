"""What one example is, and what every source of examples offers."""

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

UNKNOWN_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with everything known about it.

    Attributes:
      image: uint8 [H, W, 3], RGB, upright; any size.
      captions: zero or more captions of the image; training draws one of them each time.
      label: class index from 0, or -1 where the class is unknown.
      name: what a person would look for to find this example: a relative path, a key in a tar file.
    """

    image: np.ndarray
    captions: tuple[str, ...]
    label: int
    name: str


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as it is stored.

    Attributes:
      image: an image file's bytes, or pixels uint8 [H, W, 3] of data that were never encoded.
      captions: as in Example.
      label: as in Example.
      name: as in Example.
    """

    image: bytes | np.ndarray
    captions: tuple[str, ...]
    label: int
    name: str


class BadExample(Exception):
    """An example that cannot be read. The pipeline replaces it by the next good one and counts it by its cause.

    Attributes:
      cause: a short word that is the same for all examples with this fault, such as `image_undecodable`.
      detail: what the decoder said about this one; may be empty.
    """

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


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
        from gigagan_jax.data.decoding import decode_record

        return decode_record(self.read(i))

    def captions(self, i: int) -> tuple[str, ...]:
        """Captions of example `i`, those of self[i]; without reading its image where the source can. Raises BadExample."""
        return self.read(i).captions

    def shuffled(self, seed: int) -> Sequence[int]:
        """The endless order of training: element k is the index of the k-th example, epoch after epoch.

        Random access to it takes no memory in the size of the source. Raises UserError for a source too long for that.
        """
        from gigagan_jax.data.order import Shuffled

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
