"""Encodes images as PNG, JPEG or WebP with the metadata of their generation, writes them atomically, and reads the metadata."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from gigagan_jax.core.errors import UserError

# File ending -> format of Pillow.
ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Longest side in pixels, by libjpeg, the format of WebP, and the 31 bits of PNG.
LONGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}
DEFAULT_QUALITY = 95
# The format of EXIF's user comment: eight letters, then ASCII text.
_COMMENT_CODE = b"ASCII\0\0\0"
# A JPEG segment holds 65,533 bytes, with the prefix and the other tags.
_LONGEST_COMMENT = 64_000
# Of a value that a JPEG cannot hold whole.
_CUT = "..."


def encode_image(
    image: Image.Image | np.ndarray, kind: str, metadata: Mapping[str, str], quality: int = DEFAULT_QUALITY
) -> bytes:
    """Encodes an image.

    PNG holds the metadata as text chunks, JPEG and WebP as JSON in EXIF's user comment. A JPEG has room for 64,000 bytes:
    the longest value is cut then.

    Args:
      image: a picture, or uint8 `[H, W, 3]`.
      kind: "PNG", "JPEG" or "WEBP".
      metadata: text by key; keys of 1 to 79 printable ASCII letters, values in any script.
      quality: 1 to 100, of JPEG and WebP; WebP is lossless at 100.

    Raises:
      OSError: the format has no such image.
      ValueError: the array or a key is invalid.
    """
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise ValueError(f"an image is uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
        image = Image.fromarray(array)
    for key in metadata:
        # The PNG specification limits keywords to 79 bytes.
        if not 1 <= len(key) <= 79 or not key.isascii() or not key.isprintable() or key.strip() != key:
            raise ValueError(f"the PNG text key {key!r} must be 1 to 79 printable ASCII letters")
    # A NUL would end the text in other readers.
    text = {key: replace_surrogates(str(value)).replace("\0", "�") for key, value in metadata.items()}
    out = io.BytesIO()
    if kind == "PNG":
        info = PngInfo()
        for key, value in text.items():
            # An iTXt chunk is UTF-8 and keeps any script.
            info.add_itxt(key, value)
        image.save(out, format=kind, pnginfo=info)
    elif kind == "JPEG":
        # Colours at full resolution: halved ones would blur the model's edges.
        image.save(out, format=kind, quality=quality, subsampling=0, exif=_make_exif(text))
    else:
        image.save(out, format=kind, quality=quality, lossless=quality == 100, exif=_make_exif(text))
    return out.getvalue()


def _make_exif(text: dict[str, str]) -> bytes:
    """EXIF data with the metadata, which both JPEG and WebP can hold."""
    # ASCII: JSON escapes all other letters, and readers agree on nothing else.
    while len(comment := json.dumps(text).encode()) > _LONGEST_COMMENT:
        longest = max(text, key=lambda key: len(text[key]))
        # An escaped letter has up to 12 bytes: cut repeatedly.
        text = text | {longest: text[longest].removesuffix(_CUT)[: len(text[longest]) // 2] + _CUT}
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "gigagan_jax"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _COMMENT_CODE + comment
    return exif.tobytes()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that has its name only when it is whole, and creates missing folders.

    Raises:
      UserError: the file cannot be written.
    """
    # In the same folder, where the replacement is atomic. The name is short: that of the file may have the full length.
    temporary = path.parent / f".{secrets.token_hex(6)}.tmp"
    try:
        try:
            # "x": an existing file of this name belongs to somebody else.
            file = open(temporary, "xb")  # noqa: SIM115
        except FileNotFoundError:
            # Not made each time: of a small image, looking for the folder is a quarter of the time.
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(temporary, "xb")  # noqa: SIM115
        try:
            with file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as e:
        raise UserError(
            f"cannot write the image {path}: {e.strerror or e}; choose a folder that you may write to"
        ) from None


def save_image(
    path: str | os.PathLike[str],
    image: Image.Image | np.ndarray,
    metadata: Mapping[str, str],
    quality: int = DEFAULT_QUALITY,
) -> None:
    """Writes an image in the format of the name's ending, atomically, and creates missing folders.

    Args:
      path: of the file, which is replaced if it exists; it ends in one of `ENDINGS`.
      image, metadata, quality: as `encode_image` takes them.

    Raises:
      UserError: the file cannot be written.
      ValueError: the array or a key is invalid.
    """
    path = Path(path)
    try:
        data = encode_image(image, ENDINGS[path.suffix.lower()], metadata, quality)
    except OSError as e:
        raise UserError(f"cannot write the image {path}: {e}; choose another format") from None
    write_atomically(path, data)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the metadata that `save_image` wrote; {} of a JPEG or WebP that has none.

    Raises:
      UserError: the file is missing, or is not a complete image of these formats.
    """
    kind = ENDINGS.get(Path(path).suffix.lower(), "PNG")
    try:
        # Not Image.open: its limit on pixels (DecompressionBombError) would reject a large grid.
        with open(path, "rb") as file:
            if file.read(8) == b"\x89PNG\r\n\x1a\n":
                file.seek(0)
                return {key: str(value) for key, value in PngImageFile(file).text.items()}
        if kind == "PNG":
            raise ValueError
        with Image.open(path) as image:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
        if not isinstance(comment, bytes) or not comment.startswith(_COMMENT_CODE):
            return {}
        return {str(k): str(v) for k, v in json.loads(comment[len(_COMMENT_CODE) :]).items()}
    except (OSError, SyntaxError, ValueError, AttributeError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else f"not a whole {kind} file"
        raise UserError(f"cannot read the image {path}: {reason}") from None


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which shell arguments may hold and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()
