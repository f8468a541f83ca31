"""Writes image files from bands of rows: PNG and TIFF as the bands come, JPEG and WebP from the whole.

A file gets its name when it is complete; until then it has a hidden name in the same folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import secrets
import shutil
import struct
import types
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_bytes
from gigagan_jax.inference.image_encoding import DEFAULT_QUALITY, ENDINGS, LONGEST_SIDE

# File ending -> format.
FORMATS = ENDINGS | {".tif": "TIFF", ".tiff": "TIFF"}
_LONGEST = LONGEST_SIDE | {"TIFF": 2**31 - 1}
# Offsets of TIFF have 32 bits. Samples that do not compress need a little more than their size.
_LARGEST_TIFF = 4_200_000_000
# Bytes of a file per byte of its samples, for photographs: what must be free on the disk.
_COMPRESSION = {"PNG": 0.5, "TIFF": 0.6, "JPEG": 0.15, "WEBP": 0.1}
# Of an enlarged photograph level 6 takes 2.5 times as long (0.19 s a megapixel), for files smaller by a sixth.
_ZLIB_LEVEL = 4
# A JPEG segment holds 65533 bytes; six of them are the prefix.
_LONGEST_JPEG_EXIF = 65533 - 6
# PNG rows that are filtered at once, for the sake of the temporaries.
_FILTER_ROWS = 16


@dataclasses.dataclass(frozen=True)
class OutputImage:
    """What is written.

    Attributes:
      height, width: in pixels.
      channels: 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
      depth: 8 or 16 bits.
      icc, exif: as `image_reader.ImageFile` has them.
      text: by keyword, for PNG.
    """

    height: int
    width: int
    channels: int
    depth: int = 8
    icc: bytes | None = None
    exif: bytes | None = None
    text: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all samples."""
        return self.height * self.width * self.channels * self.depth // 8


def format_of(path: Path) -> str:
    """The format that a file's ending names.

    Raises:
      UserError: another ending.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: the name must end in one of {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def fit_format(image: OutputImage, kind: str) -> tuple[OutputImage, tuple[str, ...]]:
    """What of the image a format can hold, and notes on what it cannot."""
    if kind not in ("JPEG", "WEBP"):
        return image, ("EXIF data is not kept in TIFF",) if kind == "TIFF" and image.exif else ()
    notes = []
    if image.depth == 16:
        notes.append(f"{kind} has 8 bits a channel")
    if kind == "JPEG" and image.channels in (2, 4):
        notes.append("JPEG has no transparency: the image is laid over white")
    if kind == "JPEG" and image.exif and len(image.exif) > _LONGEST_JPEG_EXIF:
        notes.append("EXIF data is too long for JPEG and left out")
        image = dataclasses.replace(image, exif=None)
    # WebP has no grey: Pillow writes RGB, of which a profile of grey says nothing.
    if kind == "WEBP" and image.icc and image.icc[16:20] == b"GRAY":
        notes.append("WEBP has no grey: the grey colour profile is left out")
        image = dataclasses.replace(image, icc=None)
    drop = kind == "JPEG" and image.channels in (2, 4)
    return dataclasses.replace(image, depth=8, channels=image.channels - drop), tuple(notes)


def check_output(path: Path, image: OutputImage, overwrite: bool) -> None:
    """Checks what can be checked before the work, and makes the folder.

    Raises:
      UserError: the file exists, its folder cannot be written, the format cannot hold the size, or the disk is too full.
    """
    kind = format_of(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: --overwrite replaces it")
    longest = max(image.height, image.width)
    if longest > _LONGEST[kind] or (kind == "TIFF" and image.size > _LARGEST_TIFF):
        limit = "4 GB" if longest <= _LONGEST[kind] else f"{_LONGEST[kind]} pixels a side"
        other = ".tif or .png" if kind != "TIFF" else ".png"
        raise UserError(f"{path}: {image.width} x {image.height} is too large for {kind} ({limit}): write {other}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror or error}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: choose a folder that you may write to")
    need = image.size * _COMPRESSION[kind]
    if need > free:
        raise UserError(f"{path} needs about {format_bytes(need)}, and the disk has {format_bytes(free)} free")


class ImageWriter:
    """Writes one image file in bands, in a `with` block: the file has its name after the block.

    Args:
      path: its ending names the format.
      image: what will be written, which the format can hold (`fit_format`).
      overwrite: replace a file of this name.

    Raises:
      UserError: as `check_output` does, or the disk is full.
    """

    def __init__(self, path: Path, image: OutputImage, overwrite: bool = False):
        check_output(path, image, overwrite)
        self.path, self.image, self._overwrite = path, image, overwrite
        # Short: the name of the file may have the full length.
        self._temporary = path.parent / f".{secrets.token_hex(6)}.tmp"
        self._rows = 0

    def __enter__(self) -> ImageWriter:
        try:
            self._file = open(self._temporary, "xb")
            self._format: _Png | _Tiff | _Whole
            kind = format_of(self.path)
            if kind in ("PNG", "TIFF"):
                self._format = (_Png if kind == "PNG" else _Tiff)(self._file, self.image)
            else:
                self._format = _Whole(self._file, self.image, kind)
        except OSError as error:
            self._remove()
            raise self._failure(error) from None
        return self

    def write(self, band: np.ndarray) -> None:
        """Writes rows: uint8 or uint16 [rows, W, C].

        Raises:
          UserError: the disk is full, or another error of the file system.
          ValueError: the shape or dtype is wrong, or there are too many rows.
        """
        image = self.image
        dtype = np.uint8 if image.depth == 8 else np.uint16
        if band.dtype != dtype or band.shape[1:] != (image.width, image.channels):
            raise ValueError(f"got {band.dtype} {list(band.shape)} for rows of {np.dtype(dtype)} {image.width} pixels")
        # Formats do not count, and would write a file that no reader takes.
        if self._rows + len(band) > image.height:
            raise ValueError(f"row {self._rows + len(band)} of {image.height}")
        try:
            self._format.write(band)
        except OSError as error:
            raise self._failure(error) from None
        self._rows += len(band)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._rows != self.image.height:
                    raise ValueError(f"{self._rows} rows of {self.image.height} were written to {self.path}")
                self._format.close()
                self._file.close()
                # Somebody may have written it meanwhile.
                if self.path.exists() and not self._overwrite:
                    raise UserError(f"{self.path} exists: --overwrite replaces it")
                os.replace(self._temporary, self.path)
        except OSError as failure:
            raise self._failure(failure) from None
        finally:
            self._remove()

    def _remove(self) -> None:
        if hasattr(self, "_file"):
            # Closing writes what is buffered, and the disk may be full.
            with contextlib.suppress(OSError):
                self._file.close()
        # After the replacement there is nothing to delete; after an error there is.
        self._temporary.unlink(missing_ok=True)

    def _failure(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(f"no room on the disk for {self.path}: free some, or choose another folder")
        return UserError(f"{self.path} cannot be written: {error.strerror or error}")


class _Png:
    """PNG as a stream (W3C PNG, third edition)."""

    def __init__(self, file: BinaryIO, image: OutputImage):
        self._file = file
        self._zlib = zlib.compressobj(_ZLIB_LEVEL)
        # Bytes between a sample and the same of the pixel to its left.
        self._step = image.channels * image.depth // 8
        self._above = np.zeros(image.width * self._step, np.uint8)
        # Colour types of PNG.
        color = {1: 0, 2: 4, 3: 2, 4: 6}[image.channels]
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", image.width, image.height, image.depth, color, 0, 0, 0))
        if image.icc:
            self._chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(image.icc))
        if image.exif:
            self._chunk(b"eXIf", image.exif)
        for key, value in image.text.items():
            # Uncompressed, without language and translated keyword. A NUL would end the text.
            body = value.encode("utf-8", "replace").replace(b"\0", b"?")
            self._chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + body)

    def _chunk(self, name: bytes, body: bytes) -> None:
        crc = zlib.crc32(body, zlib.crc32(name))
        self._file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc))

    def write(self, band: np.ndarray) -> None:
        for top in range(0, len(band), _FILTER_ROWS):
            rows = band[top : top + _FILTER_ROWS]
            # PNG is big-endian.
            rows = np.ascontiguousarray(rows.astype(">u2") if rows.dtype == np.uint16 else rows)
            raw = rows.view(np.uint8).reshape(len(rows), -1)
            # zlib keeps what is too little for a block.
            if data := self._zlib.compress(self._filter(raw)):
                self._chunk(b"IDAT", data)
            self._above = raw[-1].copy()

    def _filter(self, raw: np.ndarray) -> bytes:
        """Each row by Sub or Up, whichever has the smaller differences: photographs need no more."""
        above = np.concatenate([self._above[None], raw[:-1]])
        # Bytes wrap around, as the format wants it.
        left = np.zeros_like(raw)
        left[:, self._step :] = raw[:, : -self._step]
        choices = (raw - left, raw - above)
        # As signed bytes: 255 is a difference of -1.
        costs = [np.minimum(c, 0 - c).sum(1, dtype=np.int64) for c in choices]
        up = costs[1] < costs[0]
        out = np.empty((len(raw), raw.shape[1] + 1), np.uint8)
        out[:, 0] = np.where(up, 2, 1)
        out[:, 1:] = np.where(up[:, None], choices[1], choices[0])
        return out.tobytes()

    def close(self) -> None:
        self._chunk(b"IDAT", self._zlib.flush())
        self._chunk(b"IEND", b"")


class _Tiff:
    """TIFF 6.0 as a stream: a strip for each band, compressed by zlib with horizontal differences; the directory is last."""

    def __init__(self, file: BinaryIO, image: OutputImage):
        self._file, self._image = file, image
        self._rows_per_strip = max(1, 2**18 // max(1, image.width * image.channels * image.depth // 8))
        self._pending = np.empty((0, image.width, image.channels), np.uint8 if image.depth == 8 else np.uint16)
        self._offsets: list[int] = []
        self._counts: list[int] = []
        # The directory's offset is not known yet.
        file.write(b"II*\0" + bytes(4))

    def write(self, band: np.ndarray) -> None:
        rows = np.concatenate([self._pending, band])
        # All strips but the last have the same number of rows.
        full = len(rows) // self._rows_per_strip * self._rows_per_strip
        for top in range(0, full, self._rows_per_strip):
            self._write_strip(rows[top : top + self._rows_per_strip])
        self._pending = rows[full:].copy()

    def _write_strip(self, rows: np.ndarray) -> None:
        differences = rows.astype(rows.dtype.newbyteorder("<"))
        differences[:, 1:] -= rows[:, :-1]
        data = zlib.compress(differences.tobytes(), _ZLIB_LEVEL)
        self._offsets.append(self._file.tell())
        self._counts.append(len(data))
        self._file.write(data)

    def close(self) -> None:
        if len(self._pending):
            self._write_strip(self._pending)
        image, color = self._image, 2 if self._image.channels >= 3 else 1
        # (tag, type, values): type 3 has two bytes, type 4 four, type 7 is of bytes.
        entries: list[tuple[int, int, list[int] | bytes]] = [
            (256, 4, [image.width]),
            (257, 4, [image.height]),
            (258, 3, [image.depth] * image.channels),
            (259, 3, [8]),
            (262, 3, [color]),
            (273, 4, self._offsets),
            (277, 3, [image.channels]),
            (278, 4, [self._rows_per_strip]),
            (279, 4, self._counts),
            (284, 3, [1]),
            (317, 3, [2]),
        ]
        if image.channels in (2, 4):
            # Unassociated alpha: colours are not multiplied by it.
            entries.append((338, 3, [2]))
        if image.icc:
            entries.append((34675, 7, image.icc))
        directory = struct.pack("<H", len(entries))
        for tag, kind, values in entries:
            body = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}{'HI'[kind - 3]}", *values)
            # Short values lie in the entry itself, others at an even offset.
            if len(body) > 4:
                self._file.write(b"\0" * (self._file.tell() % 2))
                place = struct.pack("<I", self._file.tell())
                self._file.write(body)
            else:
                place = body.ljust(4, b"\0")
            directory += struct.pack("<HHI", tag, kind, len(values)) + place
        self._file.write(b"\0" * (self._file.tell() % 2))
        start = self._file.tell()
        self._file.write(directory + bytes(4))
        # Into the header.
        self._file.seek(4)
        self._file.write(struct.pack("<I", start))


class _Whole:
    """JPEG and WebP by Pillow, which takes the whole image: its samples stay in memory."""

    def __init__(self, file: BinaryIO, image: OutputImage, kind: str):
        self._file, self._image, self._kind = file, image, kind
        self._pixels = np.empty((image.height, image.width, image.channels), np.uint8)
        self._rows = 0

    def write(self, band: np.ndarray) -> None:
        self._pixels[self._rows : self._rows + len(band)] = band
        self._rows += len(band)

    def close(self) -> None:
        pixels = self._pixels[..., 0] if self._pixels.shape[2] == 1 else self._pixels
        options: dict[str, object] = {"quality": DEFAULT_QUALITY}
        if self._kind == "JPEG":
            # Colours at full resolution: halved ones would undo part of the work.
            options["subsampling"] = 0
        if self._image.icc:
            options["icc_profile"] = self._image.icc
        if self._image.exif:
            options["exif"] = b"Exif\0\0" + self._image.exif
        # Not into the file: Pillow's encoders do not say why they cannot write.
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=self._kind, **options)
        self._file.write(buffer.getbuffer())
