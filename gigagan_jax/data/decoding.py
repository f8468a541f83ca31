"""Decoding of image files and caption files; shared by all sources."""

import codecs
import contextlib
import functools
import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gigagan_jax.data.example import BadExample, Example, Record

# Endings of image files that Pillow reads by itself, in lower case; shared by folders and tars.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"),
    *(".avif", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".jpf"),
)
HEIC_MEND = "HEIC: pip install -e '.[heic]' reads it"
# LFS replaces a file by a text that begins so, until it is fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_MEND = "a pointer of Git LFS: run 'git lfs install' and 'git lfs pull' in the clone"
# {beginnings in lower case: what it is}
_OTHER_FILES = {
    (b"<!doctype", b"<html", b"<head", b"<body"): "a web page, not a picture",
    (b"<?xml", b"<svg"): "SVG or XML, not pixels",
    (b"%pdf", b"%!ps"): "a document, not a picture",
    (b"\xff\x0a", b"\0\0\0\x0cjxl "): "JPEG XL, which Pillow does not read",
    (b"\x1a\x45\xdf\xa3", b"riff"): "a video or sound",
    (b"pk\3\4", b"\x1f\x8b", b"7z\xbc\xaf", b"rar!"): "an archive",
    (b"{", b"["): "a text, perhaps an error message of a server",
}
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# `decode_to_pil` checks sizes itself and raises. Pillow's warning would repeat that once for each call site.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(data: bytes, least: int | None = None) -> np.ndarray:
    """Decodes an image file to uint8 [H, W, 3]. Arguments and errors are those of `decode_to_pil`."""
    return np.array(decode_to_pil(data, least))


def decode_to_pil(data: bytes, least: int | None = None) -> Image.Image:
    """Decodes an image file to RGB: upright by EXIF, alpha over white, first frame, 16 bits reduced to 8.

    Args:
      data: the image file.
      least: shortest side that a JPEG may have after decoding, in pixels. The decoder then works at a half, a quarter
        or an eighth of the size and averages in the frequency domain. None decodes at full size.

    Raises:
      BadExample: cause `image_empty` (no bytes), `decompression_bomb` (more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`), `image_heic` (HEIC, and the package that reads it is not installed),
        `git_lfs_pointer` or `image_undecodable` (anything else, truncation included).
    """
    if not data:
        raise BadExample("image_empty", "0 bytes")
    if _is_heic(data):
        _enable_heic()
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Pillow itself raises only at twice the limit.
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise BadExample(
                    "decompression_bomb", f"{image.width} x {image.height} pixels, {limit} pixels are allowed"
                )
            if least is not None:
                # draft() takes the smallest of the decoder's sizes that is no smaller than the requested one.
                scale = least / min(image.size)
                image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            # open() reads the header only. Truncated data raises here.
            image.load()
            return _to_rgb(_apply_orientation(image))
    except BadExample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadExample("decompression_bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadExample(*_explain_unknown(data)) from error
    # Decoders raise exceptions of many types for corrupt bytes.
    except Exception as error:
        raise BadExample("image_undecodable", f"{type(error).__name__}: {error}") from error


def _is_heic(data: bytes) -> bool:
    """Whether a file is HEIC by its first box, whatever its name."""
    size = int.from_bytes(data[:4], "big")
    # The main brand and the compatible ones, four bytes each. AVIF is of the same family, and Pillow reads it.
    brands = data[8 : min(size, 256)]
    return data[4:8] == b"ftyp" and b"avif" not in brands and (b"hei" in brands or b"hev" in brands)


@functools.cache
def _enable_heic() -> None:
    """Lets Pillow read HEIC, where the package for it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _explain_unknown(data: bytes) -> tuple[str, str]:
    """(cause, detail) of a file that no decoder knows: what people have under the names of pictures."""
    head = data[:256].lstrip().lower()
    if _is_heic(data):
        return "image_heic", HEIC_MEND
    if data.startswith(LFS_POINTER):
        return "git_lfs_pointer", LFS_MEND
    for marks, what in _OTHER_FILES.items():
        if head.startswith(marks):
            return "image_undecodable", what
    if data[4:8] == b"ftyp":
        return "image_undecodable", "a video"
    return "image_undecodable", "unknown image format"


def decode_record(record: Record) -> Example:
    """Decodes a stored record. Raises BadExample as `decode_to_pil` does."""
    image = record.image
    pixels = image if isinstance(image, np.ndarray) else decode_image(image)
    return Example(image=pixels, captions=record.captions, label=record.label, name=record.name)


def decode_captions(data: bytes) -> tuple[str, ...]:
    """Decodes a caption file: one caption a line, blank lines skipped. Raises BadExample as `decode_text` does."""
    # str.splitlines would split at form feeds and U+2028 too.
    lines = decode_text(data).replace("\r", "\n").split("\n")
    return tuple(line.strip() for line in lines if line.strip())


def decode_text(data: bytes) -> str:
    """Decodes a text file: UTF-8, or UTF-16 and UTF-32 with a byte order mark.

    Raises:
      BadExample: cause `caption_undecodable` where the file is not UTF-8.
    """
    try:
        # Each of these drops the byte order mark. utf-8-sig reads files without one too.
        return data.decode(next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadExample("caption_undecodable", f"not {error.encoding.upper()}: {error}") from error


def _apply_orientation(image: Image.Image) -> Image.Image:
    # Corrupt metadata costs the rotation, not the image: the pixels are intact.
    with contextlib.suppress(Exception):
        # Without in_place, Pillow copies images that need no rotation too.
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Some releases of Pillow clip 16-bit grey at 255 instead of scaling it.
        grey16 = np.asarray(image).astype(np.float64).clip(0, 65535)
        # 65535 / 257 = 255: both ends of the range map exactly.
        grey8 = np.rint(grey16 / 257).astype(np.uint8)
        return Image.fromarray(np.repeat(grey8[:, :, None], 3, axis=2))
    # Palette images and RGB PNGs declare transparency in `info`, without an alpha band.
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")
