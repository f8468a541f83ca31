"""Examples, decoded and as stored."""

import dataclasses

import numpy as np

# Integer arrays have no missing value, and 0 is a class.
UNKNOWN_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Example:
    """One decoded image with its captions and its class.

    Attributes:
      image: uint8 [H, W, 3], RGB, upright; any size.
      captions: zero or more captions of the image; training draws one of them each time.
      label: class index from 0, or -1 where the class is unknown.
      name: how a person finds this example: a relative path, or a key in a tar file.
    """

    image: np.ndarray
    captions: tuple[str, ...]
    label: int
    name: str


# Raw pixels skip the decoder: data sets of arrays (digits, TFDS) were never image files.
@dataclasses.dataclass(frozen=True)
class Record:
    """One example as it is stored.

    Attributes:
      image: an image file's bytes, or pixels uint8 [H, W, 3] of data that was never encoded.
      captions: as in Example.
      label: as in Example.
      name: as in Example.
      license: of the image and whose it is, where the data say so.
    """

    # Reading and decoding are separate steps: a conversion copies image files without decoding them.
    image: bytes | np.ndarray
    captions: tuple[str, ...]
    label: int
    name: str
    license: str = ""


# An error of one example. UserError is for errors that end the run.
class BadExample(Exception):
    """An example that cannot be read. The pipeline replaces it by the next good one and counts it by its cause.

    Attributes:
      cause: a short identifier shared by all examples with this fault, such as `image_undecodable`.
      detail: the decoder's message for this example; may be empty.
    """

    # The cause is a key of counters and reports. Whatever differs from example to example goes into `detail`.
    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail
