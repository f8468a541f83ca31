"""The files of a folder of pictures: names in order, and where their captions are."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FolderContents:
    """Pictures of a folder.

    Attributes:
      names: paths of the pictures relative to the folder, in the order of the examples.
    """

    names: tuple[str, ...]
