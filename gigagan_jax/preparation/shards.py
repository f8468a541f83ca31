"""Writes one shard as a tar, a folder or an ArrayRecord file. The same examples give the same bytes."""

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

# Caption files hold one caption a line.
_BREAK = re.compile(r"\s*[\r\n]+\s*")


def image_suffix(data: bytes) -> str | None:
    """The suffix of an image file by its first bytes; None for a format that no source reads."""
    # Names are no evidence: web data has PNG files named .jpg.
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


def to_portable(record: Record, check: bool = False) -> tuple[bytes, str]:
    """(image file, its suffix): as stored, or as PNG for pixels and for formats that no source reads (TIFF, AVIF).

    Args:
      record: an example.
      check: decode the image in any case.

    Raises:
      BadExample: as `decode_image` does.
    """
    image = record.image
    if isinstance(image, np.ndarray):
        return encode_png(image), ".png"
    suffix = image_suffix(image)
    # PNG is lossless: a converted image has the pixels of its original.
    if suffix is None:
        return encode_png(decode_image(image)), ".png"
    # The pixels are dropped. Encoding a JPEG again would lose quality.
    if check:
        decode_image(image)
    return image, suffix


@dataclasses.dataclass(frozen=True)
class Item:
    """One example, ready for writing.

    Attributes:
      key: name of its files without their suffixes.
      image: bytes of an image file.
      suffix: of that file.
      record: captions, label and name.
    """

    key: str
    image: bytes
    suffix: str
    record: Record

    def member_files(self) -> list[tuple[str, bytes]]:
        """(suffix, data) of the example's files: image, captions (one a line), JSON with all of it, and label."""
        files = [(self.suffix, self.image)]
        captions = [_BREAK.sub(" ", c).strip() for c in self.record.captions]
        # 'replace': captions from JSON files may hold lone surrogates, which UTF-8 cannot encode.
        if any(captions):
            files.append((".txt", "\n".join(c for c in captions if c).encode("utf-8", "replace")))
        files.append((".json", json.dumps(self.describe_image(), indent=1).encode()))
        # .cls is WebDataset's suffix for a class index.
        if self.record.label != UNKNOWN_LABEL:
            files.append((".cls", str(self.record.label).encode()))
        return files

    def describe_image(self) -> dict[str, Any]:
        """The keys of img2dataset that are known here. `captions` holds all captions, with their line breaks."""
        width, height = header_size(self.image)
        description: dict[str, Any] = {
            "key": self.key,
            # Names of files that are not UTF-8 hold lone surrogates, which JSON readers refuse.
            "name": self.record.name.encode("utf-8", "replace").decode(),
            "caption": self.record.captions[0] if self.record.captions else None,
            "captions": list(self.record.captions),
            "width": width,
            "height": height,
            # img2dataset's key. Filters find duplicates by it.
            "sha256": hashlib.sha256(self.image).hexdigest(),
        }
        if self.record.label != UNKNOWN_LABEL:
            description["label"] = self.record.label
        if self.record.license:
            description["license"] = self.record.license
        return description


def header_size(data: bytes) -> tuple[int | None, int | None]:
    """(width, height) from an image file's header; (None, None) for a damaged one."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    # Decoders raise exceptions of many types for corrupt bytes.
    except Exception:
        return None, None


class Written(NamedTuple):
    """Counts taken during writing. `Conversion` compares them with the files on disk."""

    examples: int
    files: int
    bytes: int


def write_tar(path: Path, items: Iterable[Item]) -> Written:
    """Writes a tar in img2dataset's layout."""
    count = 0
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for item in items:
                for suffix, data in item.member_files():
                    # No times and owners: the bytes depend on the examples only.
                    member = tarfile.TarInfo(item.key + suffix)
                    member.size, member.mode, member.mtime = len(data), 0o644, 0
                    tar.addfile(member, io.BytesIO(data))
                count += 1
        # After the tar is closed, which writes its end blocks.
        return Written(count, 1, file.tell())


def write_folder(path: Path, items: Iterable[Item]) -> Written:
    """Writes a folder of images and caption files. Labels are dropped: folder sources take them from folder names."""
    path.mkdir()
    count = files = size = 0
    for item in items:
        for suffix, data in item.member_files():
            # A folder source knows images and captions only.
            if suffix in (item.suffix, ".txt"):
                (path / (item.key + suffix)).write_bytes(data)
                files, size = files + 1, size + len(data)
        count += 1
    return Written(count, files, size)


def write_array_record(path: Path, items: Iterable[Item]) -> Written:
    """Writes an ArrayRecord file of encoded examples."""
    # The record keeps captions and label. Its image is replaced by the portable one.
    count = array_record_format.write_records(path, (dataclasses.replace(i.record, image=i.image) for i in items))
    return Written(count, 1, path.stat().st_size)
