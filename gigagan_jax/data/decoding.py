"""Encoded image files and caption files to what an Example holds. Sources share it, whatever they read from."""

import contextlib
import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gigagan_jax.data.example import BadExample, Example, Record

# Sizes are checked below, as an error: Pillow's own warning would only repeat it, once for each place in the code.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(data: bytes, least: int | None = None) -> np.ndarray:
    """Decodes an image file to uint8 [H, W, 3]; all else as `decode_to_pil`."""
    return np.array(decode_to_pil(data, least))


def decode_to_pil(data: bytes, least: int | None = None) -> Image.Image:
    """Decodes an image file to RGB: upright by its EXIF, alpha over white, first frame, 16 bits to 8.

    Args:
      data: the file.
      least: decode a JPEG at a half, quarter or eighth of its size, as long as its short side stays at least so many
        pixels; None decodes all of it. The decoder then leaves out work, and averages in the frequency domain.

    Raises BadExample with cause `image_empty` (no bytes), `decompression_bomb` (more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS`) or `image_undecodable` (anything else, truncation included).
    """
    if not data:
        raise BadExample("image_empty", "0 bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise BadExample(
                    "decompression_bomb", f"{image.width} x {image.height} pixels, {limit} pixels are allowed"
                )
            if least is not None:
                # Of the sizes that the decoder offers, draft takes the smallest that is no smaller than the one asked for.
                scale = least / min(image.size)
                image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            image.load()
            return _to_rgb(_upright(image))
    except BadExample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadExample("decompression_bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadExample("image_undecodable", "no image format that is known") from error
    except Exception as error:  # Decoders answer broken bytes with whatever exception they fall over.
        raise BadExample("image_undecodable", f"{type(error).__name__}: {error}") from error


def decode_record(record: Record) -> Example:
    """Decodes what a source has read. Raises BadExample as `decode_to_pil` does."""
    image = record.image
    pixels = image if isinstance(image, np.ndarray) else decode_image(image)
    return Example(image=pixels, captions=record.captions, label=record.label, name=record.name)


def decode_captions(data: bytes) -> tuple[str, ...]:
    """Decodes a caption file: UTF-8, one caption a line, blank lines skipped.

    Raises BadExample with cause `caption_undecodable` if it is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadExample("caption_undecodable", f"not UTF-8: {error}") from error
    lines = text.replace("\r", "\n").split("\n")
    return tuple(line.strip() for line in lines if line.strip())


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # The pixels are sound: broken metadata costs the rotation, not the image.
        ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies what it need not turn
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion of 16-bit grey clips at 255 in some releases.
        wide = np.asarray(image).astype(np.float64).clip(0, 65535)
        grey = np.rint(wide / 257).astype(np.uint8)
        return Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")
