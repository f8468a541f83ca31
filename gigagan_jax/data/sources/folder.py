"""Source of a folder of image files, with caption files beside them or one sub-folder for each class."""

import functools
import os
from pathlib import Path, PurePosixPath

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.decoding import IMAGE_SUFFIXES, decode_captions
from gigagan_jax.data.example import UNKNOWN_LABEL, BadExample, Record
from gigagan_jax.data.source import Source, identity_of


class FolderSource(Source):
    """Images found recursively, in the order of their relative paths. Hidden files and folders are skipped.

    The captions of `a/b.png` are the non-empty lines of `a/b.txt`.

    Attributes:
      path: the folder.
      classes: with labels='folder', the names of the classes in the order of their labels; otherwise empty.
    """

    def __init__(self, path: str | os.PathLike, caption_required: bool = True, labels: str | None = None):
        """Lists the folder; reads no file.

        Args:
          path: the folder.
          caption_required: if True, a missing caption file is an error and an empty one makes a bad example. If False,
            both give examples without captions.
          labels: None gives label -1 everywhere. 'folder' is for class-conditional training: the label is the index of
            the top-level sub-folder in sorted order, and captions are not required.

        Raises:
          UserError: the path is missing, not a folder or unreadable, holds no image, or an image lacks its caption
            file or, with labels='folder', its class folder.
        """
        if labels not in (None, "folder"):
            raise UserError(f"unknown kind of labels {labels!r} for an image folder; use None or 'folder'")
        if not str(path):
            raise UserError("the image folder has an empty path; set data.path to a folder of images")
        self.path = Path(path)
        self._caption_required = caption_required and labels is None
        images, captions = _list_files(self.path)
        if not images:
            raise UserError(f"no image in {self.path}: looked for {' '.join(IMAGE_SUFFIXES)} in it and below it")
        # os.walk lists files in the order of the file system, which differs between hosts.
        self._names = sorted(images)
        self._caption_files = captions
        # Missing files are found at the start, because a listing costs no read. Empty ones show when they are read.
        if self._caption_required:
            self._check_captions()
        self.classes: tuple[str, ...] = ()
        if labels == "folder":
            self.classes = self._find_classes()
        # Sorted names: the same folders give the same labels on every machine.
        self._label_of = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> Record:
        """Reads image and captions.

        Raises BadExample with a cause of `decode_captions`, or `image_unreadable`,
        `caption_unreadable` (the file system refuses) or `caption_empty` (no line with text).
        """
        name = self._names[i]
        # Captions are read before the image: they are cheaper, and a bad example needs no image.
        captions = self.captions(i)
        image = self._read_file(name, "image_unreadable")
        # The label comes from the first component of the path: deeper folders only order the images of a class.
        label = self._label_of[PurePosixPath(name).parts[0]] if self._label_of else UNKNOWN_LABEL
        return Record(image=image, captions=captions, label=label, name=name)

    def captions(self, i: int) -> tuple[str, ...]:
        """Lines of the caption file; see `read`."""
        file = _caption_file(self._names[i])
        captions: tuple[str, ...] = ()
        # Looked up in the listing, so that a missing file costs no request to the file system.
        if file in self._caption_files:
            captions = decode_captions(self._read_file(file, "caption_unreadable"))
        if self._caption_required and not captions:
            raise BadExample("caption_empty", f"{file} has no text")
        return captions

    def name(self, i: int) -> str:
        """Path relative to the folder, with forward slashes."""
        return self._names[i]

    def identity(self) -> str:
        return self._identity_hash

    @functools.cached_property
    def _identity_hash(self) -> str:
        # Names only: hashing the files would read the whole data set at the start.
        return identity_of("folder", self._names)

    def _read_file(self, name: str, cause: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise BadExample(cause, str(error)) from error

    def _check_captions(self) -> None:
        without = [name for name in self._names if _caption_file(name) not in self._caption_files]
        if without:
            raise UserError(
                f"{without[0]} has no caption file {_caption_file(without[0])} ({len(without)} of {len(self)} images "
                f"in {self.path} lack theirs); write them, or accept uncaptioned images with data.captions=optional"
            )

    def _find_classes(self) -> tuple[str, ...]:
        for name in self._names:
            # An image at the top has no class, and label -1 would make it unconditional without notice.
            if len(PurePosixPath(name).parts) < 2:
                raise UserError(
                    f"{name} lies in {self.path} itself and so has no class; with labels='folder' each image belongs "
                    "in a sub-folder named after its class"
                )
        return tuple(sorted({PurePosixPath(name).parts[0] for name in self._names}))


def _caption_file(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(".txt"))


def _list_files(root: Path) -> tuple[list[str], set[str]]:
    """Returns the relative paths of all images and of all caption files below a folder."""
    images: list[str] = []
    captions: set[str] = set()
    seen_folders: set[tuple[int, int]] = set()
    try:
        if not root.exists():
            raise UserError(f"no image folder {root}: there is nothing at this path; check data.path")
        if not root.is_dir():
            raise UserError(f"{root} is a file, not a folder of images; check data.path")
        # Without onerror, os.walk skips unreadable folders silently.
        for folder, subfolders, files in os.walk(root, onerror=_raise_error, followlinks=True):
            status = os.stat(folder)
            # A link that leads back up would never end.
            if (status.st_dev, status.st_ino) in seen_folders:
                subfolders.clear()
                continue
            seen_folders.add((status.st_dev, status.st_ino))
            # Sorted, so that every machine keeps the same one of two links to one folder.
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            relative = Path(folder).relative_to(root)
            for file in files:
                # Cameras write suffixes in upper case.
                suffix = os.path.splitext(file)[1].lower()
                if file.startswith("."):
                    continue
                if suffix in IMAGE_SUFFIXES:
                    images.append((relative / file).as_posix())
                # Lower case only: `_caption_file` builds this spelling.
                elif file.endswith(".txt"):
                    captions.add((relative / file).as_posix())
    except OSError as error:
        raise UserError(
            f"cannot read the image folder {root}: {error.strerror} ({error.filename}); check its permissions"
        ) from error
    return images, captions


def _raise_error(error: OSError) -> None:
    raise error
