"""Reads image files for upscaling: 8 or 16 bits, grey or RGB, alpha, ICC profile and EXIF data, upright."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from gigagan_jax.core.errors import UserError

_log = logging.getLogger(__name__)

# Input pixels: 1.6 GB as 16-bit RGB. A small file may claim any size.
MAX_PIXELS = 2**28
# Values of the EXIF tag Orientation.
_UPRIGHT, _TRANSPOSED = 1, (5, 6, 7, 8)
# Modes of Pillow whose arrays are what is wanted.
_PLAIN_MODES = ("L", "LA", "RGB", "RGBA")
_ALPHA_MODES = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
# Tags of a TIFF that describe the picture. Others say how its samples lie in the file, which the output does not share.
_DESCRIPTIVE_TAGS = (
    *(ExifTags.Base.DocumentName, ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model),
    *(ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.Base.Rating),
    *(ExifTags.Base.XPTitle, ExifTags.Base.XPComment, ExifTags.Base.XPAuthor, ExifTags.Base.XPKeywords),
    ExifTags.Base.XPSubject,
)
# What Pillow's decoders raise for damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """The contents of an image file.

    Attributes:
      pixels: uint8 or uint16 [H, W, C], upright; C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
      format: Pillow's name, e.g. "PNG".
      icc: its colour profile; None where it has none.
      exif: its EXIF data as a TIFF block, without orientation; None where it has none.
      notes: what was not kept, in words.
    """

    pixels: np.ndarray
    format: str
    icc: bytes | None
    exif: bytes | None
    notes: tuple[str, ...] = ()

    @property
    def color(self) -> np.ndarray:
        """[H, W, 1] or [H, W, 3]"""
        return self.pixels[..., : self.pixels.shape[2] - self.has_alpha]

    @property
    def alpha(self) -> np.ndarray | None:
        """[H, W, 1]"""
        return self.pixels[..., -1:] if self.has_alpha else None

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)


def read_image(path: Path) -> ImageFile:
    """Reads an image file. Of several frames it reads the first.

    Raises:
      UserError: the file is missing, no image, damaged, too large, or of a kind that has no 8 or 16 bits.
    """
    with _one_line_errors(path), open(path, "rb") as file, _any_size(), Image.open(file) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise UserError(f"{path} has no pixels: {width} x {height}")
        if width * height > MAX_PIXELS:
            most = MAX_PIXELS // 10**6
            raise UserError(f"{path} is {width} x {height}: at most {most} million pixels are read; cut it first")
        return _read_opened(path, file, image)


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of a file, upright. Raises UserError as `read_image` does, for a PNG with damaged pixels too."""
    with _one_line_errors(path), open(path, "rb") as file, _any_size(), Image.open(file) as image:
        width, height = image.size
        # Pillow decodes a PNG to look for EXIF data after the pixels.
        if width * height <= MAX_PIXELS and image.getexif().get(ExifTags.Base.Orientation) in _TRANSPOSED:
            return width, height
        return height, width


def read_picture(image: Image.Image) -> ImageFile:
    """The contents of a Pillow image: what `read_image` makes of such a file.

    Raises:
      UserError: it has no pixels, cannot be decoded, or has no 8 or 16 bits.
    """
    with _one_line_errors("the image"):
        if not image.width or not image.height:
            raise UserError(f"the image has no pixels: {image.width} x {image.height}")
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, _UPRIGHT)
        icc = image.info.get("icc_profile") or None
        notes: tuple[str, ...] = ()
        if image.mode.startswith("I;16") or (image.mode == "I" and _fits_16_bits(image)):
            pixels = _add_transparency(_to_16_bits(image), image)
        else:
            pixels, icc, notes = _read_8_bits("the image", image, icc)
        return ImageFile(_turn_upright(pixels, orientation), image.format or "", icc, None, notes)


def _fits_16_bits(image: Image.Image) -> bool:
    """Whether integers of 32 bits hold a 16-bit image. Of 0 to 255 nobody can tell."""
    low, high = image.getextrema()
    return low >= 0 and 255 < high <= 65535  # type: ignore[operator]


@contextlib.contextmanager
def _one_line_errors(path: Path | str) -> Iterator[None]:
    """Within it everything that reading raises is a UserError."""
    try:
        yield
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image, or of a format that Pillow cannot read") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except MemoryError:
        raise UserError(f"{path} does not fit the memory of this machine") from None
    except _DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"damaged or truncated ({error})"
        raise UserError(f"{path} cannot be read: {reason}") from None


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Within it Pillow opens images of any size: the limit here is another."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _read_opened(path: Path, file: BinaryIO, image: Image.Image) -> ImageFile:
    notes: tuple[str, ...] = ("only the first frame is read",) if getattr(image, "n_frames", 1) > 1 else ()
    # Before the EXIF data: Pillow decodes a PNG to find them, and then forgets how the samples lay.
    raw = _raw_mode(image)
    exif = image.getexif()
    orientation = exif.get(ExifTags.Base.Orientation, _UPRIGHT)
    icc = image.info.get("icc_profile") or None
    kind = image.format or ""
    if image.mode.startswith("I;16") or ";16" in raw:
        pixels = _read_16_bits(file, image, raw)
    else:
        pixels, icc, changed = _read_8_bits(path, image, icc)
        notes += changed
    exif = _descriptive_exif(exif) if kind == "TIFF" else exif
    return ImageFile(_turn_upright(pixels, orientation), kind, icc, _exif_block(exif), notes)


def _read_8_bits(
    name: Path | str, image: Image.Image, icc: bytes | None
) -> tuple[np.ndarray, bytes | None, tuple[str, ...]]:
    """(uint8 [H, W, C], the profile that describes it, notes)"""
    if image.mode in ("F", "I"):
        raise UserError(f"{name} has 32 bits a channel: convert it to 8 or 16 bits first")
    converted, changed = _convert_mode(image, icc)
    # The profile describes the colours that were converted.
    return (_to_array(converted), None, (changed,)) if changed else (_to_array(converted), icc, ())


def _raw_mode(image: Image.Image) -> str:
    """How the samples lie in the file, e.g. "RGB;16B"."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _with_raw_mode(image: Image.Image, raw: str) -> None:
    """Has the samples read as if they lay in another way."""
    image.tile = [  # type: ignore[attr-defined]
        t._replace(args=(raw, *t.args[1:]) if isinstance(t.args, tuple) else raw)
        for t in image.tile  # type: ignore[attr-defined]
    ]


def _read_16_bits(file: BinaryIO, image: Image.Image, raw: str) -> np.ndarray:
    """uint16 [H, W, C]. Pillow has no mode for colours of 16 bits: it is made to decode the upper and the lower bytes."""

    def decode(raw_mode: str) -> np.ndarray:
        file.seek(0)
        with Image.open(file) as again:
            _with_raw_mode(again, raw_mode)
            return np.asarray(again).astype(np.uint16)

    # Pillow reads PGM of 16 bits into 32.
    if image.mode.startswith("I;16") or image.mode == "I":
        return _add_transparency(_to_16_bits(image), image)
    if raw == "LA;16B":
        # Four bytes a pixel in both cases: grey high, grey low, alpha high, alpha low.
        four = decode("RGBA")
        return four[..., 0::2] << 8 | four[..., 1::2]
    base, _, order = raw.partition(";16")
    # N is the order of this machine, into which libtiff has put the samples.
    big = order.startswith("B") or (order.startswith("N") and sys.byteorder == "big")
    pixels = decode(f"{base};16{'B' if big else 'L'}")
    pixels <<= 8
    pixels |= decode(f"{base};16{'L' if big else 'B'}")
    return _add_transparency(pixels, image)


def _to_16_bits(image: Image.Image) -> np.ndarray:
    """uint16 [H, W, 1] of grey, in the order of this machine."""
    return np.asarray(image).astype(np.uint16)[..., None]


def _add_transparency(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Adds alpha where the file names one colour that is transparent."""
    key = image.info.get("transparency")
    # Bytes are of palettes.
    if key is None or pixels.shape[2] not in (1, 3) or isinstance(key, bytes):
        return pixels
    opaque = (pixels != np.asarray(key, np.uint16).reshape(-1)).any(-1, keepdims=True)
    return np.concatenate([pixels, opaque.astype(np.uint16) * 65535], axis=-1)


def _convert_mode(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, str]:
    """The image in a plain mode, and a note where its colours were converted."""
    mode = image.mode
    if "transparency" in image.info and mode in ("P", "L", "RGB", "1"):
        return image.convert("LA" if mode in ("L", "1") else "RGBA"), ""
    if mode in _PLAIN_MODES:
        return image, ""
    if mode in _ALPHA_MODES:
        return image.convert(_ALPHA_MODES[mode]), ""
    if mode == "1":
        return image.convert("L"), ""
    if mode == "P":
        return image.convert("RGBA" if (image.palette and image.palette.mode == "RGBA") else "RGB"), ""
    # Pillow's own conversion knows nothing of inks: its colours are too vivid.
    if mode == "CMYK" and icc is not None:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
            if converted is not None:
                return converted, "CMYK is converted to sRGB by its profile"
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        with contextlib.suppress(ImageCms.PyCMSError):
            converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
            if converted is not None:
                return converted, "LAB is converted to sRGB"
    return image.convert("RGB"), f"{mode} is converted to RGB"


def _to_array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C]"""
    image.load()
    out = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    # By bands: one copy of all pixels less.
    for top in range(0, image.height, 256):
        bottom = min(top + 256, image.height)
        out[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom))).reshape(bottom - top, image.width, -1)
    return out


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies the EXIF tag Orientation, 1 to 8. Other values are ignored."""
    if orientation in _TRANSPOSED:
        pixels = pixels.swapaxes(0, 1)
    # After the transposition: 3 and 4 turn rows upside down, 7 and 8 too; 2 and 3 mirror columns, 6 and 7 too.
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    # Rows of a turned view would be read across the whole image.
    return np.ascontiguousarray(pixels)


def _descriptive_exif(exif: Image.Exif) -> Image.Exif:
    """Of the tags of a TIFF those that describe the picture, with the EXIF and the GPS directories."""
    kept = Image.Exif()
    for tag in _DESCRIPTIVE_TAGS:
        if tag in exif:
            kept[tag] = exif[tag]
    for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        with contextlib.suppress(*_DAMAGE):
            # An empty one would count as EXIF data.
            if values := exif.get_ifd(directory):
                kept.get_ifd(directory).update(values)
    return kept


def _exif_block(exif: Image.Exif) -> bytes | None:
    """EXIF data without what is no longer true: the orientation and the size. None where nothing is left."""
    try:
        exif.pop(ExifTags.Base.Orientation, None)
        details = exif.get_ifd(ExifTags.IFD.Exif)
        for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):
            details.pop(tag, None)
        if not len(exif):
            return None
        # JPEG has the prefix, PNG does not; the writer adds it where it is needed.
        return exif.tobytes().removeprefix(b"Exif\0\0")
    # Damaged metadata costs the metadata, not the image.
    except Exception as error:
        _log.info("EXIF data is damaged and left out: %s", error)
        return None
