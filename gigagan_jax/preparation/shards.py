"""One shard of examples as a tar, a folder or an ArrayRecord file; the same bytes from the same examples."""

import dataclasses
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.example import UNKNOWN_LABEL, Record
from gigagan_jax.data.sources import array_record_format

_BREAK = re.compile(r"\s*[\r\n]+\s*")


def image_suffix(data: bytes) -> str | None:
    """The suffix that belongs to an image file, by its first bytes; None for one that no source looks for."""
    if data.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return ".gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return ".bmp" if data.startswith(b"BM") else None


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG file of uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def portable(record: Record, check: bool = False) -> tuple[bytes, str]:
    """(image file, its suffix): as stored, or as PNG where it is pixels or of a kind that no source looks for (TIFF, AVIF).

    Args:
      record: an example.
      check: decode the image, whatever its kind.

    Raises BadExample as `decode_image` does.
    """
    image = record.image
    if isinstance(image, np.ndarray):
        return encode_png(image), ".png"
    suffix = image_suffix(image)
    if suffix is None:
        return encode_png(decode_image(image)), ".png"
    if check:
        decode_image(image)
    return image, suffix


@dataclasses.dataclass(frozen=True)
class Item:
    """One example as it is written.

    Attributes:
      key: name of its files.
      image: of an image file.
      suffix: of that file.
      record: everything else.
    """

    key: str
    image: bytes
    suffix: str
    record: Record

    def members(self) -> list[tuple[str, bytes]]:
        """(suffix, data) of the files beside each other: image, captions a line each, label, and JSON with all of it."""
        out = [(self.suffix, self.image)]
        captions = [_BREAK.sub(" ", c).strip() for c in self.record.captions]
        if any(captions):
            out.append((".txt", "\n".join(c for c in captions if c).encode("utf-8", "replace")))
        out.append((".json", json.dumps(self.about(), indent=1).encode()))
        if self.record.label != UNKNOWN_LABEL:
            out.append((".cls", str(self.record.label).encode()))
        return out

    def about(self) -> dict[str, Any]:
        """What img2dataset says of an image, as far as it is known here; `captions` and `name` are exact."""
        width, height = header_size(self.image)
        about: dict[str, Any] = {
            "key": self.key,
            "name": self.record.name.encode("utf-8", "replace").decode(),
            "caption": self.record.captions[0] if self.record.captions else None,
            "captions": list(self.record.captions),
            "width": width,
            "height": height,
            "sha256": hashlib.sha256(self.image).hexdigest(),
        }
        if self.record.label != UNKNOWN_LABEL:
            about["label"] = self.record.label
        return about


def header_size(data: bytes) -> tuple[int | None, int | None]:
    """(width, height) by an image file's header; nothing for a damaged one."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception:  # decoders answer broken bytes with whatever exception they fall over
        return None, None


class Written(NamedTuple):
    """What was written, counted on the way: what lies there afterwards may be less."""

    examples: int
    files: int
    bytes: int


def write_tar(path: Path, items: Iterable[Item]) -> Written:
    """A tar in img2dataset's layout, without times and owners."""
    count = 0
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for item in items:
                for suffix, data in item.members():
                    member = tarfile.TarInfo(item.key + suffix)
                    member.size, member.mode, member.mtime = len(data), 0o644, 0
                    tar.addfile(member, io.BytesIO(data))
                count += 1
        return Written(count, 1, file.tell())


def write_folder(path: Path, items: Iterable[Item]) -> Written:
    """A folder of images with captions beside them; without labels, which only folders named by class could hold."""
    path.mkdir()
    count = files = size = 0
    for item in items:
        for suffix, data in item.members():
            if suffix in (item.suffix, ".txt"):
                (path / (item.key + suffix)).write_bytes(data)
                files, size = files + 1, size + len(data)
        count += 1
    return Written(count, files, size)


def write_array_record(path: Path, items: Iterable[Item]) -> Written:
    """An ArrayRecord file of encoded examples; its length is known from the file alone."""
    count = array_record_format.write(path, (dataclasses.replace(i.record, image=i.image) for i in items))
    return Written(count, 1, path.stat().st_size)
