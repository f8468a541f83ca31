"""What one example is."""

import dataclasses

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
