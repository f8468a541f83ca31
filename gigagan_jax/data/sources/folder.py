"""Source of a folder of image files, with captions beside them or in a table, or one sub-folder for each class."""

import functools
import os
from pathlib import Path

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import UNKNOWN_LABEL, BadExample, Record
from gigagan_jax.data.source import Source, identity_of
from gigagan_jax.data.survey.captions_of_folder import check_captions
from gigagan_jax.data.survey.folder_contents import FolderContents
from gigagan_jax.data.survey.folders import survey_pictures
from gigagan_jax.data.survey.listing import list_folder


class FolderSource(Source):
    """Images found recursively, in the order of their relative paths. Hidden files and folders are skipped.

    The captions of `a/b.png` are the non-empty lines of `a/b.txt`, `a/b.caption` or `a/b.png.txt`, or come from
    `a/b.json`, from a metadata table or from COCO's JSON (docs/data.md).

    Attributes:
      path: the folder.
      classes: with labels='folder', the names of the classes in the order of their labels; otherwise empty.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        caption_required: bool = True,
        labels: str | None = None,
        *,
        contents: FolderContents | None = None,
    ):
        """Lists the folder unless `contents` is given; reads no picture.

        Args:
          path: the folder.
          caption_required: if True, an image without a caption is a bad example, and a folder without any is an error.
            If False, such images are examples without captions.
          labels: None gives label -1 everywhere. 'folder' is for class-conditional training: the label is the index of
            the top-level sub-folder in the order of `splits.order_classes`, and captions are not required.
          contents: of the folder, from its survey.

        Raises:
          UserError: the path is missing, not a folder or unreadable, holds no image, no image has a caption and they
            are required, or, with labels='folder', an image has no class folder.
        """
        if labels not in (None, "folder"):
            raise UserError(f"unknown kind of labels {labels!r} for an image folder; use None or 'folder'")
        if not str(path):
            raise UserError("the image folder has an empty path; set data.path to a folder of images")
        self.path = Path(path)
        self._caption_required = caption_required and labels is None
        if contents is None:
            condition = "class" if labels else "text"
            contents = survey_pictures(list_folder(self.path), DataConfig(), condition).contents
            assert contents is not None
            self.path = Path(contents.root)
        self._contents = contents
        self._names = contents.names
        if self._caption_required:
            check_captions(contents)
        self.classes: tuple[str, ...] = ()
        if labels == "folder":
            self._check_class_folders()
            self.classes = contents.classes
        self._label_of = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> Record:
        """Reads image and captions.

        Raises BadExample with a cause of `FolderContents.decode`, or `image_unreadable`,
        `caption_unreadable` (the file system refuses), `caption_missing` or `caption_empty` (no line with text).
        """
        name = self._names[i]
        # Captions are read before the image: they are cheaper, and a bad example needs no image.
        captions = self.captions(i)
        image = self._read_file(name, "image_unreadable")
        # The label comes from the first component of the path: deeper folders only order the images of a class.
        label = self._label_of[name.split("/", 1)[0]] if self._label_of else UNKNOWN_LABEL
        return Record(image=image, captions=captions, label=label, name=name)

    def captions(self, i: int) -> tuple[str, ...]:
        """Captions from a file or from the table; see `read`."""
        name = self._names[i]
        # Looked up in the listing, so that a missing file costs no request to the file system.
        place = self._contents.place_of(name)
        captions: tuple[str, ...] = ()
        if place is not None and place == self._contents.table_name:
            captions = tuple(self._contents.table[name])
        elif place is not None:
            captions = self._contents.decode(place, self._read_file(place, "caption_unreadable"))
        if self._caption_required and not captions:
            if place is None:
                raise BadExample("caption_missing", f"{name} has no caption file and is in no table")
            raise BadExample("caption_empty", f"{place} has no text")
        return captions

    def name(self, i: int) -> str:
        """Path relative to the folder, with forward slashes."""
        return self._names[i]

    def identity(self) -> str:
        return self._identity_hash

    @functools.cached_property
    def _identity_hash(self) -> str:
        # Names only: hashing the files would read the whole data set at the start.
        if list(self.classes) == sorted(self.classes):
            return self.sorted_identity
        # Numbers as names: earlier versions labelled them in sorted order, and the labels belong to the identity.
        return identity_of("folder, classes by number", [*self._names, *self.classes])

    @functools.cached_property
    def sorted_identity(self) -> str:
        """The identity of these files where their classes are in sorted order, or where there are none."""
        return identity_of("folder", self._names)

    def _read_file(self, name: str, cause: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise BadExample(cause, str(error)) from error

    def _check_class_folders(self) -> None:
        for name in self._names:
            # An image at the top has no class, and label -1 would make it unconditional without notice.
            if "/" not in name:
                raise UserError(
                    f"{name} lies in {self.path} itself and so has no class: move each image into a sub-folder named after "
                    "its class; config.condition=none trains without classes"
                )
